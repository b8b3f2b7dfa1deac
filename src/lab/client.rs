//! How the lab's commands speak to a running lab.

use std::io::{BufReader, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

use super::manifest::{Key, Object};
use super::state::{self, StateDir};
use super::wire::{self, Answer, PodName, Request, Sighting, Status};

/// How long a lab may take to go down before it is ended by force.
const DOWN: Duration = Duration::from_secs(20);

/// A running lab.
#[derive(Clone, Debug)]
pub struct Lab {
    dir: StateDir,
}

/// A watch of the bridge that is going on.
#[derive(Debug)]
pub struct Watch(UnixStream);

impl Lab {
    /// The lab called `name`, whether it runs or not.
    ///
    /// # Errors
    /// A name that cannot be one.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        Ok(Self {
            dir: StateDir::of(name)?,
        })
    }

    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// What runs, and how.
    pub fn status(&self) -> anyhow::Result<Status> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// Creates and changes objects.
    pub fn apply(&self, objects: Vec<Object>) -> anyhow::Result<Vec<String>> {
        self.change(&Request::Apply(objects))
    }

    /// Removes objects.
    pub fn delete(&self, keys: Vec<Key>) -> anyhow::Result<Vec<String>> {
        self.change(&Request::Delete(keys))
    }

    fn change(&self, request: &Request) -> anyhow::Result<Vec<String>> {
        match self.ask(request)? {
            Answer::Changed(report) => Ok(report),
            other => Err(unexpected(other)),
        }
    }

    /// Runs a command in a pod with the given standard streams; returns its exit code.
    pub fn exec(
        &self,
        pod: &PodName,
        command: Vec<String>,
        stdin: impl AsFd,
        stdout: impl AsFd,
        stderr: impl AsFd,
    ) -> anyhow::Result<i32> {
        let stream = self.connect()?;
        let request = Request::Exec {
            pod: pod.clone(),
            command,
        };
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        wire::send_with(&stream, &request, &fds)?;
        match self.answer(&stream)? {
            Answer::Ended(code) => Ok(code),
            other => Err(unexpected(other)),
        }
    }

    /// Starts to watch the bridge for byte strings.
    pub fn watch(&self, needles: Vec<String>) -> anyhow::Result<Watch> {
        let stream = self.connect()?;
        wire::send(&stream, &Request::Watch { needles })?;
        match self.answer(&stream)? {
            Answer::Watching => Ok(Watch(stream)),
            other => Err(unexpected(other)),
        }
    }

    /// Takes the lab down and removes what it kept; says whether there was one.
    pub fn down(&self) -> anyhow::Result<bool> {
        let was_alive = self.dir.is_alive();
        if was_alive {
            if let Ok(stream) = UnixStream::connect(self.dir.socket()) {
                wire::send(&stream, &Request::Down)?;
            }
            let deadline = Instant::now() + DOWN;
            while self.dir.is_alive() {
                if Instant::now() > deadline {
                    bail!(
                        "the lab {} does not go down; end the process that has {} open",
                        self.dir.name(),
                        self.dir.join("lock").display()
                    );
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.dir.remove_if_dead()?;
        Ok(was_alive)
    }

    fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        let stream = self.connect()?;
        wire::send(&stream, request)?;
        self.answer(&stream)
    }

    fn answer(&self, stream: &UnixStream) -> anyhow::Result<Answer> {
        match wire::receive(&mut BufReader::new(stream)) {
            Ok(Answer::Refused(reason)) => Err(anyhow!(reason)),
            Ok(answer) => Ok(answer),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                bail!("the lab {} went down", self.dir.name())
            }
            Err(e) => Err(e).context("an answer of the lab"),
        }
    }

    fn connect(&self) -> anyhow::Result<UnixStream> {
        UnixStream::connect(self.dir.socket()).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => not_running(&self.dir),
            _ => anyhow!("{}: {e}", self.dir.socket().display()),
        })
    }
}

impl Watch {
    /// Ends the watch and says what it saw.
    pub fn stop(mut self) -> anyhow::Result<Sighting> {
        self.0.write_all(b"\n")?;
        match wire::receive(&mut BufReader::new(&self.0))? {
            Answer::Watched(sighting) => Ok(sighting),
            other => Err(unexpected(other)),
        }
    }
}

fn not_running(dir: &StateDir) -> anyhow::Error {
    let others = state::living();
    let hint = if others.is_empty() {
        "start one with: warren lab up".to_owned()
    } else {
        format!("running: {} (choose with --name)", others.join(", "))
    };
    anyhow!("there is no running lab called {}; {hint}", dir.name())
}

fn unexpected(answer: Answer) -> anyhow::Error {
    match answer {
        Answer::Refused(reason) => anyhow!(reason),
        other => anyhow!("the lab gave an answer of another version: {other:?}"),
    }
}
