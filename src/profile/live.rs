//! Which sampled allocations are alive: a table of fixed size that every thread takes its freed ones out of without a lock.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Addresses that share a bucket share one line of the CPU's cache.
const WAYS: usize = 8;
const BUCKETS: usize = 2048;
/// So many places there are.
pub const PLACES: usize = WAYS * BUCKETS;

/// Addresses by place; zero is nobody's.
pub struct Live([Bucket; BUCKETS]);

#[repr(align(64))]
struct Bucket([AtomicUsize; WAYS]);

/// Accesses need no order of their own: an address is freed after it was handed out, and handed out again after it was freed,
/// and whoever passes an address between threads, the allocator among them, orders that.
impl Live {
    /// Nothing is alive.
    pub const fn new() -> Self {
        Self([const { Bucket([const { AtomicUsize::new(0) }; WAYS]) }; BUCKETS])
    }

    /// Gives an address a place; none when all that it may have are taken. One thread at a time may insert.
    pub fn insert(&self, address: usize) -> Option<usize> {
        let bucket = bucket(address);
        let way = (0..WAYS).find(|way| self.0[bucket].0[*way].load(Ordering::Relaxed) == 0)?;
        self.0[bucket].0[way].store(address, Ordering::Relaxed);
        Some(bucket * WAYS + way)
    }

    /// Takes an address out, if it is there.
    pub fn remove(&self, address: usize) {
        for way in &self.0[bucket(address)].0 {
            if way.load(Ordering::Relaxed) == address {
                way.store(0, Ordering::Relaxed);
                return;
            }
        }
    }

    /// The places that are taken.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        let taken = |place: &usize| {
            let way = &self.0[place / WAYS].0[place % WAYS];
            way.load(Ordering::Relaxed) != 0
        };
        (0..PLACES).filter(taken)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for way in self.0.iter().flat_map(|bucket| &bucket.0) {
            way.store(0, Ordering::Relaxed);
        }
    }
}

fn bucket(address: usize) -> usize {
    // Allocations are 16 bytes apart or more. The multiplier is 2^64 over the golden ratio: its high bits spread well.
    let spread = (address as u64 >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (spread >> (64 - BUCKETS.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_out_makes_room() {
        let live = Live::new();
        let same: Vec<usize> = (1..)
            .map(|number| number * 16)
            .filter(|address| bucket(*address) == bucket(16))
            .take(WAYS + 1)
            .collect();
        for address in &same[..WAYS] {
            assert!(live.insert(*address).is_some());
        }
        assert_eq!(live.insert(same[WAYS]), None);
        assert_eq!(live.places().count(), WAYS);
        live.remove(same[WAYS]);
        live.remove(same[3]);
        assert_eq!(live.places().count(), WAYS - 1);
        assert!(live.insert(same[WAYS]).is_some());
        live.clear();
        assert_eq!(live.places().count(), 0);
    }

    #[test]
    fn a_quarter_of_the_places_is_sure_to_be_used() {
        let live = Live::new();
        let found = (1..=PLACES / 4).filter(|number| live.insert(number * 4096).is_some());
        assert!(found.count() > PLACES / 4 - PLACES / 400);
    }
}
