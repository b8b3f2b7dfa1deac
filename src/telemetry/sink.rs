//! Where log lines go: a bounded queue that never blocks, and a thread that writes it out.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Lines that may wait to be written.
const QUEUE: usize = 10_000;
/// Lines written with one call.
const BATCH: usize = 64;
/// How long an exit waits for the last lines.
const FLUSH: Duration = Duration::from_millis(1100);

enum Message {
    Line(String),
    Flush(Sender<()>),
}

/// The queue; clones share it.
#[derive(Clone)]
pub struct Sink {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

static PROCESS: OnceLock<Sink> = OnceLock::new();

impl Sink {
    /// The sink of this process, which writes to standard output.
    pub fn process() -> &'static Self {
        PROCESS.get_or_init(|| Self::to(std::io::stdout()))
    }

    /// A sink into a writer.
    pub fn to(writer: impl Write + Send + 'static) -> Self {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = dropped.clone();
        let writing = std::thread::Builder::new()
            .name("log".to_string())
            .spawn(move || write(writer, &lines, &counted));
        if let Err(error) = writing {
            eprintln!("warren: no log lines will be written: {error}");
        }
        Self { queue, dropped }
    }

    /// Queues a line that ends in a newline, or counts it as dropped when the queue is full.
    pub fn line(&self, line: String) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many lines were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits a bounded time for the queued lines to be written.
    pub fn flush(&self) {
        let (done, written) = channel();
        if self.queue.send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH);
        }
    }
}

fn write(mut writer: impl Write, lines: &Receiver<Message>, dropped: &AtomicU64) {
    let mut reported = 0;
    let mut batch = String::new();
    while let Ok(first) = lines.recv() {
        let mut flushed = Vec::new();
        let mut take = |message| match message {
            Message::Line(line) => batch.push_str(&line),
            Message::Flush(done) => flushed.push(done),
        };
        take(first);
        for _ in 1..BATCH {
            let Ok(message) = lines.try_recv() else { break };
            take(message);
        }
        let lost = dropped.load(Ordering::Relaxed);
        if lost > reported {
            super::time::push_timestamp(&mut batch, std::time::SystemTime::now());
            batch.push_str(&format!(
                "\twarn\tlog\t{} log lines were dropped: the output is too slow\t\n",
                lost - reported
            ));
            reported = lost;
        }
        // Nobody is left to tell when the output itself fails.
        let _ = writer
            .write_all(batch.as_bytes())
            .and_then(|()| writer.flush());
        batch.clear();
        for done in flushed {
            let _ = done.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_output_drops_lines_and_says_how_many() {
        let output = Shared::default();
        let blocked = output.0.lock().unwrap();
        let sink = Sink::to(output.clone());
        for _ in 0..QUEUE + 2 * BATCH {
            sink.line("x\n".to_string());
        }
        let lost = sink.dropped();
        assert!(lost > 0);
        drop(blocked);
        sink.flush();
        let written = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
        assert!(
            written.contains(&format!("\twarn\tlog\t{lost} log lines were dropped")),
            "{lost}"
        );
        assert_eq!(
            written.matches("x\n").count() as u64,
            (QUEUE + 2 * BATCH) as u64 - lost
        );
    }
}
