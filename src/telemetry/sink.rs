//! Where log lines go: a bounded queue that never holds up its callers, and a thread that writes it out.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may wait to be written.
const LINES: u64 = 10_000;
/// Bytes that may wait to be written.
const BYTES: usize = 8 << 20;
/// A buffer larger than this is given back after a burst.
const KEPT: usize = 64 << 10;
/// Lines of a burst gather this long, so that they share a wake-up and a write.
const GATHER: Duration = Duration::from_millis(4);
/// How often an output that blocks without waiting is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// How long an exit waits for the last lines.
const FLUSH: Duration = Duration::from_millis(1100);

/// Renders the line that tells how many lines were lost.
pub type Notice = fn(u64) -> String;

/// A queue of lines and the thread that writes them; the thread ends after the sink is dropped.
pub struct Sink(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    /// Told when the writer sleeps and there is something to write.
    filled: Condvar,
    /// Told when everything that was taken from the queue is written.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    text: String,
    lines: u64,
    /// Lines ever taken in, and of those the ones that are written or lost to a broken output.
    taken: u64,
    done: u64,
    asleep: bool,
    closed: bool,
}

static PROCESS: OnceLock<Sink> = OnceLock::new();

impl Sink {
    /// The sink of this process, which writes to standard output.
    pub fn process() -> &'static Self {
        PROCESS.get_or_init(|| {
            let notice = super::log::lost;
            // The bare descriptor: lines are gathered here already.
            match io::stdout().as_fd().try_clone_to_owned() {
                Ok(output) => Self::to(File::from(output), notice),
                Err(_) => Self::to(io::stdout(), notice),
            }
        })
    }

    /// A sink into a writer.
    pub fn to(writer: impl Write + Send + 'static, notice: Notice) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        let theirs = shared.clone();
        let writing = std::thread::Builder::new()
            .name("log".to_string())
            .spawn(move || theirs.write_out(writer, notice));
        if let Err(error) = writing {
            eprintln!("warren: no log lines will be written: {error}");
        }
        Self(shared)
    }

    /// Queues a line that ends in a newline, or counts it as dropped when the queue is full.
    pub fn line(&self, line: &str) {
        let mut queue = self.0.queue();
        if queue.lines >= LINES || queue.text.len() + line.len() > BYTES {
            drop(queue);
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.text.push_str(line);
        queue.lines += 1;
        queue.taken += 1;
        let wake = std::mem::take(&mut queue.asleep);
        drop(queue);
        if wake {
            self.0.filled.notify_one();
        }
    }

    /// How many lines were dropped.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until the lines queued so far are written, at most about a second.
    pub fn flush(&self) {
        let deadline = Instant::now() + FLUSH;
        let mut queue = self.0.queue();
        let wanted = queue.taken;
        while queue.done < wanted {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = match self.0.written.wait_timeout(queue, left) {
                Ok((queue, _)) => queue,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.filled.notify_one();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self, mut writer: impl Write, notice: Notice) {
        let mut told = 0;
        let mut batch = String::new();
        while let Some(lines) = self.take(&mut batch) {
            let lost = self.dropped.load(Ordering::Relaxed);
            if lost > told {
                batch.push_str(&notice(lost - told));
                told = lost;
            }
            if write_all(&mut writer, batch.as_bytes()).is_err() {
                // Nobody is left to tell when the output itself is broken; the metric shows it.
                self.dropped.fetch_add(lines, Ordering::Relaxed);
                told += lines;
            }
            batch.clear();
            if batch.capacity() > KEPT {
                batch = String::new();
            }
            self.queue().done += lines;
            self.written.notify_all();
            std::thread::sleep(GATHER);
        }
    }

    /// Waits for lines and swaps them into the empty `batch`; none when the sink is gone.
    fn take(&self, batch: &mut String) -> Option<u64> {
        let mut queue = self.queue();
        while queue.lines == 0 {
            if queue.closed {
                return None;
            }
            queue.asleep = true;
            queue = self
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut queue.text, batch);
        Some(std::mem::take(&mut queue.lines))
    }
}

/// Writes everything, also to an output that somebody has made non-blocking.
fn write_all(writer: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match writer.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    writer.flush()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An output that can be read, and blocked by holding its lock.
    #[derive(Clone, Default)]
    pub struct Output(pub Arc<Mutex<Vec<u8>>>);

    impl Output {
        pub fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn notice(lost: u64) -> String {
        format!("lost {lost}\n")
    }

    #[test]
    fn a_blocked_output_drops_lines_and_says_how_many() {
        let output = Output::default();
        let sink = Sink::to(output.clone(), notice);
        let blocked = output.0.lock().unwrap();
        let written = 3 * LINES;
        for _ in 0..written {
            sink.line("x\n");
        }
        let lost = sink.dropped();
        assert!(lost > 0);
        drop(blocked);
        sink.flush();
        sink.line("x\n");
        sink.flush();
        let text = output.text();
        // The writer may have told of some before it was blocked.
        let told = text.lines().filter_map(|line| line.strip_prefix("lost "));
        let told: u64 = told.map(|lost| lost.parse::<u64>().unwrap()).sum();
        assert_eq!(told, lost);
        assert_eq!(text.matches("x\n").count() as u64, written + 1 - lost);
    }

    #[test]
    fn a_flush_gives_up_on_an_output_that_stays_blocked() {
        let output = Output::default();
        let sink = Sink::to(output.clone(), notice);
        let blocked = output.0.lock().unwrap();
        for _ in 0..2 * LINES {
            sink.line("x\n");
        }
        // Returning at all is what counts: the queue is full and nothing takes from it.
        sink.flush();
        drop(blocked);
    }

    #[test]
    fn waiting_bytes_are_bounded_as_well_as_lines() {
        let output = Output::default();
        let sink = Sink::to(output.clone(), notice);
        let blocked = output.0.lock().unwrap();
        let long = "y".repeat(1 << 20);
        for _ in 0..20 {
            sink.line(&long);
        }
        // Eight may wait, eight more may have been taken by the writer.
        assert!(sink.dropped() >= 4, "{}", sink.dropped());
        drop(blocked);
    }

    struct Fussy(Output, bool);

    impl Write for Fussy {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0.write(&bytes[..bytes.len().min(3)])
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_output_that_takes_little_at_a_time_gets_everything() {
        let output = Output::default();
        let sink = Sink::to(Fussy(output.clone(), false), notice);
        sink.line("one line\n");
        sink.line("another\n");
        sink.flush();
        assert_eq!(output.text(), "one line\nanother\n");
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_lost_to_a_broken_output_are_counted() {
        let sink = Sink::to(Broken, notice);
        sink.line("x\n");
        sink.flush();
        assert_eq!(sink.dropped(), 1);
    }
}
