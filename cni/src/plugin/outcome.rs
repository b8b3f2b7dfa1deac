//! What the plugin says to the runtime: the result of the plugins before it, or an error.

use std::fmt;

use ipnet::IpNet;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::version::Version;
use crate::event::Assigned;

/// Codes of errors: the specification's, and from 100 on the plugin's own.
pub mod code {
    pub const VERSION: u32 = 1;
    pub const ENVIRONMENT: u32 = 4;
    pub const DECODE: u32 = 6;
    pub const CONFIGURATION: u32 = 7;
    /// Something that the plugin needs is not there for now.
    pub const TRY_AGAIN: u32 = 11;
    /// The agent says that a pod is not captured.
    pub const NOT_CAPTURED: u32 = 100;
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    pub code: u32,
    pub msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// With what lies behind it.
    pub fn because(mut self, details: impl fmt::Display) -> Self {
        self.details = details.to_string();
        self
    }

    /// As the specification wants it on standard output.
    pub fn to_json(&self, version: Version) -> Value {
        let mut value = json!(self);
        value["cniVersion"] = version.name().into();
        value
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        match self.details.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.details),
        }
    }
}

/// The versions of the plugin, as `VERSION` asks for them.
pub fn versions() -> Value {
    json!({
        "cniVersion": Version::LATEST.name(),
        "supportedVersions": Version::ALL.map(Version::name),
    })
}

/// The result of the plugins before, in the version of the runtime; without one, an empty result.
///
/// # Errors
/// When there is no way between the two versions.
pub fn result(previous: Option<&Value>, version: Version) -> Result<Value, Failure> {
    let mut result = match previous {
        None | Some(Value::Null) => Map::from_iter([("dns".to_string(), json!({}))]),
        Some(Value::Object(previous)) => previous.clone(),
        Some(other) => {
            let text = "prevResult is no object";
            return Err(Failure::new(code::DECODE, text).because(other));
        }
    };
    let spoken = match result.get("cniVersion").and_then(Value::as_str) {
        Some(text) => Version::parse(text).ok_or_else(|| {
            let text = format!("the version of prevResult, {text:?}, is not supported");
            Failure::new(code::VERSION, text)
        })?,
        None => version,
    };
    let generation = |version: Version| match version {
        Version::V0_1_0 | Version::V0_2_0 => 0,
        Version::V0_3_0 | Version::V0_3_1 | Version::V0_4_0 => 1,
        Version::V1_0_0 | Version::V1_1_0 => 2,
    };
    match (generation(spoken), generation(version)) {
        (from, to) if from == to => {}
        (1, 2) => each_ip(&mut result, |ip| {
            ip.remove("version");
        }),
        (2, 1) => each_ip(&mut result, |ip| {
            let address = ip.get("address").and_then(Value::as_str).unwrap_or("");
            let family = if address.contains(':') { "6" } else { "4" };
            ip.insert("version".to_string(), family.into());
        }),
        _ => {
            let text = format!(
                "a prevResult of version {} cannot be given to a runtime of version {}",
                spoken.name(),
                version.name()
            );
            return Err(Failure::new(code::VERSION, text));
        }
    }
    result.insert("cniVersion".to_string(), version.name().into());
    Ok(Value::Object(result))
}

fn each_ip(result: &mut Map<String, Value>, change: impl Fn(&mut Map<String, Value>)) {
    let ips = result.get_mut("ips").and_then(Value::as_array_mut);
    ips.into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
        .for_each(change);
}

/// The addresses of a result, in whichever version it is.
pub fn addresses(previous: Option<&Value>) -> Vec<Assigned> {
    let Some(previous) = previous else {
        return Vec::new();
    };
    let read = |ip: &Value, address: &str| {
        let address: IpNet = ip.get(address)?.as_str()?.parse().ok()?;
        let number = |name: &str| ip.get(name).and_then(Value::as_u64);
        Some(Assigned {
            address,
            interface: number("interface").and_then(|number| number.try_into().ok()),
            gateway: ip
                .get("gateway")
                .and_then(Value::as_str)
                .and_then(|gateway| gateway.parse().ok()),
        })
    };
    let list = previous.get("ips").and_then(Value::as_array);
    let listed = list.into_iter().flatten().map(|ip| (ip, "address"));
    let old = ["ip4", "ip6"].into_iter();
    let old = old.filter_map(|name| previous.get(name).map(|ip| (ip, "ip")));
    listed
        .chain(old)
        .filter_map(|(ip, address)| read(ip, address))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_pass_through_whole() {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": "/n", "mtu": 1500, "unknown": {"x": 1}}],
            "ips": [{"interface": 0, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {"nameservers": ["10.0.0.10"]},
        });
        assert_eq!(
            result(Some(&previous), Version::V1_0_0),
            Ok(previous.clone())
        );
        let mut newer = previous.clone();
        newer["cniVersion"] = "1.1.0".into();
        assert_eq!(result(Some(&previous), Version::V1_1_0), Ok(newer));
        let mut older = previous.clone();
        older["cniVersion"] = "0.4.0".into();
        older["ips"][0]["version"] = "4".into();
        assert_eq!(result(Some(&previous), Version::V0_4_0), Ok(older.clone()));
        assert_eq!(result(Some(&older), Version::V1_0_0), Ok(previous.clone()));
        // libcni leaves the version out and speaks the list's.
        let mut silent = older.clone();
        silent.as_object_mut().unwrap().remove("cniVersion");
        assert_eq!(result(Some(&silent), Version::V0_4_0), Ok(older));
        let failure = result(Some(&previous), Version::V0_2_0).unwrap_err();
        assert_eq!(failure.code, code::VERSION);
    }

    #[test]
    fn without_a_result_before_there_is_an_empty_one() {
        let empty = json!({"cniVersion": "0.3.1", "dns": {}});
        assert_eq!(result(None, Version::V0_3_1), Ok(empty.clone()));
        assert_eq!(result(Some(&Value::Null), Version::V0_3_1), Ok(empty));
        for bad in [json!("x"), json!([]), json!({"cniVersion": "7"})] {
            assert!(result(Some(&bad), Version::V1_0_0).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_read_in_every_version() {
        let new = json!({"ips": [
            {"interface": 2, "address": "10.0.0.2/24", "gateway": "10.0.0.1"},
            {"address": "fd00::2/64"},
            {"address": "nonsense"}, {}, 7,
        ]});
        let v4 = Assigned {
            address: "10.0.0.2/24".parse().unwrap(),
            interface: Some(2),
            gateway: Some("10.0.0.1".parse().unwrap()),
        };
        let v6 = Assigned {
            address: "fd00::2/64".parse().unwrap(),
            interface: None,
            gateway: None,
        };
        assert_eq!(addresses(Some(&new)), [v4.clone(), v6.clone()]);
        let old = json!({"ip4": {"ip": "10.0.0.2/24", "gateway": "10.0.0.1"}, "ip6": {"ip": "fd00::2/64"}});
        let without_place = Assigned {
            interface: None,
            ..v4
        };
        assert_eq!(addresses(Some(&old)), [without_place, v6]);
        assert!(addresses(None).is_empty());
        assert!(addresses(Some(&json!("x"))).is_empty());
    }

    #[test]
    fn errors_are_those_of_the_specification() {
        let failure = Failure::new(code::TRY_AGAIN, "no agent").because("connection refused");
        assert_eq!(failure.to_string(), "no agent: connection refused");
        assert_eq!(
            failure.to_json(Version::V0_4_0),
            json!({"cniVersion": "0.4.0", "code": 11, "msg": "no agent", "details": "connection refused"})
        );
    }
}
