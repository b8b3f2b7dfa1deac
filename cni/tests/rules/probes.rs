//! Probes from a node to a captured pod, and what the node only forwards.

use cni::rules::PLAINTEXT_PORT;
use cni::{Backend, CaptureConfig};

use super::host::{Proc, config, open};
use super::namespace::Namespace;
use super::net::{Net, PEER, POD, Seen, accept, both, connect, listen, probe};
use super::variants::{BACKENDS, with};

#[test]
fn probes_come_from_the_probe_address_and_forwarded_traffic_is_captured() {
    let test = "probes_come_from_the_probe_address_and_forwarded_traffic_is_captured";
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let pod_config = with(backend, &CaptureConfig::default());
        let (Some(net), Some(client)) = (Net::new(test, &pod_config), Namespace::new(test)) else {
            return;
        };
        let node = &net.peer;
        // The node has no address of the probes; answers find back by what it remembers.
        node.shell(&format!(
            "ip addr flush dev lo scope global; ip -6 addr flush dev lo scope global; \
             ip link add wrn2 type veth peer name wrn3; ip link set wrn3 netns {}; ip link set wrn2 up; \
             ip addr add 203.0.113.1/24 dev wrn2; ip -6 addr add 2001:db8:3::1/64 dev wrn2 nodad; \
             echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
            client.path()
        ));
        client.shell(
            "ip link set wrn3 up; ip addr add 203.0.113.2/24 dev wrn3; \
             ip -6 addr add 2001:db8:3::2/64 dev wrn3 nodad; \
             ip route add default via 203.0.113.1; ip -6 route add default via 2001:db8:3::1",
        );
        let (application, proxy) = (listen(&net.pod, 8080), listen(&net.pod, PLAINTEXT_PORT));
        let host = open(node, &config(backend, &proc)).unwrap();
        for family in both() {
            let wanted = (POD[family], 8080);
            // Before the node knows the pod, its probes are anybody's traffic.
            let early = connect(node, wanted).unwrap();
            let from = PEER[family];
            assert_eq!(accept(&proxy, early), Seen { from, wanted });
            host.add(POD[family], "a").unwrap();
            let kubelet = connect(node, wanted).unwrap();
            let from = probe(family);
            assert_eq!(accept(&application, kubelet), Seen { from, wanted });
            let from = ["203.0.113.2", "2001:db8:3::2"][family].parse().unwrap();
            let forwarded = connect(&client, wanted).unwrap();
            assert_eq!(accept(&proxy, forwarded), Seen { from, wanted });
            assert!(host.remove(POD[family], "a").unwrap());
            let late = connect(node, wanted).unwrap();
            let from = PEER[family];
            assert_eq!(accept(&proxy, late), Seen { from, wanted });
        }
    }
}

#[test]
fn nftables_takes_only_the_kubelets_user_for_a_prober_and_iptables_any_socket_of_the_node() {
    let test =
        "nftables_takes_only_the_kubelets_user_for_a_prober_and_iptables_any_socket_of_the_node";
    for backend in BACKENDS {
        let Some(net) = Net::new(test, &with(backend, &CaptureConfig::default())) else {
            return;
        };
        let (application, proxy) = (listen(&net.pod, 8080), listen(&net.pod, PLAINTEXT_PORT));
        // This process, which dials, is not that user.
        let proc = Proc::with_kubelet_of(1001, "1\n");
        let host = open(&net.peer, &config(backend, &proc)).unwrap();
        for family in both() {
            host.add(POD[family], "a").unwrap();
            let (from, listener) = match backend {
                Backend::Iptables => (probe(family), &application),
                Backend::Nftables => (PEER[family], &proxy),
            };
            let wanted = (POD[family], 8080);
            let client = connect(&net.peer, wanted).unwrap();
            assert_eq!(accept(listener, client), Seen { from, wanted });
        }
    }
}
