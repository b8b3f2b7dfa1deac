use std::net::TcpStream as StdStream;

use cni::CaptureConfig;
use tokio::net::TcpListener;

use super::*;
use crate::node::testing::{config, linked, namespace, set, skip};

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn localhost_means_both_families_where_there_are_both() {
    let addresses = |ipv6| addresses(ListenAddress::Localhost(53), ipv6);
    assert_eq!(addresses(false), [socket("127.0.0.1:53")]);
    assert_eq!(
        addresses(true),
        [socket("127.0.0.1:53"), socket("[::1]:53")]
    );
}

#[tokio::test]
async fn an_unredirected_connection_was_going_where_it_arrived() {
    let listener = TcpListener::bind("[::]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (accepted, from) = listener.accept().await.unwrap();
    let address = original_destination(&accepted, from).unwrap();
    assert_eq!(address, SocketAddr::from(([127, 0, 0, 1], port)));
    drop(client);
}

#[test]
fn every_worker_listens_to_both_families_in_the_pod() {
    let Some(pod) = namespace() else {
        return skip("every_worker_listens_to_both_families_in_the_pod");
    };
    let listeners = listen(&pod, &config()).unwrap();
    assert_eq!(listeners.len(), 2);
    assert!(listeners.iter().all(|listeners| listeners.transparent));
    let clients = |address: &str| -> Vec<StdStream> {
        (0..64)
            .map(|_| pod.run(|| StdStream::connect(address)).unwrap())
            .collect()
    };
    let accepted = |listener: &StdListener| std::iter::from_fn(|| listener.accept().ok()).count();
    for family in ["127.0.0.1", "[::1]"] {
        let outbound = clients(&format!("{family}:15001"));
        let counts: Vec<_> = listeners
            .iter()
            .map(|one| accepted(one.outbound.as_ref().unwrap()))
            .collect();
        assert_eq!(counts.iter().sum::<usize>(), outbound.len());
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
        for (port, of) in [(15006, 0), (15008, 1), (15053, 2)] {
            let connected = clients(&format!("{family}:{port}"));
            let arrived: usize = listeners
                .iter()
                .flat_map(|one| -> Vec<_> {
                    match of {
                        0 => one.plaintext.iter().collect(),
                        1 => one.hbone.iter().collect(),
                        _ => one.dns_tcp.iter().collect(),
                    }
                })
                .map(accepted)
                .sum();
            assert_eq!(arrived, connected.len(), "{family}:{port}");
        }
    }
    let bound = |one: &Listeners| -> Vec<SocketAddr> {
        let addresses = one.dns_udp.iter().map(UdpSocket::local_addr);
        addresses.map(Result::unwrap).collect()
    };
    let expected = [socket("127.0.0.1:15053"), socket("[::1]:15053")];
    assert!(listeners.iter().all(|one| bound(one) == expected));
}

#[test]
fn a_pod_without_ipv6_on_its_loopback_has_no_ipv6_dns() {
    let Some(pod) = namespace() else {
        return skip("a_pod_without_ipv6_on_its_loopback_has_no_ipv6_dns");
    };
    set(&pod, "ipv6/conf/lo/disable_ipv6", "1");
    let listeners = listen(&pod, &config()).unwrap();
    assert_eq!(listeners[0].dns_udp.len(), 1);
    assert!(
        listeners[0]
            .outbound
            .as_ref()
            .unwrap()
            .local_addr()
            .unwrap()
            .is_ipv6()
    );
    let mut v4 = config();
    v4.ipv6 = false;
    v4.dns = false;
    let other = namespace().unwrap();
    let listeners = listen(&other, &v4).unwrap();
    assert!(
        listeners[0]
            .outbound
            .as_ref()
            .unwrap()
            .local_addr()
            .unwrap()
            .is_ipv4()
    );
    assert!(listeners[0].dns_udp.is_empty() && listeners[0].dns_tcp.is_empty());
}

#[test]
fn a_port_that_is_taken_is_named() {
    let Some(pod) = namespace() else {
        return skip("a_port_that_is_taken_is_named");
    };
    let taken = pod.run(|| StdListener::bind("0.0.0.0:15006")).unwrap();
    let error = listen(&pod, &config()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(
        error.to_string(),
        "failed to bind to address [::]:15006: Address already in use (os error 98)"
    );
    drop(taken);
    // A program that another test is just starting may hold a copy for a moment.
    let mut attempts = 0;
    while let Err(error) = listen(&pod, &config()) {
        attempts += 1;
        assert!(attempts < 500, "{error}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn source_addresses_are_kept_as_configured() {
    let Some(pod) = namespace() else {
        return skip("source_addresses_are_kept_as_configured");
    };
    let mut config = config();
    for (wish, expected) in [(Some(false), false), (Some(true), true), (None, true)] {
        config.original_source = wish;
        assert_eq!(listen(&pod, &config).unwrap()[0].transparent, expected);
    }
}

#[tokio::test]
async fn a_captured_connection_keeps_where_it_was_going() {
    let Some(pod) = namespace() else {
        return skip("a_captured_connection_keeps_where_it_was_going");
    };
    let _gateway = linked(&pod);
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let mut one = config();
    one.workers = 1;
    let listeners = listen(&pod, &one).unwrap().remove(0);
    let outbound = TcpListener::from_std(listeners.outbound.unwrap()).unwrap();
    for wanted in ["10.99.0.1:80", "[fd99::1]:443"] {
        let client = pod.run(|| StdStream::connect(wanted)).unwrap();
        let (accepted, from) = outbound.accept().await.unwrap();
        assert_eq!(
            original_destination(&accepted, from).unwrap(),
            socket(wanted)
        );
        drop(client);
    }
}

#[test]
fn accepted_connections_inherit_the_options_of_their_listener() {
    let Some(pod) = namespace() else {
        return skip("accepted_connections_inherit_the_options_of_their_listener");
    };
    let mut one = config();
    one.workers = 1;
    one.packet_mark = Some(1337);
    one.keepalive.time = std::time::Duration::from_secs(77);
    one.keepalive.interval = std::time::Duration::from_secs(11);
    one.keepalive.retries = 5;
    one.keepalive.user_timeout = true;
    let listeners = listen(&pod, &one).unwrap().remove(0);
    for (port, listener, kept_alive) in [
        (15001, listeners.outbound.as_ref().unwrap(), true),
        (15006, listeners.plaintext.as_ref().unwrap(), true),
        (15008, listeners.hbone.as_ref().unwrap(), false),
    ] {
        for family in ["127.0.0.1", "[::1]"] {
            let client = pod.run(|| StdStream::connect(format!("{family}:{port}")));
            let accepted = loop {
                match listener.accept() {
                    Ok((accepted, _)) => break accepted,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            };
            let accepted = SockRef::from(&accepted);
            assert!(accepted.tcp_nodelay().unwrap(), "{port}");
            assert_eq!(accepted.mark().unwrap(), 1337, "{port}");
            assert_eq!(accepted.keepalive().unwrap(), kept_alive, "{port}");
            if kept_alive {
                assert_eq!(accepted.tcp_keepalive_time().unwrap(), one.keepalive.time);
                let interval = accepted.tcp_keepalive_interval().unwrap();
                assert_eq!(interval, one.keepalive.interval);
                assert_eq!(accepted.tcp_keepalive_retries().unwrap(), 5);
                let timeout = accepted.tcp_user_timeout().unwrap();
                assert_eq!(timeout, Some(std::time::Duration::from_secs(77 + 5 * 11)));
            }
            drop(client);
        }
    }
}
