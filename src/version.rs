//! What this build is.

/// The package version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The facts of a build, in the order they are printed.
pub fn facts() -> [(&'static str, String); 7] {
    [
        ("Version", VERSION.to_string()),
        (
            "GitRevision",
            option_env!("WARREN_GIT_REVISION")
                .unwrap_or("unknown")
                .to_string(),
        ),
        (
            "RustVersion",
            option_env!("WARREN_RUST_VERSION")
                .unwrap_or("unknown")
                .to_string(),
        ),
        (
            "BuildProfile",
            if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            }
            .to_string(),
        ),
        (
            "BuildStatus",
            option_env!("WARREN_BUILD_STATUS")
                .unwrap_or("unknown")
                .to_string(),
        ),
        (
            "IstioVersion",
            std::env::var("ISTIO_META_ISTIO_VERSION").unwrap_or_else(|_| "unknown".to_string()),
        ),
        ("CryptoProvider", "tls-aws-lc".to_string()),
    ]
}

/// One line that names the build.
pub fn build_info() -> String {
    let fields: Vec<String> = facts().iter().map(|(k, v)| format!("{k}:{v:?}")).collect();
    format!("version.BuildInfo{{{}}}", fields.join(", "))
}

/// The same as the configuration dump shows it.
pub fn dump() -> serde_json::Value {
    facts()
        .into_iter()
        .map(|(key, value)| {
            let mut name = key.to_string();
            name[..1].make_ascii_lowercase();
            (name, serde_json::Value::String(value))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}
