//! Pods of a container runtime in the mesh: who is carried how.

use serde_json::json;

use crate::containerd::Containerd;
use crate::mesh::Mesh;
use crate::wire::{Wire, count};

/// What an application in clear would say.
const CLEAR: &[u8] = b"hello from";
/// The ALPN of a tunnel's handshake, which is always in clear.
const TUNNEL: &[u8] = b"\x02h2";

#[test]
fn between_enrolled_pods_nothing_is_in_clear() {
    let Some(node) = Containerd::start("enrolled") else {
        return;
    };
    let mesh = Mesh::start(&node);
    let (a, b) = (node.pod("demo", "a").run(), node.pod("demo", "b").run());
    let wire = Wire::tap(&node.space().netns());
    assert_eq!(a.ask(b.ip()).stdout, "hello from b\n");
    assert!(count(&wire.frames(), CLEAR) > 0);

    mesh.enroll(&a);
    mesh.enroll(&b);
    mesh.knows(&[&a, &b]);
    let wire = Wire::tap(&node.space().netns());
    assert_eq!(a.ask(b.ip()).stdout, "hello from b\n");
    assert_eq!(b.ask(a.ip()).stdout, "hello from a\n");
    let frames = wire.frames();
    assert_eq!(count(&frames, CLEAR), 0);
    assert!(count(&frames, TUNNEL) > 0);
    mesh.logged(&[
        "access",
        "direction=\"inbound\"",
        "src.workload=\"b\"",
        "src.identity",
    ]);
}

#[test]
fn between_an_enrolled_and_a_plain_pod_policy_decides() {
    let Some(node) = Containerd::start("mixed") else {
        return;
    };
    let mesh = Mesh::start(&node);
    let enrolled = node.pod("demo", "enrolled").run();
    let plain = node.pod("demo", "plain").run();
    mesh.announce(&plain);
    mesh.enroll(&enrolled);
    mesh.knows(&[&enrolled, &plain]);
    assert_eq!(enrolled.ask(plain.ip()).stdout, "hello from plain\n");
    assert_eq!(plain.ask(enrolled.ip()).stdout, "hello from enrolled\n");

    mesh.apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "strict", "namespace": "demo"},
        "spec": {"mtls": {"mode": "STRICT"}},
    }));
    node.eventually("who has no identity is refused", || {
        plain.ask(enrolled.ip()).code != 0
    });
    mesh.logged(&[
        "connection closed due to policy rejection",
        "dst.workload=\"enrolled\"",
    ]);
    assert_eq!(enrolled.ask(plain.ip()).stdout, "hello from plain\n");
}
