//! The CNI plugin `warren-cni`: a pod of the mesh starts only when the node agent has captured it (`node-agent.md` §1.2).
//!
//! It is run by the container runtime, once for every sandbox that is made, after the plugins of the cluster's network.
//! Whether a pod is enrolled is asked of the API server and, if that is out of reach, of the agent. What is enrolled fails
//! as long as nobody captures it; what is not is never held up.

mod agent;
mod api;
mod exchange;
mod input;
mod log;
mod outcome;
mod trust;
mod version;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use agent::Agent;
use api::ApiServer;
use input::{Call, Command, Config, Pod};
use log::{Level, Log};
use outcome::{Failure, code};
use version::Version;

use crate::eligibility::Candidate;
use crate::event::{self, AddRequest};
use crate::install::PLUGIN;

/// How often the API server is asked at most: usually, and where pods wait for it (`ENABLE_AMBIENT_DETECTION_RETRY`).
const TRIES: usize = 2;
const PATIENT_TRIES: usize = 31;
const PAUSE: Duration = Duration::from_secs(1);
/// The most that is read of a configuration, in bytes.
const CONFIG: u64 = 16 << 20;

/// Answers one call of a container runtime.
pub fn main() -> ExitCode {
    let variables: HashMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if !variables.contains_key("CNI_COMMAND") {
        return about(&arguments);
    }
    let mut text = Vec::new();
    let read = io::stdin().lock().take(CONFIG).read_to_end(&mut text);
    let mut log = Log::new(variables.get("CNI_COMMAND").map_or("", String::as_str));
    let mut version = Version::LATEST;
    let answered = read
        .map_err(|error| {
            let text = "the configuration cannot be read from standard input";
            Failure::new(code::DECODE, text).because(error)
        })
        .and_then(|_| answer(&variables, &text, &mut version, &mut log));
    let (text, exit) = match answered {
        Ok(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Ok(None) => (String::new(), ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(version).to_string(), ExitCode::FAILURE),
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => exit,
        Err(_) => ExitCode::FAILURE,
    }
}

/// For people who call the plugin by hand.
fn about(arguments: &[String]) -> ExitCode {
    let versions = Version::ALL.map(Version::name).join(", ");
    let text = format!(
        "{PLUGIN} {}: holds a pod of the mesh until the node agent has captured its traffic.\n\
         Container runtimes call it as a CNI plugin (CNI_COMMAND in the environment); `warren node-agent` installs it.\n\
         Versions of CNI: {versions}",
        env!("CARGO_PKG_VERSION")
    );
    let asked = |names: [&str; 2]| {
        arguments
            .iter()
            .any(|argument| names.contains(&argument.as_str()))
    };
    if asked(["--help", "-h"]) || asked(["--version", "-V"]) {
        println!("{text}");
        return ExitCode::SUCCESS;
    }
    eprintln!("{text}");
    ExitCode::FAILURE
}

/// What goes to standard output, if anything.
fn answer(
    variables: &HashMap<String, String>,
    text: &[u8],
    version: &mut Version,
    log: &mut Log,
) -> Result<Option<Value>, Failure> {
    let call = Call::read(variables)?;
    match call.command {
        Command::Version => return Ok(Some(outcome::versions())),
        // Nothing of this plugin is undone here, and a pod must always be able to end.
        Command::Del => return Ok(None),
        _ => {}
    }
    let config = Config::read(text)?;
    *version = config.version()?;
    let least = match call.command {
        Command::Check => Version::V0_4_0,
        Command::Gc | Command::Status => Version::V1_1_0,
        _ => Version::V0_1_0,
    };
    if *version < least {
        let text = format!("config version does not allow {}", variables["CNI_COMMAND"]);
        let details = format!(
            "it needs {}, and cniVersion is {}",
            least.name(),
            version.name()
        );
        return Err(Failure::new(code::VERSION, text).because(details));
    }
    if matches!(call.command, Command::Gc | Command::Status) {
        // Nothing is kept per attachment. And without an agent the node still starts all pods but those of the mesh.
        return Ok(None);
    }
    log.keep_in(&config.cni_agent_run_dir, &config.plugin_log_level);
    let pod = call.pod()?;
    if pod.is_named() {
        log.about("pod", &format!("{}/{}", pod.namespace, pod.name));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(code::TRY_AGAIN, "cannot start a thread").because(error))?;
    runtime.block_on(async {
        let done = match call.command {
            Command::Check => check(&call, &config, &pod, log).await.map(|()| None),
            _ => add(&call, &config, &pod, log)
                .await
                .and_then(|()| outcome::result(config.previous.as_ref(), *version))
                .map(Some),
        };
        if let Err(failure) = &done {
            log.write(Level::Error, &failure.to_string());
        }
        log.flush().await;
        done
    })
}

async fn add(call: &Call, config: &Config, pod: &Pod, log: &Log) -> Result<(), Failure> {
    let agent = Agent {
        run_dir: &config.cni_agent_run_dir,
    };
    let assigned = outcome::addresses(config.previous.as_ref());
    let request = AddRequest {
        netns: call.netns.display().to_string(),
        pod_name: pod.name.clone(),
        pod_namespace: pod.namespace.clone(),
        ips: assigned.iter().map(|ip| ip.address.addr()).collect(),
    };
    match verdict(config, pod, log).await? {
        Verdict::Enrolled(reason) => {
            refuse_own_namespace(&call.netns)?;
            agent.add(&request, &assigned).await?;
            log.write(Level::Info, &format!("captured: {reason}"));
        }
        Verdict::Outside(reason) => {
            if let Err(error) = agent.note(&request, &assigned).await {
                log.write(
                    Level::Debug,
                    &format!("the agent does not note the pod: {error}"),
                );
            }
            log.write(Level::Debug, &format!("left alone: {reason}"));
        }
        Verdict::Free(reason) => log.write(Level::Debug, &format!("left alone: {reason}")),
    }
    Ok(())
}

async fn check(call: &Call, config: &Config, pod: &Pod, log: &Log) -> Result<(), Failure> {
    if !matches!(verdict(config, pod, log).await?, Verdict::Enrolled(_)) {
        return Ok(());
    }
    let assigned = outcome::addresses(config.previous.as_ref());
    let request = AddRequest {
        netns: call.netns.display().to_string(),
        pod_name: pod.name.clone(),
        pod_namespace: pod.namespace.clone(),
        ips: assigned.iter().map(|ip| ip.address.addr()).collect(),
    };
    let agent = Agent {
        run_dir: &config.cni_agent_run_dir,
    };
    agent.check(&request, &assigned).await
}

/// Whether a pod is held until it is captured, and why.
enum Verdict {
    Enrolled(String),
    /// Not enrolled, and may be one day.
    Outside(String),
    /// None of the agent's business.
    Free(&'static str),
}

async fn verdict(config: &Config, pod: &Pod, log: &Log) -> Result<Verdict, Failure> {
    if config.is_agent(pod) {
        return Ok(Verdict::Free("it is the agent itself"));
    }
    if !pod.is_named() {
        return Ok(Verdict::Free("it is no pod of Kubernetes"));
    }
    if config.excludes(&pod.namespace) {
        return Ok(Verdict::Free("its namespace is excluded"));
    }
    if !config.ambient_enabled {
        return Ok(Verdict::Free("capture is off"));
    }
    let of_api = match of_api_server(config, pod, log).await {
        Ok(verdict) => return Ok(verdict),
        Err(error) => error,
    };
    log.write(
        Level::Warn,
        &format!("the API server cannot be asked: {of_api}"),
    );
    let agent = Agent {
        run_dir: &config.cni_agent_run_dir,
    };
    match agent.decide(pod).await {
        Ok(decision) if decision.enrolled => Ok(Verdict::Enrolled(decision.reason)),
        Ok(decision) => Ok(Verdict::Outside(decision.reason)),
        Err(of_agent) => {
            let text = "neither the API server nor the node agent can tell whether the pod is enrolled in the mesh";
            let details = format!("API server: {of_api}; agent: {of_agent}");
            Err(Failure::new(code::TRY_AGAIN, text).because(details))
        }
    }
}

async fn of_api_server(config: &Config, pod: &Pod, log: &Log) -> Result<Verdict, String> {
    let kubeconfig = config.cni_agent_run_dir.join(event::KUBECONFIG);
    let tries = match config.enable_ambient_detection_retry {
        true => PATIENT_TRIES,
        false => TRIES,
    };
    let mut last = String::new();
    for attempt in 0..tries {
        if attempt > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        // The agent may be writing a fresh token meanwhile.
        match ask(config, &kubeconfig, pod).await {
            Ok(verdict) => return Ok(verdict),
            Err(error) => last = error,
        }
        log.write(Level::Debug, &format!("try {}: {last}", attempt + 1));
    }
    Err(last)
}

async fn ask(config: &Config, kubeconfig: &Path, pod: &Pod) -> Result<Verdict, String> {
    let server = ApiServer::of_kubeconfig(kubeconfig)
        .map_err(|error| format!("{}: {error}", kubeconfig.display()))?;
    let (object, namespace) = tokio::try_join!(server.pod(pod), server.namespace(&pod.namespace))?;
    let candidate = Candidate {
        labels: &object.metadata.labels,
        annotations: &object.metadata.annotations,
        host_network: object.spec.host_network,
        namespace_labels: &namespace.metadata.labels,
    };
    Ok(match config.enablement_selectors.admit(candidate) {
        Ok(()) => Verdict::Enrolled("it or its namespace asks for the mesh".to_string()),
        Err(reason) => Verdict::Outside(reason.to_string()),
    })
}

/// A runtime that gives its own namespace would have the node itself captured.
fn refuse_own_namespace(netns: &Path) -> Result<(), Failure> {
    let number = |path: &Path| {
        let found = path.metadata().map(|found| (found.dev(), found.ino()));
        found.map_err(|error| {
            let text = format!("the network namespace {} cannot be found", path.display());
            Failure::new(code::ENVIRONMENT, text).because(error)
        })
    };
    if number(netns)? == number(Path::new("/proc/self/ns/net"))? {
        let text = "CNI_NETNS is the plugin's own network namespace, which is no pod's";
        return Err(Failure::new(code::ENVIRONMENT, text));
    }
    Ok(())
}
