use super::*;
use crate::mesh::testing::{pod, service};

fn flow(direction: Direction) -> Flow {
    let telemetry = Arc::new(Telemetry::new("test"));
    let (src, dst) = (
        "10.1.0.7:51000".parse().unwrap(),
        "10.1.0.9:15008".parse().unwrap(),
    );
    let mut flow = Flow::new(direction, src, dst, telemetry);
    let curl = pod("a", "cli", "10.1.0.7");
    flow.mtls(Some(curl.identity.clone()));
    flow.source(Arc::new(curl));
    flow.destination(Arc::new(pod("b", "web", "10.1.0.9")));
    flow.service(Arc::new(service("b", "web", "10.96.0.1")));
    flow.hbone_addr("10.1.0.9:8080".to_string());
    flow.counters().sent.set(11);
    flow.counters().received.set(22);
    flow
}

/// The line of a flow that ended.
fn text(flow: &Flow, json: bool, level: Level, duration: Duration, error: Option<&str>) -> String {
    let error = error.map(|error| FlowError::new(Reason::PolicyNotAllowed, error));
    let line = flow.0.complete(json, &level, duration, error.as_ref());
    line.with_text(str::to_string)
}

/// The line without its time.
fn timeless(line: &str) -> String {
    match line.split_once('\t') {
        Some((_, rest)) => rest.to_string(),
        None => {
            let start = line.find("\"time\":\"").unwrap() + 8;
            format!("{}{}", &line[..start], &line[start + 27..])
        }
    }
}

const ENDS: &str = "src.addr=10.1.0.7:51000 src.workload=\"cli\" src.namespace=\"a\" \
    src.identity=\"spiffe://cluster.local/ns/a/sa/cli\" src.cluster=\"Kubernetes\" dst.addr=10.1.0.9:15008 \
    dst.hbone_addr=10.1.0.9:8080 dst.service=\"web.b.svc.cluster.local\" dst.workload=\"web\" dst.namespace=\"b\" \
    dst.identity=\"spiffe://cluster.local/ns/b/sa/web\" dst.cluster=\"Kubernetes\"";

#[test]
fn a_complete_line_names_everything_in_order() {
    let line = text(
        &flow(Direction::Outbound),
        false,
        Level::INFO,
        Duration::from_micros(7900),
        None,
    );
    let expected = format!(
        "info\taccess\tconnection complete\t{ENDS} direction=\"outbound\" bytes_sent=11 bytes_recv=22 duration=\"7ms\"\n"
    );
    assert_eq!(timeless(&line), expected);
}

#[test]
fn a_refusal_ends_with_its_reason() {
    let flow = flow(Direction::Inbound);
    flow.counters().sent.set(0);
    flow.counters().received.set(0);
    let error = "connection closed due to policy rejection: allow policies exist, but none allowed";
    let line = text(&flow, false, Level::ERROR, Duration::ZERO, Some(error));
    let expected = format!(
        "error\taccess\tconnection complete\t{ENDS} direction=\"inbound\" bytes_sent=0 bytes_recv=0 duration=\"0ms\" reason=\"policy_not_allowed\" error=\"{error}\"\n"
    );
    assert_eq!(timeless(&line), expected);
}

#[test]
fn a_json_line_has_the_same_fields() {
    let line = text(
        &flow(Direction::Inbound),
        true,
        Level::ERROR,
        Duration::ZERO,
        Some("a \"b\"\n"),
    );
    assert_eq!(
        timeless(&line),
        "{\"level\":\"error\",\"time\":\"\",\"scope\":\"access\",\"message\":\"connection complete\",\
         \"src.addr\":\"10.1.0.7:51000\",\"src.workload\":\"cli\",\"src.namespace\":\"a\",\
         \"src.identity\":\"spiffe://cluster.local/ns/a/sa/cli\",\"src.cluster\":\"Kubernetes\",\
         \"dst.addr\":\"10.1.0.9:15008\",\"dst.hbone_addr\":\"10.1.0.9:8080\",\
         \"dst.service\":\"web.b.svc.cluster.local\",\"dst.workload\":\"web\",\"dst.namespace\":\"b\",\
         \"dst.identity\":\"spiffe://cluster.local/ns/b/sa/web\",\"dst.cluster\":\"Kubernetes\",\
         \"direction\":\"inbound\",\"bytes_sent\":11,\"bytes_recv\":22,\"duration\":\"0ms\",\"reason\":\"policy_not_allowed\",\"error\":\"a \\\"b\\\"\\n\"}\n"
    );
    let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(parsed["error"], "a \"b\"\n");
}

#[test]
fn an_unknown_client_is_what_its_baggage_says_and_plaintext_has_no_identities() {
    let telemetry = Arc::new(Telemetry::new("test"));
    let (src, dst) = (
        "10.1.0.7:51000".parse().unwrap(),
        "10.1.0.9:80".parse().unwrap(),
    );
    let mut flow = Flow::new(Direction::Inbound, src, dst, telemetry);
    flow.derived_source(Baggage::parse(
        "k8s.cluster.name=c,k8s.namespace.name=n,service.name=s",
    ));
    flow.destination(Arc::new(pod("b", "web", "10.1.0.9")));
    let line = text(&flow, false, Level::INFO, Duration::ZERO, None);
    assert_eq!(
        timeless(&line),
        "info\taccess\tconnection complete\tsrc.addr=10.1.0.7:51000 src.workload=\"s\" src.namespace=\"n\" \
         src.cluster=\"c\" dst.addr=10.1.0.9:80 dst.workload=\"web\" dst.namespace=\"b\" dst.cluster=\"Kubernetes\" \
         direction=\"inbound\" bytes_sent=0 bytes_recv=0 duration=\"0ms\"\n"
    );
}

#[test]
fn an_early_denial_is_short() {
    let mut line = Line::new(false, &Level::WARN, "connection failed");
    line.address("src.addr", "10.1.0.7:51000");
    line.address("dst.addr", "127.0.0.1:15001");
    line.text("direction", "outbound");
    line.text("error", "attempted recursive call to ourselves");
    assert_eq!(
        timeless(&line.with_text(str::to_string)),
        "warn\taccess\tconnection failed\tsrc.addr=10.1.0.7:51000 dst.addr=127.0.0.1:15001 direction=\"outbound\" \
         error=\"attempted recursive call to ourselves\"\n"
    );
}

#[test]
fn bytes_are_accounted_while_a_flow_is_open_and_only_once() {
    let telemetry = Arc::new(Telemetry::new("test"));
    let (src, dst) = (
        "10.1.0.7:51000".parse().unwrap(),
        "10.1.0.9:80".parse().unwrap(),
    );
    let mut flow = Flow::new(Direction::Inbound, src, dst, telemetry.clone());
    flow.open();
    let sample = |name: &str| {
        let text = telemetry.encode();
        let value = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")));
        value.and_then(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
    };
    flow.counters().received.set(5);
    flow.counters().sent.set(7);
    settle();
    assert_eq!(sample("istio_tcp_received_bytes_total"), Some(5));
    flow.counters().sent.set(9);
    flow.finish(Err(FlowError::new(Reason::Unreachable, "x")));
    settle();
    assert_eq!(sample("istio_tcp_sent_bytes_total"), Some(9));
    assert_eq!(sample("istio_tcp_connections_opened_total"), Some(1));
    assert_eq!(sample("istio_tcp_connections_closed_total"), Some(1));
    assert_eq!(sample("istio_tcp_connections_failed_total"), Some(1));
    assert_eq!(sample("warren_flow_failures_total"), Some(1));
}

#[test]
fn the_text_of_one_line_is_not_in_the_next() {
    let long = text(
        &flow(Direction::Outbound),
        false,
        Level::INFO,
        Duration::ZERO,
        None,
    );
    let telemetry = Arc::new(Telemetry::new("test"));
    let short = Flow::new(
        Direction::Inbound,
        "10.1.0.7:51000".parse().unwrap(),
        "10.1.0.9:80".parse().unwrap(),
        telemetry,
    );
    let short = text(&short, false, Level::INFO, Duration::ZERO, None);
    assert!(short.len() < long.len());
    assert_eq!(
        timeless(&short),
        "info\taccess\tconnection complete\tsrc.addr=10.1.0.7:51000 dst.addr=10.1.0.9:80 direction=\"inbound\" \
         bytes_sent=0 bytes_recv=0 duration=\"0ms\"\n"
    );
}

#[test]
fn odd_texts_are_escaped_as_everywhere() {
    for odd in [
        "plain",
        "ü 漢",
        "a\"b\\c",
        "tab\tline\n",
        "\u{1b}[2J\u{7f}",
        "e\u{301}",
    ] {
        let mut line = Line::new(false, &Level::INFO, "m");
        line.text("key", odd);
        let text = line.with_text(str::to_string);
        assert!(text.ends_with(&format!("\tkey={odd:?}\n")), "{text}");
    }
}
