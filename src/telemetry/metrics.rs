//! The metrics, and their text for a scrape (OpenMetrics 1.0).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::RuntimeMetrics;

use super::flow::Direction;
use super::reason::Reason;
use super::runtimes;
use super::series::{Series, SeriesTable};
use super::sink::Sink;

/// The content type of `Telemetry::encode`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";
/// The media type, without parameters.
pub const MEDIA_TYPE: &str = "application/openmetrics-text";
/// What the same text is called for those who do not ask for it by that name.
pub const PLAIN_TYPE: &str = "text/plain; charset=utf-8";

/// Upper bounds of the latency histogram, in seconds.
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// A counter's samples by rendered label set.
struct Family {
    help: &'static str,
    samples: BTreeMap<String, u64>,
}

#[derive(Default)]
struct Histogram {
    counts: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

/// Help and value.
type Gauge = (&'static str, i64);

/// Help and the histograms by rendered label set.
type HistogramFamily = (&'static str, BTreeMap<String, Histogram>);

/// Everything that is counted in this process.
pub struct Telemetry {
    tag: String,
    start: SystemTime,
    pub(super) traffic: SeriesTable,
    counters: Mutex<BTreeMap<&'static str, Family>>,
    histograms: Mutex<BTreeMap<&'static str, HistogramFamily>>,
    gauges: Mutex<BTreeMap<&'static str, Gauge>>,
    sockets: [AtomicI64; 2],
    /// Those of the workers, in their order.
    runtimes: Mutex<Vec<RuntimeMetrics>>,
}

/// An accepted socket, counted while it lives.
pub struct OpenSocket {
    telemetry: Arc<Telemetry>,
    direction: Direction,
}

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.telemetry.sockets[self.direction as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Telemetry {
    /// Nothing counted yet; `tag` is the version that `istio_build` names.
    pub fn new(tag: &str) -> Self {
        Self {
            tag: tag.to_string(),
            start: SystemTime::now(),
            traffic: SeriesTable::default(),
            counters: Mutex::default(),
            histograms: Mutex::default(),
            gauges: Mutex::default(),
            sockets: Default::default(),
            runtimes: Mutex::default(),
        }
    }

    /// Tells of a further worker's runtime from now on.
    pub fn watch(&self, runtime: RuntimeMetrics) {
        lock(&self.runtimes).push(runtime);
    }

    /// Counts an accepted socket until the guard is dropped.
    pub fn socket(self: &Arc<Self>, direction: Direction) -> OpenSocket {
        self.sockets[direction as usize].fetch_add(1, Ordering::Relaxed);
        OpenSocket {
            telemetry: self.clone(),
            direction,
        }
    }

    /// How many flows are open.
    pub fn live_flows(&self) -> u64 {
        self.traffic.live()
    }

    /// Adds to a counter; `name` is without `_total`, `labels` are name and value.
    pub fn add(&self, name: &'static str, help: &'static str, labels: &[(&str, &str)], n: u64) {
        let mut counters = lock(&self.counters);
        let family = counters.entry(name).or_insert_with(|| Family {
            help,
            samples: BTreeMap::new(),
        });
        *family.samples.entry(render(labels)).or_default() += n;
    }

    /// Counts a flow that was refused or broke.
    pub fn refused(&self, direction: Direction, reason: Reason) {
        self.add(
            "warren_flow_failures",
            "The total number of flows that were refused or broke, by reason (unstable)",
            &[
                ("reporter", direction.reporter()),
                ("reason", reason.code()),
            ],
            1,
        );
    }

    /// Sets a gauge.
    pub fn set(&self, name: &'static str, help: &'static str, value: i64) {
        lock(&self.gauges).insert(name, (help, value));
    }

    /// Adds an observed duration to a histogram; `name` is with its unit.
    pub fn observe(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
        time: Duration,
    ) {
        let mut histograms = lock(&self.histograms);
        let (_, family) = histograms
            .entry(name)
            .or_insert_with(|| (help, BTreeMap::new()));
        let histogram = family.entry(render(labels)).or_default();
        for (count, bound) in histogram.counts.iter_mut().zip(BUCKETS) {
            *count += u64::from(time.as_secs_f64() <= bound);
        }
        histogram.count += 1;
        histogram.sum += time.as_secs_f64();
    }

    /// All samples in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(8192);
        self.encode_process(&mut text);
        runtimes::encode(&mut text, &lock(&self.runtimes));
        self.encode_traffic(&mut text);
        self.encode_counters(&mut text, false);
        self.encode_histograms(&mut text);
        self.encode_counters(&mut text, true);
        for (name, (help, value)) in lock(&self.gauges).iter() {
            head(&mut text, name, "gauge", help);
            let _ = writeln!(text, "{name} {value}");
        }
        text.push_str("# EOF\n");
        text
    }

    /// The counters of the pods' management, which come last (`proxy.md §8`), or the others.
    fn encode_counters(&self, text: &mut String, manager: bool) {
        let counters = lock(&self.counters);
        for (name, family) in counters.iter() {
            if name.starts_with("workload_manager_") != manager {
                continue;
            }
            head(text, name, "counter", family.help);
            for (labels, value) in &family.samples {
                let _ = writeln!(text, "{name}_total{} {value}", braced(labels));
            }
        }
    }

    fn encode_histograms(&self, text: &mut String) {
        for (name, (help, family)) in lock(&self.histograms).iter() {
            head(text, name, "histogram", help);
            for (labels, histogram) in family {
                let comma = if labels.is_empty() { "" } else { "," };
                for (bound, count) in BUCKETS.iter().zip(histogram.counts) {
                    let _ = writeln!(
                        text,
                        "{name}_bucket{{le=\"{bound:?}\"{comma}{labels}}} {count}"
                    );
                }
                let _ = writeln!(
                    text,
                    "{name}_bucket{{le=\"+Inf\"{comma}{labels}}} {}",
                    histogram.count
                );
                let _ = writeln!(text, "{name}_sum{} {}", braced(labels), histogram.sum);
                let _ = writeln!(text, "{name}_count{} {}", braced(labels), histogram.count);
            }
        }
    }

    fn encode_process(&self, text: &mut String) {
        let mut gauge = |name: &str, help: &str, value: Option<u64>| {
            if let Some(value) = value {
                head(text, name, "gauge", help);
                let _ = writeln!(text, "{name} {value}");
            }
        };
        gauge(
            "process_open_fds",
            "Number of open file descriptors",
            open_descriptors(),
        );
        gauge(
            "process_max_fds",
            "Maximum number of file descriptors",
            descriptor_limit(),
        );
        gauge(
            "process_resident_memory_bytes",
            "Resident memory in bytes",
            resident_bytes(),
        );
        let started = self
            .start
            .duration_since(UNIX_EPOCH)
            .map(|since| since.as_secs())
            .ok();
        gauge(
            "process_start_time_seconds",
            "Start of the process since the epoch in seconds",
            started,
        );
        if let Some(seconds) = cpu_seconds() {
            head(
                text,
                "process_cpu_seconds",
                "counter",
                "User and system CPU time in seconds",
            );
            let _ = writeln!(text, "process_cpu_seconds_total {seconds:.2}");
        }
    }

    fn encode_traffic(&self, text: &mut String) {
        head(text, "istio_build", "gauge", "Istio component build info");
        let _ = writeln!(
            text,
            "istio_build{{{}}} 1",
            render(&[("component", "ztunnel"), ("tag", &self.tag)])
        );
        let sorted = self.traffic.sorted();
        type Value = fn(&Series) -> &AtomicU64;
        let families: [(&str, &str, Value); 5] = [
            (
                "istio_tcp_connections_opened",
                "The total number of TCP connections opened",
                |series| &series.opened,
            ),
            (
                "istio_tcp_connections_closed",
                "The total number of TCP connections closed",
                |series| &series.closed,
            ),
            (
                "istio_tcp_received_bytes",
                "The size of total bytes received during request in case of a TCP connection",
                |series| &series.from_client,
            ),
            (
                "istio_tcp_sent_bytes",
                "The size of total bytes sent during response in case of a TCP connection",
                |series| &series.from_server,
            ),
            (
                "istio_tcp_connections_failed",
                "The total number of TCP connections that failed to establish (unstable)",
                |series| &series.failed,
            ),
        ];
        for (name, help, value) in families {
            let samples = sorted
                .iter()
                .map(|series| (series, value(series).load(Ordering::Relaxed)));
            let mut samples = samples.filter(|(_, value)| *value > 0).peekable();
            if samples.peek().is_some() {
                head(text, name, "counter", help);
            }
            for (series, value) in samples {
                let _ = writeln!(text, "{name}_total{{{}}} {value}", series.labels());
            }
        }
        head(
            text,
            "istio_tcp_sockets_open",
            "gauge",
            "The current number of open TCP sockets (unstable)",
        );
        for direction in [Direction::Outbound, Direction::Inbound] {
            let open = self.sockets[direction as usize].load(Ordering::Relaxed);
            let _ = writeln!(
                text,
                "istio_tcp_sockets_open{{reporter=\"{}\"}} {open}",
                direction.reporter()
            );
        }
        head(
            text,
            "warren_log_lines_dropped",
            "counter",
            "Log lines dropped because the output was too slow",
        );
        let _ = writeln!(
            text,
            "warren_log_lines_dropped_total {}",
            Sink::process().dropped()
        );
    }
}

pub(super) fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}");
}

fn braced(labels: &str) -> String {
    if labels.is_empty() {
        String::new()
    } else {
        format!("{{{labels}}}")
    }
}

pub(super) fn render(labels: &[(&str, &str)]) -> String {
    let mut text = String::with_capacity(labels.len() * 40);
    for (position, (name, value)) in labels.iter().enumerate() {
        if position > 0 {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                c => text.push(c),
            }
        }
        text.push('"');
    }
    text
}

fn open_descriptors() -> Option<u64> {
    // The listing itself holds one open.
    Some((std::fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1))
}

fn descriptor_limit() -> Option<u64> {
    Some(
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .ok()?
            .0,
    )
}

fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * size as u64)
}

fn cpu_seconds() -> Option<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).ok()?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_rendered_with_their_labels() {
        let telemetry = Arc::new(Telemetry::new("1.2.3"));
        telemetry.add("istio_xds_message", "help", &[("url", "a\"b\\")], 2);
        telemetry.set("workload_manager_active_proxy_count", "help", 3);
        telemetry.observe("x_seconds", "help", &[], Duration::from_millis(5));
        let socket = telemetry.socket(Direction::Outbound);
        let text = telemetry.encode();
        for line in [
            "istio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1",
            "istio_xds_message_total{url=\"a\\\"b\\\\\"} 2",
            "workload_manager_active_proxy_count 3",
            "x_seconds_bucket{le=\"0.001\"} 0",
            "x_seconds_bucket{le=\"0.01\"} 1",
            "x_seconds_bucket{le=\"+Inf\"} 1",
            "istio_tcp_sockets_open{reporter=\"source\"} 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} in {text}");
        }
        assert!(text.ends_with("# EOF\n"));
        drop(socket);
        assert!(
            telemetry
                .encode()
                .contains("istio_tcp_sockets_open{reporter=\"source\"} 0")
        );
    }
}
