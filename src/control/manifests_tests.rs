//! Folders good and bad.

use super::*;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("wrn-manifests-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.join(name), text).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: a}\nspec:\n  ports: [{port: 80}]\n";

fn load(manifests: &mut Manifests) -> (Objects, Vec<String>) {
    let loaded = manifests.load();
    (loaded.objects, loaded.errors)
}

#[test]
fn a_bad_document_is_named_and_the_files_last_good_version_stays() {
    let folder = Folder::new("bad");
    folder.write("a.yaml", SERVICE);
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n";
    folder.write("b.yaml", namespace);
    let mut manifests = Manifests::new(folder.0.clone());
    let (objects, errors) = load(&mut manifests);
    assert_eq!((objects.services.len(), objects.namespaces.len()), (1, 1));
    assert_eq!(errors, Vec::<String>::new());
    let eighty = SERVICE.replace("port: 80", "port: eighty");
    folder.write("a.yaml", &format!("{SERVICE}---\n{eighty}"));
    let (objects, errors) = load(&mut manifests);
    assert_eq!((objects.services.len(), errors.len()), (1, 1));
    assert!(
        errors[0].starts_with("a.yaml: document 2: Service web: spec.ports[0].port: invalid"),
        "{errors:?}"
    );
    folder.write("a.yaml", "apiVersion: v1\nkind: Service\n");
    let (objects, errors) = load(&mut manifests);
    assert_eq!(objects.services.len(), 1);
    assert_eq!(
        errors,
        [
            "a.yaml: document 1: Service: metadata.name: is missing; the file's last good version stays in force"
        ]
    );
    std::fs::remove_file(folder.0.join("a.yaml")).unwrap();
    let (objects, errors) = load(&mut manifests);
    assert_eq!((objects.services.len(), errors.len()), (0, 0));
}

#[test]
fn a_file_that_was_never_good_is_left_out_whole() {
    let folder = Folder::new("never");
    folder.write("a.yaml", &format!("{SERVICE}---\n{{ not: yaml\n"));
    folder.write(
        "b.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n",
    );
    let (objects, errors) = load(&mut Manifests::new(folder.0.clone()));
    assert_eq!(
        (
            objects.services.len(),
            objects.namespaces.len(),
            errors.len()
        ),
        (0, 1, 1)
    );
    assert!(errors[0].starts_with("a.yaml: document 2: "), "{errors:?}");
    assert!(
        errors[0].ends_with("; nothing of the file is in force"),
        "{errors:?}"
    );
}

#[test]
fn what_is_unknown_is_skipped_and_what_is_double_is_told() {
    let folder = Folder::new("double");
    folder.write(
        "a.yaml",
        &format!("{SERVICE}---\n\n---\n{SERVICE}---\napiVersion: x/v1\nkind: Foo\nmetadata: {{name: f}}\n"),
    );
    let loaded = Manifests::new(folder.0.clone()).load();
    assert_eq!((loaded.objects.services.len(), loaded.errors.len()), (1, 0));
    assert_eq!(
        loaded.warnings,
        ["a.yaml: Service a/web is there twice; the first one counts"]
    );
}

#[test]
fn lists_json_and_fields_that_are_null_are_read() {
    let folder = Folder::new("list");
    folder.write(
        "a.json",
        r#"{"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": null, "creationTimestamp": null}},
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}}]}"#,
    );
    let mut manifests = Manifests::new(folder.0.clone());
    let (objects, errors) = load(&mut manifests);
    assert_eq!(errors, Vec::<String>::new());
    assert_eq!((objects.namespaces.len(), objects.nodes.len()), (1, 1));
    folder.write(
        "a.json",
        r#"{"apiVersion": "v1", "kind": "List", "items": [{"kind": "Node"}]}"#,
    );
    let (_, errors) = load(&mut manifests);
    assert!(
        errors[0].starts_with("a.json: document 1: items[0]: apiVersion: is missing"),
        "{errors:?}"
    );
}

#[test]
fn folders_below_are_read_once_and_hidden_ones_never() {
    let folder = Folder::new("below");
    for name in ["sub", ".hidden"] {
        std::fs::create_dir_all(folder.0.join(name)).unwrap();
        folder.write(&format!("{name}/a.yml"), SERVICE);
    }
    folder.write("a.txt", "not a manifest");
    std::os::unix::fs::symlink("..", folder.0.join("sub/circle")).unwrap();
    let loaded = Manifests::new(folder.0.clone()).load();
    assert_eq!(
        (
            loaded.objects.services.len(),
            loaded.errors,
            loaded.warnings
        ),
        (1, vec![], vec![])
    );
}

#[test]
fn a_value_that_would_not_mean_what_it_says_is_refused() {
    let folder = Folder::new("value");
    let cases = [
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            "{rules: [{to: [{operation: {ports: [http]}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]: \"http\" is not a port number",
        ),
        (
            "security.istio.io/v1beta1",
            "AuthorizationPolicy",
            "{selectors: {matchLabels: {a: b}}}",
            "spec: unknown field `selectors`",
        ),
        (
            "security.istio.io/v1",
            "PeerAuthentication",
            "{mtls: {mode: SRTICT}}",
            "spec.mtls.mode: unknown variant `SRTICT`",
        ),
        (
            "v1",
            "Service",
            "{clusterIP: 10.0.0.256}",
            "spec.clusterIP: \"10.0.0.256\" is not an IP address",
        ),
    ];
    for (group, kind, spec, reason) in cases {
        folder.write(
            "a.yaml",
            &format!("apiVersion: {group}\nkind: {kind}\nmetadata: {{name: p, namespace: a}}\nspec: {spec}\n"),
        );
        let (objects, errors) = load(&mut Manifests::new(folder.0.clone()));
        assert_eq!(objects, Objects::default());
        let wanted = format!("a.yaml: document 1: {kind} p: {reason}");
        assert!(errors[0].starts_with(&wanted), "{errors:?}");
    }
    folder.write(
        "a.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIPs: [{ip: x}]}\n",
    );
    let (_, errors) = load(&mut Manifests::new(folder.0.clone()));
    assert!(
        errors[0].starts_with("a.yaml: document 1: Pod p: status.podIPs[0].ip: \"x\" is not"),
        "{errors:?}"
    );
}
