//! The metrics of the workers' runtimes: what waits, what lives, and how busy each worker is.

use std::fmt::Write;

use tokio::runtime::RuntimeMetrics;

use super::metrics::head;

/// Help texts and values are those of the data plane as a whole.
type Gauge = (&'static str, &'static str, fn(&RuntimeMetrics) -> usize);

const GAUGES: [Gauge; 3] = [
    (
        "tokio_num_workers",
        "Number of data-plane workers",
        RuntimeMetrics::num_workers,
    ),
    (
        "tokio_global_queue_depth",
        "Number of tasks that were woken from other threads and wait to run",
        RuntimeMetrics::global_queue_depth,
    ),
    (
        "tokio_num_alive_tasks",
        "Number of tasks that have not ended",
        RuntimeMetrics::num_alive_tasks,
    ),
];

/// A value of one worker, written as its metric is.
type Counter = (&'static str, &'static str, fn(&RuntimeMetrics) -> String);

const COUNTERS: [Counter; 3] = [
    (
        "tokio_worker_total_busy_duration_seconds",
        "Time that a worker was busy in seconds",
        |runtime| format!("{:?}", runtime.worker_total_busy_duration(0).as_secs_f64()),
    ),
    (
        "tokio_worker_park_count",
        "Number of times that a worker went to sleep",
        |runtime| runtime.worker_park_count(0).to_string(),
    ),
    (
        "tokio_worker_park_unpark_count",
        "Number of times that a worker went to sleep or woke up",
        |runtime| runtime.worker_park_unpark_count(0).to_string(),
    ),
];

/// Writes the families; none without a runtime. Each runtime is one worker, known by its place.
pub(super) fn encode(text: &mut String, runtimes: &[RuntimeMetrics]) {
    if runtimes.is_empty() {
        return;
    }
    for (name, help, value) in GAUGES {
        head(text, name, "gauge", help);
        let sum: usize = runtimes.iter().map(value).sum();
        let _ = writeln!(text, "{name} {sum}");
    }
    for (name, help, value) in COUNTERS {
        head(text, name, "counter", help);
        for (worker, runtime) in runtimes.iter().enumerate() {
            let value = value(runtime);
            let _ = writeln!(text, "{name}_total{{worker=\"{worker}\"}} {value}");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::LocalRuntime;

    use super::*;

    fn sample(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("{name} in {text}"));
        value.trim().parse().unwrap()
    }

    #[test]
    fn gauges_are_summed_and_counters_are_told_by_worker() {
        let runtimes = [LocalRuntime::new().unwrap(), LocalRuntime::new().unwrap()];
        for _ in 0..3 {
            runtimes[1].spawn_local(std::future::pending::<()>());
        }
        runtimes[0].spawn_local(std::future::pending::<()>());
        let pause = std::time::Duration::from_millis(2);
        runtimes[1].block_on(async { tokio::time::sleep(pause).await });
        let metrics = runtimes
            .each_ref()
            .map(|runtime| runtime.handle().metrics());
        let mut text = String::new();
        encode(&mut text, &metrics);
        assert_eq!(sample(&text, "tokio_num_workers "), 2.0);
        assert_eq!(sample(&text, "tokio_num_alive_tasks "), 4.0);
        // The first runtime has not run yet.
        assert_eq!(sample(&text, "tokio_global_queue_depth "), 1.0);
        let parks = "tokio_worker_park_count_total";
        assert_eq!(sample(&text, &format!("{parks}{{worker=\"0\"}}")), 0.0);
        assert!(sample(&text, &format!("{parks}{{worker=\"1\"}}")) >= 1.0);
        let busy = "tokio_worker_total_busy_duration_seconds_total{worker=\"1\"}";
        assert!(sample(&text, busy) > 0.0);
    }

    #[test]
    fn without_workers_there_is_nothing_to_tell() {
        let mut text = String::new();
        encode(&mut text, &[]);
        assert_eq!(text, "");
    }
}
