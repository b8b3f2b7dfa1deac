//! What the plugin logs: to standard error, to a file on the node, and through the agent.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value};

use super::agent::Agent;

/// The file in the agent's run directory, and the one that a full file becomes.
const FILE: &str = "istio-cni.log";
const FULL_FILE: &str = "istio-cni.log.1";
/// When the file is full, in bytes.
const FULL: u64 = 10 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Level {
    fn parse(text: &str) -> Self {
        match text {
            "error" | "fatal" | "none" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "debug" | "trace" => Self::Debug,
            _ => Self::Info,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

/// The records of one call.
pub struct Log {
    level: Level,
    run_dir: Option<PathBuf>,
    /// What stands in every record.
    common: Map<String, Value>,
    records: RefCell<Vec<String>>,
}

impl Log {
    /// A log that goes to standard error alone, until it is known where else.
    pub fn new(command: &str) -> Self {
        Self {
            level: Level::Info,
            run_dir: None,
            common: Map::from_iter([("command".to_string(), command.into())]),
            records: RefCell::default(),
        }
    }

    /// Writes to the run directory as well, which must be there already.
    pub fn keep_in(&mut self, run_dir: &Path, level: &str) {
        self.level = Level::parse(level);
        self.run_dir = Some(run_dir.to_path_buf());
    }

    /// Puts a value into all records from now on.
    pub fn about(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.common.insert(key.to_string(), value.into());
        }
    }

    pub fn write(&self, level: Level, text: &str) {
        if level > self.level {
            return;
        }
        let mut record = Map::new();
        record.insert("level".to_string(), level.name().into());
        let now = jiff::Timestamp::now().to_string();
        record.insert("time".to_string(), now.into());
        record.insert("msg".to_string(), text.into());
        record.extend(self.common.clone());
        let record = Value::Object(record).to_string();
        // A log that cannot be written must not keep a pod from starting.
        let _ = writeln!(io::stderr(), "{record}");
        if let Some(run_dir) = &self.run_dir {
            let _ = append(run_dir, &record);
        }
        self.records.borrow_mut().push(record);
    }

    /// Hands all records to the agent, if there is one.
    pub async fn flush(&self) {
        let records = self.records.take();
        if let (Some(run_dir), false) = (&self.run_dir, records.is_empty()) {
            let _ = Agent { run_dir }.log(&records).await;
        }
    }
}

/// Appends a line to the file; many plugins may do so at the same time.
fn append(run_dir: &Path, record: &str) -> io::Result<()> {
    let path = run_dir.join(FILE);
    let open = || -> io::Result<Flock<File>> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(&path)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
    };
    let mut file = open()?;
    if file.metadata()?.len() >= FULL {
        fs::rename(&path, run_dir.join(FULL_FILE))?;
        file = open()?;
    }
    file.write_all(format!("{record}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_is_put_aside_and_less_grave_records_are_left_out() {
        let folder = std::env::temp_dir().join(format!("wrn-plugin-log-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut log = Log::new("ADD");
        log.keep_in(&folder, "info");
        log.about("pod", "demo/a");
        log.about("nothing", "");
        log.write(Level::Debug, "not this");
        log.write(Level::Info, "a \"word\"\nand more");
        let path = folder.join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        let record: Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<_> = record.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["command", "level", "msg", "pod", "time"]);
        assert_eq!(record["msg"], "a \"word\"\nand more");
        let time = record["time"].as_str().unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{time}");

        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(FULL)
            .unwrap();
        log.write(Level::Error, "after");
        assert_eq!(fs::metadata(folder.join(FULL_FILE)).unwrap().len(), FULL);
        assert!(fs::read_to_string(&path).unwrap().contains("after"));
        fs::remove_dir_all(&folder).unwrap();
        log.write(Level::Error, "there is no folder any more");
    }
}
