//! Workloads that have only a hostname, resolved when a flow needs them.

use std::cell::Cell;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::rc::Rc;

use cni::netns::within;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::{LocalSet, spawn_local};

use crate::applications::{greet, socks, to_address};
use crate::harness::{Proxy, RESOLV_CONF};

const STATE: &str = r#"
workloads:
- {namespace: default, name: local, serviceAccount: acc, node: n1, workloadIps: [10.0.0.9], protocol: HBONE,
   workloadName: local, canonicalName: app, clusterId: east}
- {uid: db, namespace: default, hostname: db.example, services: {default/db.example: {80: 8080}}}
- {uid: gone, namespace: default, hostname: gone.example, services: {default/gone.example: {80: 8080}}}
- {uid: bare, namespace: default, hostname: bare.example, services: {default/bare.example: {80: 8080}}}
services:
- {name: db, namespace: default, hostname: db.example, vips: [/10.96.0.8], ports: {80: 8080}}
- {name: gone, namespace: default, hostname: gone.example, vips: [/10.96.0.9], ports: {80: 8080}}
- {name: bare, namespace: default, hostname: bare.example, vips: [/10.96.0.10], ports: {80: 8080}}
"#;

/// A DNS server at 10.0.0.53 that knows `db.example` and that there is nothing at `bare.example`; counts questions.
fn serve_dns(proxy: &Proxy, questions: Rc<Cell<usize>>) {
    proxy.shell("ip addr add 10.0.0.53/32 dev eth0; ip addr add 10.0.0.22/32 dev eth0");
    let bind = || std::net::UdpSocket::bind("10.0.0.53:53");
    let socket = within(proxy.netns().as_fd(), bind).unwrap();
    socket.set_nonblocking(true).unwrap();
    let socket = UdpSocket::from_std(socket).unwrap();
    spawn_local(async move {
        let mut buffer = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            questions.set(questions.get() + 1);
            let mut answer = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
            let question = query.queries[0].clone();
            let name = question.name().to_ascii();
            if name.starts_with("gone") {
                answer.metadata.response_code = ResponseCode::NXDomain;
            } else if name.starts_with("db") && question.query_type() == RecordType::A {
                let data = RData::A(A(Ipv4Addr::new(10, 0, 0, 22)));
                answer.add_answer(Record::from_rdata(question.name().clone(), 60, data));
            }
            answer.add_query(question);
            let answer = answer.to_vec().unwrap();
            socket.send_to(&answer, client).await.unwrap();
        }
    });
}

#[tokio::test]
async fn a_hostname_is_resolved_once_and_a_failure_is_told() {
    let variables = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "default/local/acc"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        (RESOLV_CONF, "nameserver 10.0.0.53\n"),
    ];
    let Some(proxy) = Proxy::alone("names", &variables, STATE).await else {
        return;
    };
    LocalSet::new()
        .run_until(async {
            let questions = Rc::new(Cell::new(0));
            serve_dns(&proxy, questions.clone());
            greet(proxy.listen_at("10.0.0.22", 8080));
            proxy.logged(&["serving the workload of this process"]).await;
            for _ in 0..3 {
                assert_eq!(socks(&proxy, &to_address([10, 96, 0, 8], 80)).await, (0, "hello".to_string()));
            }
            assert_eq!(questions.get(), 1, "the answer may be kept");
            proxy
                .logged(&[
                    "info",
                    "dst.addr=10.0.0.22:8080",
                    "dst.service=\"db.example\"",
                ])
                .await;
            let (_, metrics) = proxy.http("GET", 15020, "/metrics").await;
            let line = metrics
                .lines()
                .find(|line| line.starts_with("istio_on_demand_dns_total"))
                .unwrap();
            assert!(line.contains("source_workload=\"local\""), "{line}");
            assert!(line.ends_with("hostname=\"db.example\"} 3"), "{line}");

            assert_eq!(socks(&proxy, &to_address([10, 96, 0, 9], 80)).await.0, 5);
            proxy
                .logged(&[
                    "dst.service=\"gone.example\"",
                    "reason=\"unknown_host\"",
                    "error=\"no ip addresses were resolved for workload: gone\"",
                ])
                .await;
            assert_eq!(socks(&proxy, &to_address([10, 96, 0, 10], 80)).await.0, 5);
            proxy
                .logged(&[
                    "dst.service=\"bare.example\"",
                    "error=\"ip addresses were resolved for workload bare, but valid dns response had no A/AAAA records\"",
                ])
                .await;
        })
        .await;
}
