//! When to ask the CA again: the back-off after failures and the half-life of a certificate.

use std::hash::{BuildHasher, Hasher};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(150);
/// After failing for this long the delay is constant.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Share of the delay that chance may add or take.
const SPREAD: f64 = 0.2;

/// Failures in a row.
#[derive(Default)]
pub struct Failures {
    count: u32,
    since: Option<Instant>,
}

impl Failures {
    /// Counts one more; gives the delay after it.
    pub fn next_delay(&mut self) -> Duration {
        let now = Instant::now();
        self.count = self.count.saturating_add(1);
        let since = *self.since.get_or_insert(now);
        delay_after(self.count, now.duration_since(since), chance())
    }
}

/// The delay after the `failures`-th failure in a row (from 1); `failing_for` is the time since the first.
/// `chance` is within -1 to 1.
pub fn delay_after(failures: u32, failing_for: Duration, chance: f64) -> Duration {
    if failing_for >= PATIENCE {
        return LONGEST;
    }
    let doublings = failures.saturating_sub(1).min(16);
    FIRST
        .saturating_mul(1 << doublings)
        .min(LONGEST)
        .mul_f64(1.0 + SPREAD * chance.clamp(-1.0, 1.0))
}

/// How long to keep a certificate before renewing it: until half of its validity has passed.
///
/// One that arrives past its half-life (a skewed clock) is kept for half of what remains, never less than
/// a second, so that no clock makes this a busy loop.
pub fn renewal_after(not_before: SystemTime, not_after: SystemTime, now: SystemTime) -> Duration {
    let remaining = not_after.duration_since(now).unwrap_or_default();
    let half = not_after.duration_since(not_before).unwrap_or_default() / 2;
    (not_before + half)
        .duration_since(now)
        .ok()
        .filter(|wait| !wait.is_zero())
        .unwrap_or(remaining / 2)
        .max(Duration::from_secs(1))
}

/// A number within -1 to 1, from the keys that the standard library draws for its hashers.
fn chance() -> f64 {
    let bits = std::hash::RandomState::new().build_hasher().finish();
    (bits as f64 / u64::MAX as f64).mul_add(2.0, -1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn delays_double_up_to_the_cap() {
        let delays: Vec<u64> = (1..=10)
            .map(|n| delay_after(n, secs(n.into()), 0.0).as_secs())
            .collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
        assert_eq!(delay_after(u32::MAX, secs(1), 0.0), secs(150));
    }

    #[test]
    fn chance_moves_a_delay_by_a_fifth_until_patience_ends() {
        assert_eq!(delay_after(1, secs(0), -1.0), Duration::from_millis(800));
        assert_eq!(delay_after(1, secs(0), 7.0), Duration::from_millis(1200));
        assert_eq!(delay_after(3, secs(900), 1.0), secs(150));
    }

    #[test]
    fn a_certificate_is_renewed_at_half_its_validity() {
        let start = SystemTime::UNIX_EPOCH + secs(1_000_000);
        let end = start + secs(86_400);
        assert_eq!(renewal_after(start, end, start), secs(43_200));
        assert_eq!(renewal_after(start, end, start + secs(120)), secs(43_080));
        assert_eq!(renewal_after(start, end, start + secs(86_000)), secs(200));
        assert_eq!(renewal_after(end, start, start), secs(86_400));
        assert_eq!(renewal_after(start, end, end + secs(9)), secs(1));
    }
}
