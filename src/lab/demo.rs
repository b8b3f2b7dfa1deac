//! `warren lab demo`: the main job, step by step, each step checked.

use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use super::client::Lab;
use super::family::IpFamily;
use super::say::say;
use super::story::{Story, access_line};
use super::up::{self, Interrupts, UpArgs};
use super::wire::{PodName, PodStatus, Sighting, Status};
use super::{logs, samples};

const CURL: [&str; 5] = [
    "curl",
    "-sS",
    "--max-time",
    "10",
    "http://productpage.bookinfo:9080/productpage",
];
/// What only the plaintext of the request or of the page contains.
const NEEDLES: [&str; 3] = [
    "GET /productpage",
    "User-Agent: curl/",
    "The Comedy of Errors",
];
/// What the log lines of refused flows say.
const NOTHING_CARRIED: &str = "bytes_sent=0 bytes_recv=0";
const REASONS: [&str; 2] = [
    "error=\"connection closed due to policy rejection: allow policies exist, but none allowed\"",
    "error=\"http status: 401 Unauthorized\"",
];
const BOTH: [&str; 2] = ["inbound", "outbound"];
/// How soon an applied policy has to take effect.
const POLICY_TAKES: Duration = Duration::from_secs(1);
/// How long a log line may take to be written.
const LINE_TAKES: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);

/// What the demonstration is shown with.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// The addresses of nodes, pods and services
    #[arg(long, value_enum, default_value_t)]
    ip_family: IpFamily,
}

/// Runs the demonstration and takes everything down again.
///
/// # Errors
/// When the lab does not come up or a step cannot be run at all.
pub fn run(lab: &Lab, arguments: &DemoArgs) -> anyhow::Result<ExitCode> {
    need_curl()?;
    let mut interrupted = Interrupts::block()?;
    let started = Instant::now();
    say!("A mesh of two nodes on this machine, in namespaces of its own");
    let arguments = UpArgs {
        nodes: 2,
        ip_family: arguments.ip_family,
        ..UpArgs::default()
    };
    let show = |line: &str| say!("  {line}");
    let launched = up::start(
        lab,
        &arguments,
        samples::bookinfo()?,
        &mut interrupted,
        show,
    )?;
    let mut demo = Demo {
        lab,
        story: Story::default(),
        interrupted,
    };
    let told = demo.tell();
    say!("\nDown again");
    lab.down()?;
    if let Some(mut launched) = launched {
        launched.wait()?;
    }
    demo.story
        .check("nothing is left", !lab.dir().path().exists());
    told?;
    let failed = demo.story.failed();
    say!(
        "\n{failed} of {} expectations failed, {:.1}s in all",
        demo.story.checked(),
        started.elapsed().as_secs_f32()
    );
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn need_curl() -> anyhow::Result<()> {
    match std::process::Command::new("curl").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => bail!("curl is missing; install it with: sudo apt-get install curl"),
    }
}

struct Demo<'a> {
    lab: &'a Lab,
    story: Story,
    interrupted: Interrupts,
}

/// What curl did.
struct Curl {
    code: i32,
    output: String,
}

/// What curl did, and the access-log lines of it.
struct Call {
    curl: Curl,
    lines: Vec<String>,
}

impl Curl {
    fn got_page(&self) -> bool {
        self.code == 0 && self.output.contains("The Comedy of Errors")
    }
}

impl Demo<'_> {
    fn tell(&mut self) -> anyhow::Result<()> {
        let status = self.lab.status()?;
        say!("\nThe pods");
        for pod in &status.pods {
            let capture = match pod.capture {
                super::wire::Capture::Captured => "captured",
                _ => "outside the mesh",
            };
            say!(
                "  {:7} {:10} {}/{} ({capture})",
                pod.node,
                pod.addresses,
                pod.namespace,
                pod.name
            );
        }
        self.before_the_policy(&status)?;
        self.with_the_policy(&status)
    }

    fn before_the_policy(&mut self, status: &Status) -> anyhow::Result<()> {
        say!("\nThe curl pod of namespace default asks for the page");
        let watch = self.lab.watch(NEEDLES.map(str::to_owned).to_vec())?;
        let call = self.call(status, "default", "deploy/curl", &BOTH)?;
        let (curl, lines) = (call.curl, call.lines);
        let sighting = watch.stop()?;
        self.story.check("curl gets the page", curl.got_page());
        let parts = curl.output.contains("William Shakespeare") && curl.output.contains("*****");
        self.story
            .check("with the parts of details, reviews and ratings", parts);
        let told = lines.len() == 2 && lines.iter().all(|line| !line.contains("error="));
        self.story.check("both proxies logged the flow", told);
        self.check_sealed(&sighting);
        say!("\nThe client outside the mesh asks for the page, in plaintext");
        let watch = self.lab.watch(NEEDLES.map(str::to_owned).to_vec())?;
        let curl = self.curl("outside", "deploy/client")?;
        let sighting = watch.stop()?;
        self.story.check(
            "it gets the page, as no policy forbids it yet",
            curl.got_page(),
        );
        let seen = sighting.found.iter().all(|count| *count > 0);
        self.story.check(
            "and the same watch of the bridge sees request and page",
            seen,
        );
        Ok(())
    }

    fn with_the_policy(&mut self, status: &Status) -> anyhow::Result<()> {
        say!("\nA policy: only the gateway may call productpage");
        print_indented(samples::POLICY);
        self.lab.apply(samples::policy()?)?;
        let applied = Instant::now();
        while self.ask("default", "deploy/curl")?.got_page() && applied.elapsed() < POLICY_TAKES {
            std::thread::sleep(LOOK);
        }
        let took = applied.elapsed();
        say!("\nThe curl pod asks again");
        let watch = self.lab.watch(NEEDLES.map(str::to_owned).to_vec())?;
        let call = self.call(status, "default", "deploy/curl", &BOTH)?;
        let (curl, lines) = (call.curl, call.lines);
        let told = lines.len() == 2
            && lines
                .iter()
                .zip(REASONS)
                .all(|(line, reason)| line.contains(NOTHING_CARRIED) && line.ends_with(reason));
        let text = format!(
            "curl is refused, {} ms after the policy was applied",
            took.as_millis()
        );
        self.story.check(
            &text,
            !curl.got_page() && curl.code != 0 && took < POLICY_TAKES,
        );
        self.story
            .check("both proxies logged the refusal with its reason", told);
        say!("\nThe gateway's pod asks");
        let curl = self.curl("common-infrastructure", "deploy/shared-gateway-istio")?;
        self.story.check("it gets the page", curl.got_page());
        let sighting = watch.stop()?;
        self.check_sealed(&sighting);
        say!("\nThe client outside the mesh asks again");
        let call = self.call(status, "outside", "deploy/client", &["inbound"])?;
        let refused = call.curl.code != 0 && !call.curl.got_page();
        self.story.check("it is refused", refused);
        let told = call.lines.iter().any(|line| line.ends_with(REASONS[0]));
        self.story
            .check("and the proxy of productpage logged it", told);
        Ok(())
    }

    fn check_sealed(&mut self, sighting: &Sighting) {
        say!(
            "  the bridge carried {} frames, {} of them in tunnels",
            sighting.frames,
            sighting.tunnel_frames
        );
        let sealed = sighting.found.iter().all(|count| *count == 0)
            && sighting.tunnel_frames > 0
            && sighting.lost == 0;
        self.story.check(
            "no plaintext byte of request or page crossed the bridge",
            sealed,
        );
    }

    /// Lets a pod call productpage and shows what the proxies logged of it.
    fn call(
        &mut self,
        status: &Status,
        namespace: &str,
        pod: &str,
        directions: &[&str],
    ) -> anyhow::Result<Call> {
        let client = find(status, namespace, pod)?;
        let server = find(status, "bookinfo", "deploy/productpage-v1")?;
        let mut logs = Vec::new();
        for direction in directions {
            let node = if *direction == "inbound" {
                &server.node
            } else {
                &client.node
            };
            let path = logs::path(self.lab, "", &format!("proxy/{node}"), None)?;
            let length = std::fs::metadata(&path)?.len();
            logs.push((path, length, direction));
        }
        let curl = self.curl(namespace, pod)?;
        let mut lines = Vec::new();
        for (path, length, direction) in logs {
            let deadline = Instant::now() + LINE_TAKES;
            loop {
                let added = logs::lines_from(&path, length)?;
                if let Some(line) = access_line(&added, direction, &client.name, &server.name) {
                    say!("  {line}");
                    lines.push(line);
                    break;
                }
                if Instant::now() > deadline {
                    say!("  (no {direction} line in {}; there is)", path.display());
                    added.iter().for_each(|line| say!("    {line}"));
                    break;
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(Call { curl, lines })
    }

    /// Lets a pod call productpage and shows what comes of it.
    fn curl(&mut self, namespace: &str, pod: &str) -> anyhow::Result<Curl> {
        say!(
            "  $ warren lab exec -n {namespace} {pod} -- {}",
            CURL.join(" ")
        );
        let curl = self.ask(namespace, pod)?;
        match curl.output.lines().count() {
            0..=3 => print_indented(&curl.output),
            lines => say!("  ({lines} lines of HTML)"),
        }
        say!("  exit code {}", curl.code);
        Ok(curl)
    }

    fn ask(&mut self, namespace: &str, pod: &str) -> anyhow::Result<Curl> {
        if self.interrupted.pending()? {
            bail!("interrupted");
        }
        let name = PodName {
            namespace: namespace.into(),
            name: pod.into(),
        };
        let (mut reader, writer) = std::io::pipe()?;
        let collect = std::thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text)
        });
        let command = CURL.map(str::to_owned).to_vec();
        let nothing = std::fs::File::open("/dev/null")?;
        let code = self.lab.exec(&name, command, nothing, &writer, &writer)?;
        drop(writer);
        let output = collect
            .join()
            .map_err(|_| anyhow::anyhow!("reading curl's output"))??;
        Ok(Curl {
            code,
            output: String::from_utf8_lossy(&output).into_owned(),
        })
    }
}

fn find<'a>(status: &'a Status, namespace: &str, name: &str) -> anyhow::Result<&'a PodStatus> {
    logs::pod(status, namespace, name).with_context(|| format!("no {name} in {namespace}"))
}

fn print_indented(text: &str) {
    for line in text.lines() {
        say!("  {line}");
    }
}
