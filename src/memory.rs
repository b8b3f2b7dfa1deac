//! Memory that the allocator keeps although nobody uses it, and when it is given back to the kernel.

use std::sync::Arc;
use std::time::Duration;

use crate::telemetry::Telemetry;

/// How often the number of flows is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// So many fewer flows than there were leave enough behind.
const MANY: u64 = 500;

/// Gives unused memory back.
pub fn give_back() {
    // SAFETY: the allocator's own function, callable at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// How much memory this process may use, in bytes: its control group's limit, else the machine's.
pub fn available() -> u64 {
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = group.and_then(|text| text.trim().parse().ok());
    limit.or_else(machine).unwrap_or(1 << 30)
}

fn machine() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kilobytes: u64 = line?.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}

/// Gives memory back after every burst of flows, for ever.
pub async fn follow(telemetry: Arc<Telemetry>) {
    let mut peak = Peak::default();
    loop {
        tokio::time::sleep(LOOK).await;
        if peak.has_passed(telemetry.live_flows()) {
            give_back();
        }
    }
}

/// The largest number of flows since the last burst ended.
#[derive(Default)]
struct Peak {
    most: u64,
    before: u64,
}

impl Peak {
    /// Whether a burst has ended: less than half of it is left, and that is not still going down quickly.
    fn has_passed(&mut self, now: u64) -> bool {
        let settled = now + MANY >= self.before;
        self.before = now;
        self.most = self.most.max(now);
        let passed = settled && now <= self.most / 2 && self.most - now >= MANY;
        if passed {
            self.most = now;
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_a_burst_is_over() {
        let mut peak = Peak::default();
        // flows open at each look, and whether memory is given back then
        let looks = [
            (10, false),
            (4000, false),
            (2500, false),
            (100, false),
            (90, true),
            (90, false),
            (400, false),
            (0, false),
            (900, false),
            (300, false),
            (300, true),
        ];
        for (position, (flows, expected)) in looks.into_iter().enumerate() {
            assert_eq!(peak.has_passed(flows), expected, "look {position}");
        }
    }
}
