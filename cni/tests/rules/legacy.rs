//! All of it again with the iptables that is not nftables in disguise.

use super::namespace::{Namespace, again};

#[test]
fn legacy_iptables_does_as_well() {
    let test = "legacy_iptables_does_as_well";
    if std::env::var_os("FORCE_IPTABLES_BINARY").is_some() || Namespace::new(test).is_none() {
        return;
    }
    // The node's own lock is the business of others.
    let lock = std::env::temp_dir().join(format!("wrn-xtables-{}.lock", std::process::id()));
    let variables = [
        ("FORCE_IPTABLES_BINARY", "legacy"),
        ("XTABLES_LOCKFILE", lock.to_str().unwrap()),
    ];
    // What no iptables is asked for, and what is long and of the same kind as the rest of pods and damage.
    let others = [
        "legacy",
        "golden::",
        "backend::",
        "from_each_variant",
        "any_single_rule",
    ];
    let others = others.iter().flat_map(|name| ["--skip", name]);
    let passed = again(&variables, &others.collect::<Vec<_>>());
    let _ = std::fs::remove_file(lock);
    let passed = passed.unwrap_or_else(|errors| panic!("{errors}"));
    assert!(passed > 25, "{passed}");
}
