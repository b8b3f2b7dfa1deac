//! The node agent's settings: flags that are also environment variables, as the incumbent's agent names them.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use cni::eligibility::{self, Selectors};
use cni::{CaptureConfig, Ipv6Mode};

/// Arguments of `warren node-agent`. An empty value is an unset one.
#[derive(Args, Clone, Debug)]
pub struct NodeAgentArgs {
    /// The node this agent works on
    #[arg(
        long,
        env,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub node_name: String,
    /// The agent's own pod
    #[arg(
        long,
        env,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub pod_name: String,
    /// The namespace of the agent's own pod
    #[arg(
        long,
        env,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub pod_namespace: String,
    /// The namespace in which the proxy's pods are recognised
    #[arg(long, env, value_name = "NAME", default_value = "istio-system")]
    pub system_namespace: String,
    /// The DaemonSet that this agent belongs to: while it exists, an agent that ends leaves everything in place
    #[arg(long, env, value_name = "NAME", default_value = "warren-node-agent")]
    pub daemonset_name: String,
    /// Whether pods are captured; without, the agent only installs the plugin
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub ambient_enabled: String,
    /// Which pods are enrolled: a YAML list of {podSelector, namespaceSelector} [default: by istio.io/dataplane-mode]
    #[arg(
        long,
        env,
        value_name = "YAML",
        default_value = "",
        hide_default_value = true
    )]
    pub ambient_enablement_selector: String,
    /// Whether DNS queries of captured pods go to the proxy
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub ambient_dns_capture: String,
    /// Whether IPv6 is captured
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub ambient_ipv6: String,
    /// What happens to the IPv6 of captured pods when it is not captured: refuse, or pass (in clear text)
    #[arg(long, env, value_name = "WHAT", default_value = "refuse")]
    pub ambient_ipv6_off: String,
    /// Whether the rules of pods that are captured already are put right when the agent starts
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub ambient_reconcile_pod_rules_on_startup: String,
    /// Clean up at every end, whatever becomes of the DaemonSet
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub ambient_disable_safe_upgrade: String,
    /// Let the plugin ask the API server for half a minute rather than two seconds
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub enable_ambient_detection_retry: String,
    /// Namespaces that are never enrolled, between commas
    #[arg(
        long,
        env,
        value_name = "NAMES",
        default_value = "",
        hide_default_value = true
    )]
    pub exclude_namespaces: String,
    /// Use nftables itself rather than iptables
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub native_nftables: String,
    /// Route probes of pods behind branch interfaces of AWS
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub ambient_enable_aws_branch_eni_probe: String,
    /// Where the node's health probes seem to come from
    #[arg(
        long,
        env,
        value_name = "IPV4",
        default_value = "",
        hide_default_value = true
    )]
    pub host_probe_snat_ip: String,
    /// The same for IPv6
    #[arg(
        long,
        env,
        value_name = "IPV6",
        default_value = "",
        hide_default_value = true
    )]
    pub host_probe_snat_ipv6: String,
    /// Whether the node's network namespace is that of the node's first process, rather than the agent's own
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub allow_switch_to_host_ns: String,
    /// Where the node's file system is mounted: its /proc, /var/run/netns, /opt/cni/bin and /etc/cni/net.d
    #[arg(long, env, value_name = "DIR", default_value = "/host")]
    pub host_root: PathBuf,
    /// The folder of the CNI configuration
    #[arg(long, env, value_name = "DIR", default_value = "/host/etc/cni/net.d")]
    pub mounted_cni_net_dir: PathBuf,
    /// The folder that the plugin is installed into
    #[arg(long, env, value_name = "DIR", default_value = "/host/opt/cni/bin")]
    pub mounted_cni_bin_dir: PathBuf,
    /// The folder that the plugin is installed from
    #[arg(long, env, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_source_dir: PathBuf,
    /// The folder of the agent's sockets and of the plugin's kubeconfig, by the same path here and on the node
    #[arg(long, env, value_name = "DIR", default_value = "/var/run/istio-cni")]
    pub cni_agent_run_dir: PathBuf,
    /// The socket that proxies connect to
    #[arg(
        long,
        env,
        value_name = "PATH",
        default_value = "/var/run/ztunnel/ztunnel.sock"
    )]
    pub ztunnel_uds_address: PathBuf,
    /// Install the plugin; without, pods are captured when they are seen to run
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub install_plugin: String,
    /// Put the plugin behind the others of the node's CNI configuration, rather than alone into a file of its own
    #[arg(long, env, value_name = "BOOL", default_value = "true")]
    pub chained_cni_plugin: String,
    /// The file of the node's CNI configuration [default: the first one that is valid]
    #[arg(
        long,
        env,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub cni_conf_name: String,
    /// Leave the node's CNI configuration alone and write a copy with the plugin in it, which sorts first
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub istio_owned_cni_config: String,
    /// The name of that copy
    #[arg(
        long,
        env,
        value_name = "NAME",
        default_value = "02-istio-cni.conflist"
    )]
    pub istio_owned_cni_config_filename: String,
    /// Let the group read the CNI configuration
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub cni_conf_group_read: String,
    /// The mode of the plugin's kubeconfig, in octal
    #[arg(long, env, value_name = "MODE", default_value = "0600")]
    pub kubeconfig_mode: String,
    /// The certificates by which the plugin knows the API server [default: ca.crt of the service account]
    #[arg(
        long,
        env,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    pub kube_ca_file: String,
    /// Let the plugin take any certificate of the API server
    #[arg(long, env, value_name = "BOOL", default_value = "false")]
    pub skip_tls_verify: String,
    /// The folder of the service account's token and ca.crt
    #[arg(
        long,
        env,
        value_name = "DIR",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount"
    )]
    pub service_account_dir: PathBuf,
    /// How much the plugin logs: debug, info, warn or error
    #[arg(long, env, value_name = "LEVEL", default_value = "info")]
    pub plugin_log_level: String,
    /// How often all captured pods are looked at, in seconds
    #[arg(long, env, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub capture_check_interval: u64,
    /// Where metrics are served; 0 or less: nowhere
    #[arg(
        long,
        env,
        value_name = "PORT",
        default_value = "15014",
        allow_negative_numbers = true
    )]
    pub monitoring_port: i32,
    /// Where health is served
    #[arg(long, env, value_name = "PORT", default_value = "8000")]
    pub health_port: u16,
}

/// The settings, understood.
#[derive(Clone, Debug)]
pub struct Settings {
    pub arguments: NodeAgentArgs,
    pub ambient: bool,
    pub selectors: Selectors,
    pub excluded: Vec<String>,
    /// What is captured of a pod that does not ask for anything else.
    pub capture: CaptureConfig,
    pub native_nftables: bool,
    pub branch_eni: bool,
    pub reconcile: bool,
    pub always_clean: bool,
    pub plugin_retries: bool,
    pub install: bool,
    pub chained: bool,
    pub owned: Option<String>,
    pub group_read: bool,
    pub kubeconfig_mode: u32,
    pub skip_tls_verify: bool,
    /// The network namespace of the node.
    pub host_netns: PathBuf,
    /// The node's processes.
    pub proc: PathBuf,
}

impl Settings {
    /// Understands the arguments.
    ///
    /// # Errors
    /// Which one cannot be understood, and what it should be.
    pub fn new(arguments: NodeAgentArgs) -> anyhow::Result<Self> {
        let a = &arguments;
        if a.node_name.is_empty() {
            bail!(
                "NODE_NAME is not set: it must name the node that this agent works on (spec.nodeName of its pod)"
            );
        }
        let selectors = match a.ambient_enablement_selector.trim() {
            "" => Selectors::default(),
            text => Selectors::parse(text).map_err(anyhow::Error::msg).context(
                "AMBIENT_ENABLEMENT_SELECTOR is not a list of {podSelector, namespaceSelector}",
            )?,
        };
        let defaults = CaptureConfig::default();
        let ipv6 = match (
            boolean("AMBIENT_IPV6", &a.ambient_ipv6, true)?,
            a.ambient_ipv6_off.as_str(),
        ) {
            (_, other) if !["", "refuse", "pass"].contains(&other) => {
                bail!("AMBIENT_IPV6_OFF={other} is not known; use refuse or pass")
            }
            (true, _) => Ipv6Mode::Capture,
            (false, "pass") => Ipv6Mode::Pass,
            (false, _) => Ipv6Mode::Refuse,
        };
        let capture = CaptureConfig {
            dns: boolean("AMBIENT_DNS_CAPTURE", &a.ambient_dns_capture, true)?,
            ipv6,
            probe_v4: address(
                "HOST_PROBE_SNAT_IP",
                &a.host_probe_snat_ip,
                defaults.probe_v4,
            )?,
            probe_v6: address(
                "HOST_PROBE_SNAT_IPV6",
                &a.host_probe_snat_ipv6,
                defaults.probe_v6,
            )?,
            ..defaults
        };
        if !capture.probe_v4.is_link_local() {
            tracing::warn!(
                "HOST_PROBE_SNAT_IP={} is outside 169.254.0.0/16: answers to probes may be routed away",
                capture.probe_v4
            );
        }
        let owned = boolean("ISTIO_OWNED_CNI_CONFIG", &a.istio_owned_cni_config, false)?;
        let switch = boolean("ALLOW_SWITCH_TO_HOST_NS", &a.allow_switch_to_host_ns, false)?;
        let proc = under(&a.host_root, Path::new("/proc"));
        let mode = a.kubeconfig_mode.trim_start_matches("0o");
        Ok(Self {
            ambient: boolean("AMBIENT_ENABLED", &a.ambient_enabled, true)?,
            selectors,
            excluded: eligibility::names(&a.exclude_namespaces),
            capture,
            native_nftables: boolean("NATIVE_NFTABLES", &a.native_nftables, false)?,
            branch_eni: boolean(
                "AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE",
                &a.ambient_enable_aws_branch_eni_probe,
                true,
            )?,
            reconcile: boolean(
                "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP",
                &a.ambient_reconcile_pod_rules_on_startup,
                true,
            )?,
            always_clean: boolean(
                "AMBIENT_DISABLE_SAFE_UPGRADE",
                &a.ambient_disable_safe_upgrade,
                false,
            )?,
            plugin_retries: boolean(
                "ENABLE_AMBIENT_DETECTION_RETRY",
                &a.enable_ambient_detection_retry,
                false,
            )?,
            install: boolean("INSTALL_PLUGIN", &a.install_plugin, true)?,
            chained: boolean("CHAINED_CNI_PLUGIN", &a.chained_cni_plugin, true)?,
            owned: owned.then(|| a.istio_owned_cni_config_filename.clone()),
            group_read: boolean("CNI_CONF_GROUP_READ", &a.cni_conf_group_read, false)?,
            kubeconfig_mode: u32::from_str_radix(mode, 8)
                .ok()
                .filter(|mode| *mode <= 0o777)
                .with_context(|| {
                    format!("KUBECONFIG_MODE={mode} is not an octal mode such as 0600")
                })?,
            skip_tls_verify: boolean("SKIP_TLS_VERIFY", &a.skip_tls_verify, false)?,
            host_netns: match switch {
                true => proc.join("1/ns/net"),
                false => "/proc/self/ns/net".into(),
            },
            proc,
            arguments,
        })
    }

    /// A path of the node's, as it is mounted here.
    pub fn on_host(&self, path: &Path) -> PathBuf {
        under(&self.arguments.host_root, path)
    }
}

fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn boolean(name: &str, text: &str, default: bool) -> anyhow::Result<bool> {
    match text {
        "" => Ok(default),
        text => eligibility::switch(text)
            .with_context(|| format!("{name}={text} is not understood; use true or false")),
    }
}

fn address<T: std::str::FromStr>(name: &str, text: &str, default: T) -> anyhow::Result<T> {
    match text {
        "" => Ok(default),
        text => text
            .parse()
            .map_err(|_| anyhow::anyhow!("{name}={text} is not an address of the right family")),
    }
}

/// The pod's own wishes, in its annotations; what cannot be understood is told of and left out.
pub fn with_wishes(
    config: &CaptureConfig,
    annotations: &eligibility::Map,
    pod: &str,
) -> CaptureConfig {
    let switch = |name: &str| {
        let text = annotations.get(name)?;
        let value = eligibility::switch(text);
        if value.is_none() {
            tracing::warn!("the annotation {name} of {pod} is neither true nor false: {text:?}");
        }
        value
    };
    let mut config = config.clone();
    if let Some(dns) = switch("ambient.istio.io/dns-capture") {
        config.dns = dns;
    }
    if let Some(bypass) = switch("ambient.istio.io/bypass-inbound-capture") {
        config.bypass_inbound = bypass;
    }
    if let Some(interfaces) = annotations.get("istio.io/reroute-virtual-interfaces") {
        config.virtual_interfaces = eligibility::names(interfaces);
    }
    config
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: NodeAgentArgs,
    }

    fn settings(arguments: &[&str]) -> anyhow::Result<Settings> {
        let line = ["agent", "--node-name", "n"].iter().chain(arguments);
        Settings::new(Line::try_parse_from(line)?.arguments)
    }

    #[test]
    fn defaults_capture_everything_and_leave_nothing_open() {
        let settings = settings(&[]).unwrap();
        assert!(settings.ambient && settings.reconcile && settings.install && settings.chained);
        assert_eq!(settings.capture, CaptureConfig::default());
        assert_eq!(settings.host_netns, Path::new("/proc/self/ns/net"));
        assert_eq!(
            settings.on_host(Path::new("/var/run/netns/a")),
            Path::new("/host/var/run/netns/a")
        );
        assert_eq!(settings.kubeconfig_mode, 0o600);
    }

    #[test]
    fn empty_values_are_unset_and_wrong_ones_are_named() {
        assert!(settings(&["--ambient-ipv6", ""]).is_ok());
        for (flag, value, part) in [
            ("--ambient-ipv6", "maybe", "AMBIENT_IPV6=maybe"),
            ("--ambient-ipv6-off", "drop", "use refuse or pass"),
            (
                "--host-probe-snat-ip",
                "fd00::1",
                "HOST_PROBE_SNAT_IP=fd00::1",
            ),
            ("--kubeconfig-mode", "rw", "KUBECONFIG_MODE"),
            (
                "--ambient-enablement-selector",
                "podSelector: 1",
                "AMBIENT_ENABLEMENT_SELECTOR",
            ),
            ("--node-name", "", "NODE_NAME"),
        ] {
            let error = Line::try_parse_from(["agent", flag, value].iter().chain(match flag {
                "--node-name" => &[][..],
                _ => &["--node-name", "n"][..],
            }))
            .map_err(anyhow::Error::from)
            .and_then(|line| Settings::new(line.arguments));
            let error = format!("{:#}", error.unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn without_capture_ipv6_is_refused_unless_told_otherwise() {
        let mode = |arguments: &[&str]| settings(arguments).unwrap().capture.ipv6;
        assert_eq!(mode(&["--ambient-ipv6", "false"]), Ipv6Mode::Refuse);
        assert_eq!(
            mode(&["--ambient-ipv6=false", "--ambient-ipv6-off=pass"]),
            Ipv6Mode::Pass
        );
    }

    #[test]
    fn annotations_change_what_is_captured() {
        let with = |name: &str, value: &str| {
            let annotations = [(name.to_string(), value.to_string())]
                .into_iter()
                .collect();
            with_wishes(&CaptureConfig::default(), &annotations, "p")
        };
        assert!(!with("ambient.istio.io/dns-capture", "False").dns);
        assert!(with("ambient.istio.io/dns-capture", "nonsense").dns);
        let off = CaptureConfig {
            dns: false,
            ..CaptureConfig::default()
        };
        let asks = [("ambient.istio.io/dns-capture".into(), "true".into())];
        assert!(with_wishes(&off, &asks.into_iter().collect(), "p").dns);
        assert!(with("ambient.istio.io/bypass-inbound-capture", "1").bypass_inbound);
        let interfaces = with("istio.io/reroute-virtual-interfaces", "a, ,b").virtual_interfaces;
        assert_eq!(interfaces, ["a", "b"]);
    }
}
