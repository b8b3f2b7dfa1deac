//! The rules of every variant, letter by letter.

use std::fs;
use std::path::PathBuf;

use cni::rules::Family;
use cni::{CaptureConfig, nftables, render};

use super::variants::variants;

fn check(kind: &str, write: impl Fn(&CaptureConfig) -> String) {
    for (name, config) in variants() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/rules/golden");
        let path = folder.join(format!("{name}.{kind}"));
        let expected =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(write(&config), expected, "{}", path.display());
    }
}

#[test]
fn iptables_is_told_the_same_rules_as_ever() {
    check("iptables", |config| render::restore(Family::V4, config));
    check("ip6tables", |config| render::restore(Family::V6, config));
}

#[test]
fn nft_is_told_the_same_rules_as_ever() {
    check("nft", nftables::render::script);
}

#[test]
fn nft_deletes_every_table_there_may_be_in_one_script() {
    let removal = nftables::render::removal();
    for table in ["filter", "mangle", "nat", "raw"] {
        let lines = format!(
            "add table inet istio-ambient-{table}\ndelete table inet istio-ambient-{table}\n"
        );
        assert!(removal.contains(&lines), "{removal}");
    }
    assert_eq!(removal.lines().count(), 8);
}
