//! The one container image of the tests, made of this machine's static busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

/// The image's name; it serves as every pod's pause container, too.
pub const IMAGE: &str = "localhost/warren/busybox:test";

/// Writes an archive as `docker save` would, in that folder; gives its path.
pub fn archive(folder: &Path) -> PathBuf {
    let (image, root) = (folder.join("image"), folder.join("image/root"));
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(BUSYBOX, bin.join("busybox")).unwrap();
    let applets = output(Command::new(BUSYBOX).arg("--list"));
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", bin.join(applet)).unwrap();
    }
    let layer = image.join("layer.tar");
    tar(&root, &layer, &["."]);
    let digest = output(Command::new("sha256sum").arg(&layer));
    let digest = digest.split_whitespace().next().unwrap();
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    fs::write(image.join("config.json"), config.to_string()).unwrap();
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    fs::write(image.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = folder.join("image.tar");
    tar(
        &image,
        &archive,
        &["manifest.json", "config.json", "layer.tar"],
    );
    fs::remove_dir_all(image).unwrap();
    archive
}

/// The static busybox.
pub const BUSYBOX: &str = "/bin/busybox";

/// As images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn tar(folder: &Path, archive: &Path, members: &[&str]) {
    let mut command = Command::new("tar");
    command.args(["--owner=0", "--group=0", "-cf"]).arg(archive);
    output(command.arg("-C").arg(folder).args(members));
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
