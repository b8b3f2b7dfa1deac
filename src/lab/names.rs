//! Names that Kubernetes would make up: template hashes, pod suffixes, UIDs.
//!
//! All are functions of what they name, so that the same manifests give the same names in every run.

use serde_json::Value;
use xxhash_rust::xxh64::xxh64;

/// Letters and digits that form no words.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The hash part of a ReplicaSet's name, such as `5b549b49b8`.
pub fn template_hash(template: &Value) -> String {
    let digits = fnv32a(template.to_string().as_bytes()).to_string();
    digits
        .bytes()
        .map(|digit| char::from(ALPHABET[usize::from(digit) % ALPHABET.len()]))
        .collect()
}

/// The last part of a pod's name, such as `sf5qz`.
pub fn pod_suffix(replica_set: &str, number: u64) -> String {
    let mut bits = xxh64(replica_set.as_bytes(), number);
    (0..5)
        .map(|_| {
            let letter = ALPHABET[(bits % 27) as usize];
            bits /= 27;
            char::from(letter)
        })
        .collect()
}

/// A UID in the usual shape.
pub fn uid(kind: &str, namespace: &str, name: &str) -> String {
    let text = format!("{kind}/{namespace}/{name}");
    let (high, low) = (xxh64(text.as_bytes(), 1), xxh64(text.as_bytes(), 2));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xfff,
        low >> 52,
        low & 0xffff_ffff_ffff
    )
}

fn fnv32a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_template_hash_follows_the_template_and_nothing_else() {
        let hash = template_hash(&json!({"a": 1}));
        assert_eq!(hash, template_hash(&json!({"a": 1})));
        assert_ne!(hash, template_hash(&json!({"a": 2})));
        assert!(hash.bytes().all(|b| b"456789bcdf".contains(&b)), "{hash}");
    }

    #[test]
    fn pod_suffixes_differ_by_number() {
        assert_eq!(pod_suffix("curl-5b549b49b8", 0).len(), 5);
        assert_ne!(
            pod_suffix("curl-5b549b49b8", 0),
            pod_suffix("curl-5b549b49b8", 1)
        );
    }

    #[test]
    fn a_uid_has_the_usual_shape() {
        let uid = uid("Pod", "default", "curl");
        let parts: Vec<usize> = uid.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv32a(b"a"), 0xe40c_292c);
    }
}
