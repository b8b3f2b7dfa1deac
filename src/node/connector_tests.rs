use std::net::TcpListener as StdListener;
use std::os::fd::AsFd;

use cni::CaptureConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use super::*;
use crate::node::sockets::listen;
use crate::node::testing::{config, linked, namespace, set, skip};

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn connector(netns: PodNetns) -> (Arc<PodNetns>, Connector) {
    let netns = Arc::new(netns);
    let connector = Connector::new(netns.clone(), Arc::new(config()));
    (netns, connector)
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

#[tokio::test]
async fn what_the_proxy_sends_is_not_captured_again() {
    let Some(pod) = namespace() else {
        return skip("what_the_proxy_sends_is_not_captured_again");
    };
    let gateway = linked(&pod);
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let _listeners = listen(&pod, &config()).unwrap();
    let (_pod, connector) = connector(pod);
    for address in ["10.77.0.1:80", "[fd77::1]:80"] {
        let server = application(&gateway, address);
        let dialled = connector.connect(socket(address), Toward::Elsewhere).await;
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
    let (pod, connector) = connector(pod);
    for (address, client) in [
        ("10.77.0.2:8080", "10.99.0.7"),
        ("[fd77::2]:8080", "fd99::7"),
    ] {
        let server = application(&pod, address);
        let client: IpAddr = client.parse().unwrap();
        let answering = async {
            let (mut accepted, from) = server.accept().await.unwrap();
            let mut question = [0; 4];
            accepted.read_exact(&mut question).await.unwrap();
            accepted.write_all(&question).await.unwrap();
            from.ip()
        };
        let asking = async {
            let toward = Toward::Application(Some(client));
            let dialled = connector.connect(socket(address), toward).await;
            let mut dialled = dialled.unwrap();
            dialled.write_all(b"ping").await.unwrap();
            let mut answer = [0; 4];
            dialled.read_exact(&mut answer).await.unwrap();
            answer
        };
        let (answer, seen) = tokio::join!(asking, answering);
        assert_eq!((&answer, seen), (b"ping", client));
        // Where the client is the pod itself there is nothing to take over.
        let toward = Toward::Application(Some(socket(address).ip()));
        let own = connector.connect(socket(address), toward).await;
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
    let (pod, connector) = connector(pod);
    let work = async {
        let mut open = Vec::new();
        for port in [8080, 8081] {
            let address = SocketAddr::from(([10, 77, 0, 2], port));
            let server = application(&pod, &address.to_string());
            for _ in 0..8 {
                let toward = Toward::Application(Some(client));
                let dialled = connector.connect(address, toward).await.unwrap();
                assert_eq!(dialled.local_addr().unwrap().ip(), client);
                open.push((dialled, server.accept().await.unwrap()));
            }
        }
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_refused_connection_says_so() {
    let Some(pod) = namespace() else {
        return skip("a_refused_connection_says_so");
    };
    let (_pod, connector) = connector(pod);
    for toward in [Toward::Elsewhere, Toward::Application(None)] {
        for address in ["127.0.0.1:9", "[::1]:9"] {
            let error = connector.connect(socket(address), toward).await;
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}

#[tokio::test]
async fn a_busy_pods_sockets_are_made_ahead_and_closed_when_it_rests() {
    let Some(pod) = namespace() else {
        return skip("a_busy_pods_sockets_are_made_ahead_and_closed_when_it_rests");
    };
    let idle = Duration::from_millis(20);
    let connector = Connector::resting_after(idle, Arc::new(pod), Arc::new(config()));
    let work = async {
        let server = application(&connector.0.netns, "127.0.0.1:80");
        let client = Toward::Application(Some("10.99.0.7".parse().unwrap()));
        for toward in [client, Toward::Elsewhere, Toward::Application(None)] {
            let first = connector.spare();
            for taken in 0..40 {
                connector.0.take(toward, true).unwrap();
                assert!((taken > 0) || connector.spare() == first);
            }
            assert!((1..=BATCH).contains(&(connector.spare() - first)));
        }
        let before = connector.spare();
        // Only a socket that was made in the pod gets there.
        let own = connector.connect(socket("127.0.0.1:80"), Toward::Application(None));
        let dialled = own.await.unwrap();
        let (_, from) = server.accept().await.unwrap();
        assert_eq!(from, dialled.local_addr().unwrap());
        assert_eq!(connector.spare(), before - 1);
        while connector.0.sweeping.get() {
            tokio::time::sleep(idle).await;
        }
        assert_eq!(connector.spare(), 0);
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn sockets_have_the_options_that_their_peers_call_for() {
    let Some(pod) = namespace() else {
        return skip("sockets_have_the_options_that_their_peers_call_for");
    };
    let (_pod, connector) = connector(pod);
    for v4 in [true, false] {
        let client: IpAddr = if v4 {
            [10, 0, 0, 1].into()
        } else {
            "fd00::1".parse().unwrap()
        };
        for (toward, kept_alive) in [
            (Toward::Application(None), false),
            (Toward::Application(Some(client)), false),
            (Toward::Elsewhere, true),
        ] {
            let socket = connector.0.take(toward, v4).unwrap();
            assert!(socket.tcp_nodelay().unwrap() && socket.nonblocking().unwrap());
            assert_eq!(socket.keepalive().unwrap(), kept_alive, "{toward:?}");
            let transparent = match v4 {
                true => socket.ip_transparent_v4(),
                false => socket.ip_transparent_v6(),
            };
            assert_eq!(
                transparent.unwrap(),
                matches!(toward, Toward::Application(Some(_)))
            );
        }
    }
}
