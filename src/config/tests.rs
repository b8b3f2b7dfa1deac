use super::*;

fn load(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let map = variables
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    Config::from_variables(&Variables(map), None, 8, String::new())
}

#[test]
fn nothing_set_gives_the_documented_defaults() {
    let config = load(&[]).unwrap();
    assert_eq!(config.workers, 2);
    assert_eq!(config.packet_mark, Some(1337));
    assert_eq!(
        config.xds.address.as_deref(),
        Some("https://localhost:15012")
    );
    assert_eq!(config.termination_deadline, Duration::from_secs(5));
    assert!(config.dns && config.ipv6);
}

#[test]
fn a_malformed_value_is_refused_by_name() {
    for (name, value) in [
        ("PROXY_MODE", "sidecar"),
        ("IPV6_ENABLED", "yes"),
        ("KEEPALIVE_TIME", "soon"),
        ("HTTP2_FRAME_SIZE", "12"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
        ("ZTUNNEL_WORKER_THREADS", "200%"),
        ("COMPLIANCE_POLICY", "fips"),
        ("ENABLE_ORIG_SRC", "maybe"),
        ("FLOW_BUDGET", "0"),
        ("MEMORY_BUDGET", "64Mib"),
        ("MEMORY_BUDGET_PER_POD", "Gi"),
        ("SPIFFE_ENDPOINT_SOCKET", "tcp://127.0.0.1:8081"),
        ("SPIFFE_ENDPOINT_SOCKET", "unix://agent/api.sock"),
        ("SPIFFE_ENDPOINT_SOCKET", "unix:api.sock"),
        ("SPIFFE_ENDPOINT_SOCKET", "/run/api.sock"),
    ] {
        let error = load(&[(name, value)]).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("invalid env var {name}={value} (")),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_work_refuses_to_start() {
    for variable in [
        ("PROXY_MODE", "dedicated"),
        ("CA_ADDRESS", ""),
        ("XDS_ADDRESS", ""),
    ] {
        assert!(
            matches!(load(&[variable]), Err(ConfigError::Invalid(_))),
            "{variable:?}"
        );
    }
    assert!(matches!(
        load(&[("XDS_ADDRESS", "http://x:1")]),
        Err(ConfigError::Uri(_))
    ));
}

#[test]
fn metadata_and_headers_come_from_prefixed_variables() {
    let config = load(&[
        ("ISTIO_META_DNS_CAPTURE", "FALSE"),
        ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:15053"),
        ("ISTIO_META_CLUSTER_ID", "east"),
        ("XDS_HEADER_X_A", "1"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "0"),
    ])
    .unwrap();
    assert!(!config.dns);
    assert_eq!(
        config.dns_address,
        ListenAddress::At("127.0.0.1:15053".parse().unwrap())
    );
    assert_eq!(config.cluster_id, "east");
    assert_eq!(config.xds.headers, [("x_a".to_string(), "1".to_string())]);
    assert_eq!(config.termination_deadline, Duration::from_secs(1));
}

#[test]
fn a_dedicated_proxy_knows_its_workload_and_marks_nothing() {
    let config = load(&[
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "default/local/acc"),
    ])
    .unwrap();
    let name = WorkloadName {
        namespace: "default".into(),
        name: "local".into(),
        service_account: "acc".into(),
    };
    assert_eq!(config.mode, Mode::Dedicated(name));
    assert_eq!(config.packet_mark, None);
    let wrong = load(&[
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "default/local"),
    ]);
    assert_eq!(
        wrong.unwrap_err().to_string(),
        "invalid env var PROXY_WORKLOAD_INFO=default/local (expected namespace/name/service-account)"
    );
}

#[test]
fn what_stands_in_for_a_control_plane_lets_it_be_switched_off() {
    let config = load(&[
        ("XDS_ADDRESS", ""),
        ("CA_ADDRESS", ""),
        ("LOCAL_XDS", "{}"),
        ("FAKE_CA", "true"),
    ])
    .unwrap();
    assert!(config.fake_ca && config.xds.address.is_none());
    let both = load(&[("LOCAL_XDS", "{}"), ("LOCAL_XDS_PATH", "/x")]);
    assert!(matches!(both, Err(ConfigError::Invalid(_))));
    let nothing = load(&[("ENABLE_PROXY", "false"), ("ISTIO_META_DNS_CAPTURE", "no")]);
    assert!(matches!(nothing, Err(ConfigError::Invalid(_))));
}

#[test]
fn budgets_are_numbers_of_flows_and_of_bytes() {
    let config = load(&[
        ("FLOW_BUDGET_PER_POD", "100"),
        ("MEMORY_BUDGET", "64Mi"),
        ("MEMORY_BUDGET_PER_POD", "2000000"),
    ])
    .unwrap();
    assert_eq!(config.flow_budgets, [None, Some(100)]);
    assert_eq!(config.memory_budgets, [Some(64 << 20), Some(2_000_000)]);
}

#[test]
fn a_workload_api_takes_the_place_of_the_ca() {
    for (value, ca) in [
        ("unix:///run/api.sock", None),
        ("unix:/run/api.sock", Some("")),
    ] {
        let mut variables = vec![("SPIFFE_ENDPOINT_SOCKET", value)];
        variables.extend(ca.map(|ca| ("CA_ADDRESS", ca)));
        let config = load(&variables).unwrap();
        assert_eq!(config.spiffe_socket.as_deref(), Some("/run/api.sock"));
        assert_eq!(config.ca.address, None);
    }
    for other in [("CA_ADDRESS", "https://ca:15012"), ("FAKE_CA", "true")] {
        let socket = ("SPIFFE_ENDPOINT_SOCKET", "unix:/run/api.sock");
        let error = load(&[socket, other]).unwrap_err().to_string();
        let says = format!("SPIFFE_ENDPOINT_SOCKET and {} are both set", other.0);
        assert!(error.contains(&says), "{error}");
    }
}
