use std::net::TcpStream as StdStream;

use cni::CaptureConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::node::testing::{config, linked, namespace, set, skip};

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// An application that listens inside a namespace.
fn application(netns: &PodNetns, address: &str) -> TcpListener {
    let listener = netns.run(|| {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    TcpListener::from_std(listener.unwrap()).unwrap()
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
    let (accepted, _) = listener.accept().await.unwrap();
    let address = original_destination(&accepted).unwrap();
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
            .map(|one| accepted(&one.outbound))
            .collect();
        assert_eq!(counts.iter().sum::<usize>(), outbound.len());
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
        for (port, of) in [(15006, 0), (15008, 1), (15053, 2)] {
            let connected = clients(&format!("{family}:{port}"));
            let arrived: usize = listeners
                .iter()
                .flat_map(|one| match of {
                    0 => vec![&one.plaintext],
                    1 => vec![&one.hbone],
                    _ => one.dns_tcp.iter().collect(),
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
    assert!(listeners[0].outbound.local_addr().unwrap().is_ipv6());
    let mut v4 = config();
    v4.ipv6 = false;
    v4.dns = false;
    let other = namespace().unwrap();
    let listeners = listen(&other, &v4).unwrap();
    assert!(listeners[0].outbound.local_addr().unwrap().is_ipv4());
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
    let outbound = TcpListener::from_std(listeners.outbound).unwrap();
    for wanted in ["10.99.0.1:80", "[fd99::1]:443"] {
        let client = pod.run(|| StdStream::connect(wanted)).unwrap();
        let (accepted, _) = outbound.accept().await.unwrap();
        prepare(&accepted, &one, true);
        assert!(accepted.nodelay().unwrap());
        assert_eq!(original_destination(&accepted).unwrap(), socket(wanted));
        drop(client);
    }
}

#[tokio::test]
async fn what_the_proxy_sends_is_not_captured_again() {
    let Some(pod) = namespace() else {
        return skip("what_the_proxy_sends_is_not_captured_again");
    };
    let gateway = linked(&pod);
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let _listeners = listen(&pod, &config()).unwrap();
    for address in ["10.77.0.1:80", "[fd77::1]:80"] {
        let server = application(&gateway, address);
        let dialled = connect(&pod, &config(), socket(address), None).await;
        let (accepted, client) = server.accept().await.unwrap();
        assert_eq!(client, dialled.unwrap().local_addr().unwrap());
        drop(accepted);
    }
}

#[tokio::test]
async fn an_application_sees_the_clients_own_address() {
    let Some(pod) = namespace() else {
        return skip("an_application_sees_the_clients_own_address");
    };
    let _gateway = linked(&pod);
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let _listeners = listen(&pod, &config()).unwrap();
    for (address, client) in [
        ("10.77.0.2:8080", "10.99.0.7"),
        ("[fd77::2]:8080", "fd99::7"),
    ] {
        let server = application(&pod, address);
        let client: IpAddr = client.parse().unwrap();
        let config = config();
        let answering = async {
            let (mut accepted, from) = server.accept().await.unwrap();
            let mut question = [0; 4];
            accepted.read_exact(&mut question).await.unwrap();
            accepted.write_all(&question).await.unwrap();
            from.ip()
        };
        let asking = async {
            let mut dialled = connect(&pod, &config, socket(address), Some(client))
                .await
                .unwrap();
            dialled.write_all(b"ping").await.unwrap();
            let mut answer = [0; 4];
            dialled.read_exact(&mut answer).await.unwrap();
            answer
        };
        let (answer, seen) = tokio::join!(asking, answering);
        assert_eq!((&answer, seen), (b"ping", client));
        // Where the client is the pod itself there is nothing to take over.
        let own = connect(&pod, &config, socket(address), Some(socket(address).ip())).await;
        assert_eq!(
            own.unwrap().local_addr().unwrap().ip(),
            socket(address).ip()
        );
    }
}

#[tokio::test]
async fn a_clients_ports_are_not_used_up_by_one_application() {
    let Some(pod) = namespace() else {
        return skip("a_clients_ports_are_not_used_up_by_one_application");
    };
    let _gateway = linked(&pod);
    set(&pod, "ipv4/ip_local_port_range", "40000 40009");
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let client: IpAddr = "10.99.0.7".parse().unwrap();
    let mut open = Vec::new();
    for port in [8080, 8081] {
        let address = SocketAddr::from(([10, 77, 0, 2], port));
        let server = application(&pod, &address.to_string());
        for _ in 0..8 {
            let dialled = connect(&pod, &config(), address, Some(client))
                .await
                .unwrap();
            assert_eq!(dialled.local_addr().unwrap().ip(), client);
            open.push((dialled, server.accept().await.unwrap()));
        }
    }
}

#[tokio::test]
async fn a_refused_connection_says_so() {
    let Some(pod) = namespace() else {
        return skip("a_refused_connection_says_so");
    };
    let error = connect(&pod, &config(), socket("127.0.0.1:9"), None).await;
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}
