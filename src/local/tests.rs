use super::*;

const FILE: &str = r#"
workloads:
- namespace: default
  name: local
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: n1
  network: ""
  waypoint: {destination: default/waypoint.default.svc.cluster.local, hboneMtlsPort: 15008}
  services:
    default/example.com: {80: 8080}
  authorizationPolicies: [default/no]
  locality: {region: r, zone: z, subzone: s}
- uid: gw
  namespace: istio-system
  serviceAccount: gw
  workloadIps: [10.0.0.7]
  networkGateway: {destination: "other/10.9.9.9", hboneMtlsPort: 15008}
  applicationTunnel: {protocol: PROXY, port: 15088}
services:
- name: example
  namespace: default
  hostname: example.com
  vips: ["/127.10.0.1"]
  cidrVips: [{network: "", cidr: 10.5.0.0/16}]
  ports: {80: 0}
  endpoints:
    gw: {workloadUid: gw, port: {80: 9090}}
  loadBalancer: {routingPreferences: [Network, Zone], mode: Failover}
  ipFamilies: Dual
  visibility: Namespace
policies:
- name: no
  namespace: default
  scope: WorkloadSelector
  action: Deny
  dryRun: false
  rules: [[[{notDestinationPorts: [9999], principals: [{Prefix: td/}, {Presence: []}], sourceIps: [10.0.0.0/8, 1.2.3.4]}]]]
"#;

#[test]
fn a_file_means_what_the_same_resources_of_a_control_plane_mean() {
    let state = State::parse(FILE).unwrap();
    let names: Vec<_> = state.addresses.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["default/example.com", "gw", "local//Pod/default/local"]
    );
    let dump = state.dump();
    let local = &dump["workloads"][1];
    assert_eq!(local["trustDomain"], "cluster.local");
    assert_eq!(local["serviceAccount"], "default");
    assert_eq!(local["protocol"], "HBONE");
    assert_eq!(local["services"], json!(["default/example.com"]));
    assert_eq!(
        local["waypoint"]["destination"],
        "default/waypoint.default.svc.cluster.local"
    );
    assert_eq!(
        dump["workloads"][0]["networkGateway"]["destination"],
        "other/10.9.9.9"
    );
    let service = &dump["services"][0];
    assert_eq!(service["endpoints"]["gw"]["port"], json!({ "80": 9090 }));
    assert_eq!(service["cidrVips"][0]["cidr"], "10.5.0.0/16");
    assert_eq!(service["loadBalancer"]["mode"], "Failover");
    let part = &dump["policies"][0]["rules"][0][0][0];
    assert_eq!(
        part["principals"],
        json!([{ "Prefix": "td/" }, { "Presence": [] }])
    );
    assert_eq!(part["sourceIps"], json!(["10.0.0.0/8", "1.2.3.4/32"]));
}

#[test]
fn what_cannot_be_used_is_refused_by_entry_and_field() {
    let cases = [
        ("workload: []", "unknown field `workload`"),
        ("workloads: [{name: x}]", "missing field `namespace`"),
        (
            "workloads: [{namespace: a, name: x, services: {host: {}}}]",
            "workload local//Pod/a/x: services: host is not",
        ),
        (
            "workloads: [{namespace: a, name: x}, {namespace: a, name: x}]",
            "is there twice",
        ),
        (
            "services: [{name: a, namespace: b, hostname: c, vips: [10.0.0.1]}]",
            "service b/c: vips: 10.0.0.1 is not",
        ),
        (
            "services: [{name: a, namespace: b, hostname: c, endpoints: {x: {workloadUid: x}}}]",
            "endpoint x is no workload",
        ),
        (
            "services: [{name: a, namespace: b, hostname: c, waypoint: {destination: x, hboneMtlsPort: 1}}]",
            "neither network/ip nor",
        ),
        (
            "policies: [{name: a, namespace: b, scope: Global, action: Allow, rules: [[[{principals: [{}]}]]]}]",
            "principals[0] cannot be read",
        ),
    ];
    for (text, expected) in cases {
        let error = format!("{:#}", State::parse(text).unwrap_err());
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn an_empty_file_says_nothing() {
    assert_eq!(State::parse("").unwrap(), State::default());
    assert_eq!(State::parse("# nothing yet\n").unwrap(), State::default());
}
