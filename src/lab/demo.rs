//! `warren lab demo`: the main job, step by step, each step checked.

use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::client::Lab;
use super::story::{Story, access_line};
use super::up::{self, Interrupts, UpArgs};
use super::wire::{PodName, PodStatus, Sighting, Status};
use super::{logs, samples};

const URL: &str = "http://productpage.bookinfo:9080/productpage";
/// What only the plaintext of the request or of the page contains.
const NEEDLES: [&str; 3] = [
    "GET /productpage",
    "User-Agent: curl/",
    "The Comedy of Errors",
];
/// How soon an applied policy has to take effect.
const POLICY_TAKES: Duration = Duration::from_secs(1);
/// How long a log line may take to be written.
const LINE_TAKES: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);

/// Runs the demonstration and takes everything down again.
///
/// # Errors
/// When the lab does not come up or a step cannot be run at all.
pub fn run(lab: &Lab) -> anyhow::Result<ExitCode> {
    need_curl()?;
    let mut interrupted = Interrupts::block()?;
    let started = Instant::now();
    println!("A mesh of two nodes on this machine, in namespaces of its own");
    let arguments = UpArgs {
        nodes: 2,
        ..UpArgs::default()
    };
    let show = |line: &str| println!("  {line}");
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
    println!("\nDown again");
    lab.down()?;
    if let Some(mut launched) = launched {
        launched.wait()?;
    }
    demo.story
        .check("nothing is left", !lab.dir().path().exists());
    told?;
    let failed = demo.story.failed();
    println!(
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

impl Curl {
    fn got_page(&self) -> bool {
        self.code == 0 && self.output.contains("The Comedy of Errors")
    }
}

impl Demo<'_> {
    fn tell(&mut self) -> anyhow::Result<()> {
        let status = self.lab.status()?;
        println!("\nThe pods");
        for pod in &status.pods {
            let capture = match pod.capture {
                super::wire::Capture::Captured => "captured",
                _ => "outside the mesh",
            };
            println!(
                "  {:7} {:10} {}/{} ({capture})",
                pod.node,
                pod.address.to_string(),
                pod.namespace,
                pod.name
            );
        }
        self.before_the_policy(&status)?;
        self.with_the_policy(&status)
    }

    fn before_the_policy(&mut self, status: &Status) -> anyhow::Result<()> {
        println!("\nThe curl pod of namespace default asks for the page");
        let watch = self.lab.watch(NEEDLES.map(str::to_owned).to_vec())?;
        let (curl, lines) = self.call_and_log(status, "default", "deploy/curl", |line| {
            !line.contains("error=")
        })?;
        let sighting = watch.stop()?;
        self.story.check("curl gets the page", curl.got_page());
        let parts = curl.output.contains("William Shakespeare") && curl.output.contains("*****");
        self.story
            .check("with the parts of details, reviews and ratings", parts);
        self.story.check("both proxies logged the flow", lines == 2);
        self.check_sealed(&sighting);
        println!("\nThe client outside the mesh asks for the page, in plaintext");
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
        println!("\nA policy: only the gateway may call productpage");
        print_indented(samples::POLICY);
        self.lab.apply(samples::policy()?)?;
        let applied = Instant::now();
        while self.curl("default", "deploy/curl")?.got_page() && applied.elapsed() < POLICY_TAKES {
            std::thread::sleep(LOOK);
        }
        let took = applied.elapsed();
        println!("\nThe curl pod asks again");
        let watch = self.lab.watch(NEEDLES.map(str::to_owned).to_vec())?;
        let refused = |line: &str| line.contains("error=");
        let (curl, lines) = self.call_and_log(status, "default", "deploy/curl", refused)?;
        let text = format!(
            "curl is refused, {} ms after the policy was applied",
            took.as_millis()
        );
        self.story.check(
            &text,
            !curl.got_page() && curl.code != 0 && took < POLICY_TAKES,
        );
        self.story.check(
            "both proxies logged the refusal with its reason",
            lines == 2,
        );
        println!("\nThe gateway's pod asks");
        let curl = self.curl("common-infrastructure", "deploy/shared-gateway-istio")?;
        self.story.check("it gets the page", curl.got_page());
        let sighting = watch.stop()?;
        self.check_sealed(&sighting);
        println!("\nThe client outside the mesh asks again");
        let curl = self.curl("outside", "deploy/client")?;
        self.story
            .check("it is refused", curl.code != 0 && !curl.got_page());
        Ok(())
    }

    fn check_sealed(&mut self, sighting: &Sighting) {
        println!(
            "  the bridge carried {} frames, {} of them in tunnels",
            sighting.frames, sighting.tunnel_frames
        );
        let sealed = sighting.found.iter().all(|count| *count == 0)
            && sighting.tunnel_frames > 0
            && sighting.lost == 0;
        self.story.check(
            "no plaintext byte of request or page crossed the bridge",
            sealed,
        );
    }

    /// Lets a pod call productpage and shows what both proxies logged of it; says how many lines were `right`.
    fn call_and_log(
        &mut self,
        status: &Status,
        namespace: &str,
        pod: &str,
        right: impl Fn(&str) -> bool,
    ) -> anyhow::Result<(Curl, usize)> {
        let client = find(status, namespace, pod)?;
        let server = find(status, "bookinfo", "deploy/productpage-v1")?;
        let mut from = Vec::new();
        for (node, direction) in [(&server.node, "inbound"), (&client.node, "outbound")] {
            let path = logs::path(self.lab, "", &format!("proxy/{node}"), None)?;
            let length = std::fs::metadata(&path)?.len();
            from.push((path, length, direction));
        }
        let curl = self.curl(namespace, pod)?;
        let mut found = 0;
        for (path, length, direction) in from {
            let deadline = Instant::now() + LINE_TAKES;
            let line = loop {
                let lines = logs::lines_from(&path, length)?;
                let line = access_line(&lines, direction, &client.name, &server.name);
                if line.is_some() || Instant::now() > deadline {
                    break line;
                }
                std::thread::sleep(LOOK);
            };
            match line {
                Some(line) => {
                    println!("  {line}");
                    found += usize::from(right(&line));
                }
                None => println!("  (no {direction} line in {})", path.display()),
            }
        }
        Ok((curl, found))
    }

    fn curl(&mut self, namespace: &str, pod: &str) -> anyhow::Result<Curl> {
        if self.interrupted.pending()? {
            bail!("interrupted");
        }
        let words = ["curl", "-sS", "--max-time", "10", URL];
        let name = PodName {
            namespace: namespace.into(),
            name: pod.into(),
        };
        let (mut reader, writer) = std::io::pipe()?;
        let collect = std::thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text)
        });
        let command = words.map(str::to_owned).to_vec();
        let nothing = std::fs::File::open("/dev/null")?;
        let code = self.lab.exec(&name, command, nothing, &writer, &writer)?;
        drop(writer);
        let output = collect
            .join()
            .map_err(|_| anyhow::anyhow!("reading curl's output"))??;
        let curl = Curl {
            code,
            output: String::from_utf8_lossy(&output).into_owned(),
        };
        println!(
            "  $ warren lab exec -n {namespace} {pod} -- {}",
            words.join(" ")
        );
        match curl.output.lines().count() {
            0..=3 => print_indented(&curl.output),
            lines => println!("  ({lines} lines of HTML)"),
        }
        println!("  exit code {code}");
        Ok(curl)
    }
}

fn find<'a>(status: &'a Status, namespace: &str, name: &str) -> anyhow::Result<&'a PodStatus> {
    logs::pod(status, namespace, name).with_context(|| format!("no {name} in {namespace}"))
}

fn print_indented(text: &str) {
    for line in text.lines() {
        println!("  {line}");
    }
}
