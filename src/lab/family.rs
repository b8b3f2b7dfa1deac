//! Which address families a lab has, and what has one address of each.

use std::fmt;
use std::net::IpAddr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv6() {
            Self::V6
        } else {
            Self::V4
        }
    }
}

/// As Kubernetes writes it in `ipFamilies`.
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The address families of a lab.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4 alone; IPv6 is off in nodes and pods
    #[default]
    Ipv4,
    /// IPv6 alone
    Ipv6,
    /// Both, IPv4 first
    Dual,
}

impl IpFamily {
    /// The families, that of the first address of everything first.
    pub fn families(self) -> &'static [Family] {
        match self {
            Self::Ipv4 => &[Family::V4],
            Self::Ipv6 => &[Family::V6],
            Self::Dual => &[Family::V4, Family::V6],
        }
    }

    /// The family of the first address of everything.
    pub fn first(self) -> Family {
        match self {
            Self::Ipv4 | Self::Dual => Family::V4,
            Self::Ipv6 => Family::V6,
        }
    }

    pub fn has_ipv6(self) -> bool {
        self.families().contains(&Family::V6)
    }
}

/// The addresses of one thing: one of each of its families, the first of which it is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    first: IpAddr,
    second: Option<IpAddr>,
}

impl Addresses {
    /// What `address` gives for each family of the lab.
    pub fn of(lab: IpFamily, address: impl Fn(Family) -> IpAddr) -> Self {
        let second = (lab == IpFamily::Dual).then(|| address(Family::V6));
        Self {
            first: address(lab.first()),
            second,
        }
    }

    /// The same for some families in their order; `None` without any.
    pub fn of_some(families: &[Family], address: impl Fn(Family) -> IpAddr) -> Option<Self> {
        let mut addresses = families.iter().map(|family| address(*family));
        Some(Self {
            first: addresses.next()?,
            second: addresses.next(),
        })
    }

    pub fn first(&self) -> IpAddr {
        self.first
    }

    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        [self.first].into_iter().chain(self.second)
    }

    /// The address of a family.
    pub fn get(&self, family: Family) -> Option<IpAddr> {
        self.iter().find(|address| Family::of(*address) == family)
    }
}

/// With commas, as columns of a table show them.
impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.iter().map(|address| address.to_string()).collect();
        f.pad(&texts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_an_address_of_each_family_of_the_lab() {
        let address = |family| match family {
            Family::V4 => IpAddr::from([10, 0, 0, 1]),
            Family::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]),
        };
        for (lab, text, first) in [
            (IpFamily::Ipv4, "10.0.0.1", Family::V4),
            (IpFamily::Ipv6, "fd00::1", Family::V6),
            (IpFamily::Dual, "10.0.0.1,fd00::1", Family::V4),
        ] {
            let addresses = Addresses::of(lab, address);
            assert_eq!(addresses.to_string(), text);
            assert_eq!(Family::of(addresses.first()), first);
            assert_eq!(
                Addresses::of_some(lab.families(), address),
                Some(addresses.clone())
            );
            assert_eq!(
                addresses.get(Family::V6).is_some(),
                lab.has_ipv6(),
                "{lab:?}"
            );
        }
        assert_eq!(Addresses::of_some(&[], address), None);
    }
}
