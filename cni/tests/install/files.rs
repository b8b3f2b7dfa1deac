//! Programs and the kubeconfig.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use cni::install::{Drift, FileError, InstallError, KubeconfigError, Trust};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::node::{CA, Node, TOKEN};

#[test]
fn every_regular_file_of_the_image_reaches_every_folder_with_its_mode() {
    let node = Node::with_network("programs");
    fs::write(node.path("image/helper"), "h").unwrap();
    fs::set_permissions(node.path("image/helper"), Permissions::from_mode(0o710)).unwrap();
    fs::create_dir(node.path("image/folder")).unwrap();
    fs::write(node.path("bin/bridge"), "theirs").unwrap();
    node.installed();
    for folder in ["bin", "bin2"] {
        let program = format!("{folder}/warren-cni");
        assert_eq!(node.text(&program), node.text("image/warren-cni"));
        assert_eq!(node.mode(&program), 0o755);
        assert_eq!(node.mode(&format!("{folder}/helper")), 0o710);
    }
    assert_eq!(node.names("bin"), ["bridge", "helper", "warren-cni"]);
}

#[test]
fn what_is_in_place_is_not_written_again() {
    let node = Node::with_network("again");
    let mut installer = node.installed();
    let files = [
        "bin/warren-cni",
        "run/istio-cni-kubeconfig",
        "net.d/10-calico.conflist",
    ];
    let before = files.map(|file| node.inode(file));
    let again = installer.install(TOKEN).unwrap();
    assert!(again.written.is_empty(), "{:?}", again.written);
    assert_eq!(files.map(|file| node.inode(file)), before);
}

#[test]
fn a_program_that_was_replaced_changed_or_removed_is_noticed_and_put_back() {
    let node = Node::with_network("program-drift");
    let mut installer = node.installed();
    let (program, original) = (node.path("bin2/warren-cni"), node.text("image/warren-cni"));
    let same_length = original.replace("exit 0", "exit 1");
    let damages: [&dyn Fn(); 5] = [
        &|| fs::write(&program, &same_length).unwrap(),
        &|| fs::write(&program, "").unwrap(),
        &|| fs::set_permissions(&program, Permissions::from_mode(0o644)).unwrap(),
        &|| fs::remove_file(&program).unwrap(),
        &|| {
            fs::remove_file(&program).unwrap();
            std::os::unix::fs::symlink(node.path("image/warren-cni"), &program).unwrap();
        },
    ];
    for (number, damage) in damages.iter().enumerate() {
        damage();
        let drift = installer.check().unwrap_err();
        let expected = match number {
            3 => matches!(&drift, Drift::ProgramMissing(path) if *path == program),
            _ => matches!(&drift, Drift::ProgramChanged(path) if *path == program),
        };
        assert!(expected, "{number}: {drift}");
        installer.install(TOKEN).unwrap();
        installer.check().unwrap();
        assert_eq!(node.text("bin2/warren-cni"), original);
    }
}

#[test]
fn a_program_that_runs_is_replaced_and_runs_on() {
    let node = Node::with_network("busy");
    let program = node.path("bin/warren-cni");
    fs::copy("/bin/sleep", &program).unwrap();
    let mut running = Command::new(&program)
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let result = node.installer().install(TOKEN);
    let still_there = running.try_wait().unwrap().is_none();
    running.kill().unwrap();
    running.wait().unwrap();
    result.unwrap();
    assert!(still_there);
    assert_eq!(node.text("bin/warren-cni"), node.text("image/warren-cni"));
}

#[test]
fn an_image_without_the_plugin_and_a_missing_folder_are_told_apart() {
    let mut node = Node::with_network("no-programs");
    node.config.bin_targets.push(node.path("nowhere"));
    let error = node.installer().install(TOKEN).unwrap_err();
    assert!(
        matches!(&error, InstallError::Binaries(FileError::NoFolder(path)) if *path == node.path("nowhere"))
    );
    assert!(error.is_waiting());
    fs::remove_file(node.path("image/warren-cni")).unwrap();
    let error = node.installer().install(TOKEN).unwrap_err();
    assert!(matches!(
        error,
        InstallError::Binaries(FileError::NoProgram { .. })
    ));
    assert_eq!(
        (error.result(), error.is_waiting()),
        ("COPY_BINARIES_FAILURE", false)
    );
}

#[test]
fn a_read_only_folder_brings_the_hint_at_the_platform() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: it needs root");
        return;
    }
    let node = Node::with_network("read-only");
    let (target, mut installer) = (node.path("bin"), node.installer());
    let none = None::<&str>;
    // The mount is this thread's alone and goes with it.
    let attempt = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(
            Some("tmpfs"),
            &target,
            Some("tmpfs"),
            MsFlags::MS_RDONLY,
            none,
        )
        .unwrap();
        installer.install(TOKEN).unwrap_err()
    });
    let error = attempt.join().unwrap();
    assert_eq!(error.result(), "COPY_BINARIES_FAILURE");
    assert!(error.to_string().contains("global.platform"), "{error}");
}

#[test]
fn the_kubeconfig_is_what_kubernetes_clients_read() {
    let node = Node::with_network("kubeconfig");
    node.installed();
    let expected = "\
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCkFBQUEKLS0tLS1FTkQgQ0VSVElGSUNBVEUtLS0tLQo=
    server: https://[fd00::1]:443
  name: local
contexts:
- context:
    cluster: local
    user: istio-cni
  name: istio-cni-context
current-context: istio-cni-context
kind: Config
users:
- name: istio-cni
  user:
    token: first-token
";
    assert_eq!(node.text("run/istio-cni-kubeconfig"), expected);
    assert_eq!(node.mode("run/istio-cni-kubeconfig"), 0o600);
}

#[test]
fn without_verification_the_kubeconfig_names_no_certificate() {
    let mut node = Node::with_network("skip-verify");
    node.config.kubeconfig.trust = Trust::Nothing;
    node.config.kubeconfig.mode = 0o640;
    fs::remove_dir_all(node.path("account")).unwrap();
    node.installed();
    let text = node.text("run/istio-cni-kubeconfig");
    assert!(text.contains("insecure-skip-tls-verify: true"), "{text}");
    assert!(!text.contains("certificate-authority"), "{text}");
    assert_eq!(node.mode("run/istio-cni-kubeconfig"), 0o640);
}

#[test]
fn the_kubeconfig_follows_the_token_the_certificates_and_whoever_touches_it() {
    let node = Node::with_network("kubeconfig-drift");
    let mut installer = node.installed();
    let path = node.path("run/istio-cni-kubeconfig");
    let stale = |installer: &cni::install::Installer| {
        let drift = installer.check().unwrap_err();
        assert!(matches!(drift, Drift::Kubeconfig(_)), "{drift}");
    };
    let written = installer.install("second-token\n").unwrap().written;
    assert_eq!(written, std::slice::from_ref(&path));
    assert!(
        node.text("run/istio-cni-kubeconfig")
            .ends_with("token: second-token\n")
    );
    fs::write(node.path("account/ca.crt"), CA.replace("AAAA", "BBBB")).unwrap();
    stale(&installer);
    installer.install("second-token").unwrap();
    let damages: [&dyn Fn(); 2] = [&|| fs::remove_file(&path).unwrap(), &|| {
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    }];
    for damage in damages {
        damage();
        stale(&installer);
        installer.install("second-token").unwrap();
        installer.check().unwrap();
    }
}

#[test]
fn without_a_token_or_a_certificate_there_is_no_kubeconfig_and_no_entry() {
    let node = Node::with_network("no-token");
    let before = node.text("net.d/10-calico.conflist");
    let error = node.installer().install(" \n").unwrap_err();
    assert!(matches!(
        error,
        InstallError::Kubeconfig(KubeconfigError::NoToken)
    ));
    assert!(error.is_waiting());
    fs::write(node.path("account/ca.crt"), "nothing").unwrap();
    let error = node.installer().install(TOKEN).unwrap_err();
    assert!(matches!(
        error,
        InstallError::Kubeconfig(KubeconfigError::NoCertificate(_))
    ));
    assert_eq!(error.result(), "CREATE_KUBECONFIG_FAILURE");
    assert!(!error.to_string().contains(TOKEN));
    assert!(node.names("run").is_empty());
    assert_eq!(node.text("net.d/10-calico.conflist"), before);
}

#[test]
fn a_run_folder_that_is_missing_is_made() {
    let node = Node::with_network("run-dir");
    fs::remove_dir(node.path("run")).unwrap();
    node.installed();
    assert_eq!(node.names("run"), ["istio-cni-kubeconfig"]);
}

#[test]
fn what_killed_runs_left_is_swept_and_nothing_is_left_behind() {
    let node = Node::with_network("leftovers");
    for name in [
        "bin/warren-cni.tmp.warren-1",
        "bin2/helper.tmp.warren-4711",
        "net.d/05-old.conflist.tmp.warren-9",
        "run/istio-cni-kubeconfig.tmp.warren-123456",
    ] {
        fs::write(node.path(name), "half").unwrap();
    }
    node.installed();
    assert!(node.unfinished().is_empty(), "{:?}", node.unfinished());
}
