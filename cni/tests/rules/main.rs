//! The rules of both backends: as they are written, as the kernel holds them, in pods and on the node.
//!
//! What node-agent.md §8.1 asks for, and where it is shown (`cni` unless another folder is named):
//!
//! | asked for | shown by |
//! |---|---|
//! | the text of the rules by variant and family | `golden`; those of the node: `host::the_host_rules_are_these` |
//! | a pod's wish for DNS capture or none, whatever the node's | `src/agent/settings.rs`, `tests/agent/lifecycle.rs` (annotations) |
//! | ip6tables may be missing if IPv6 is off, and only then | `refusals` |
//! | put in, unchanged, taken out, put in again, by variant | `pods::every_variant_is_put_in_once_and_goes_whole_beside_the_rules_of_others` |
//! | rules that differ: told, left alone or replaced; others' rules are no difference and stay | `damage`, `pods` |
//! | the node's rules and sets: the same round | `host::the_nodes_rules_go_whole_and_come_back_beside_those_of_others` |
//! | nftables: the text, a second time, fifty pods at once, the node's rules again | `golden`, `pods`, `host::opening_again_keeps_what_is_held_and_changes_nothing` |
//! | the kubelet's user | `src/host/kubelet.rs`, `probes` |
//! | which iptables a machine has; an nft without JSON | `src/iptables.rs`, `backend` |
//! | pods behind a branch interface | `host::pods_behind_a_branch_interface_are_led_to_and_let_go_of` |
//! | where packets go | `tests/traffic`, `probes`; by kind of packet in `docs/capture.md` |
//! | a pod's namespace among the node's processes | `src/scan.rs`, `tests/selftest.rs`, `tests/agent/lifecycle.rs` |
//! | namespaces by inode: the same, another, none at hand | `tests/agent/starting.rs` (again, made anew), `tests/agent/crash.rs` (taken over) |
//! | pods that come, go and fail; what is told of them | `tests/agent/starting.rs`, `tests/agent/lifecycle.rs` |
//! | the set of probed addresses: two families, owners, pruned or not | `host::addresses_are_held_for_their_owner_until_that_owner_lets_go`, `tests/agent/lifecycle.rs`, `tests/agent/crash.rs` |
//! | labels, kinds of pods, repetitions, ends, stale news | `src/eligibility.rs`, `src/agent/cluster.rs`, `tests/agent/lifecycle.rs` |
//! | what the plugin asks and is answered, and its log | `src/event.rs`, `tests/agent/starting.rs` |
//! | the protocol with proxies | `src/zds/server_tests.rs` |
//! | readiness; what is no namespace | `tests/agent/starting.rs`, `src/netns.rs`, `refusals` |
//! | the installer | `src/install`, `tests/install` |

mod backend;
mod by_hand;
mod damage;
mod golden;
mod host;
mod legacy;
#[path = "../namespace/mod.rs"]
mod namespace;
#[path = "../namespace/net.rs"]
mod net;
mod pods;
mod probes;
mod refusals;
mod variants;
