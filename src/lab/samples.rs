//! The sample application's manifests, built in, so that a lab can start from anywhere.

use super::manifest::{self, ManifestError, Object};

const BOOKINFO: [(&str, &str); 8] = [
    (
        "00-namespaces.yaml",
        include_str!("../../deploy/samples/bookinfo/00-namespaces.yaml"),
    ),
    (
        "10-productpage.yaml",
        include_str!("../../deploy/samples/bookinfo/10-productpage.yaml"),
    ),
    (
        "15-curl.yaml",
        include_str!("../../deploy/samples/bookinfo/15-curl.yaml"),
    ),
    (
        "20-details.yaml",
        include_str!("../../deploy/samples/bookinfo/20-details.yaml"),
    ),
    (
        "25-gateway.yaml",
        include_str!("../../deploy/samples/bookinfo/25-gateway.yaml"),
    ),
    (
        "30-reviews.yaml",
        include_str!("../../deploy/samples/bookinfo/30-reviews.yaml"),
    ),
    (
        "35-outside.yaml",
        include_str!("../../deploy/samples/bookinfo/35-outside.yaml"),
    ),
    (
        "40-ratings.yaml",
        include_str!("../../deploy/samples/bookinfo/40-ratings.yaml"),
    ),
];
/// Only the gateway may call productpage.
pub const POLICY: &str = include_str!("../../deploy/samples/bookinfo-policy.yaml");

/// The sample application.
///
/// # Errors
/// Never, unless the files were built in broken.
pub fn bookinfo() -> Result<Vec<Object>, ManifestError> {
    let mut objects = Vec::new();
    for (file, text) in BOOKINFO {
        objects.extend(manifest::parse(file, text)?);
    }
    Ok(objects)
}

/// The policy of the demonstration.
///
/// # Errors
/// Never, unless the file was built in broken.
pub fn policy() -> Result<Vec<Object>, ManifestError> {
    manifest::parse("bookinfo-policy.yaml", POLICY)
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;

    #[test]
    fn the_sample_application_can_run_in_a_lab() {
        let objects = bookinfo().unwrap();
        let pods = plan::pods(objects.iter()).unwrap();
        assert_eq!(pods.len(), 7);
        let outside: Vec<_> = pods.iter().filter(|p| !p.captured).collect();
        assert_eq!(outside.len(), 1);
        assert_eq!(outside[0].namespace, "outside");
        assert_eq!(
            policy().unwrap()[0].key.name,
            "allow-gateway-to-productpage"
        );
    }

    #[test]
    fn every_file_of_the_sample_is_built_in() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/samples/bookinfo");
        let mut found = manifest::load(std::path::Path::new(folder)).unwrap();
        let mut built_in = bookinfo().unwrap();
        found.sort_by_key(|o| o.key.clone());
        built_in.sort_by_key(|o| o.key.clone());
        assert_eq!(found, built_in);
    }
}
