//! The heap profile: the system's allocator, which remembers the stacks of about one allocation per 512 KiB while it is asked to.
//!
//! Switched off it costs one load per call. Switched on, an allocation is sampled with a likelihood that grows with its size
//! (a Poisson process over the bytes), and stands for as many as that likelihood says. Nothing on the way of an allocation
//! allocates, and it waits a bounded time only: whoever finds that others sample for long lets its next allocation be sampled
//! instead. Nothing allocates while it holds the lock.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::live::{Live, PLACES};
use super::pprof::{Builder, Kind};
use super::stack::{self, DEPTH, Frames, Moment, Registers, Walker};

/// So many bytes are allocated from one sample to the next, on average.
const INTERVAL: usize = 512 << 10;
/// So many different stacks are told apart.
const STACKS: usize = 4096;
/// Places of the stacks' index, a power of two: at most half of it is used.
const INDEX: usize = 2 * STACKS;

/// Functions that belong to the allocator itself.
const OWN: &str = "<?warren::profile::heap::(Heap|Sampler|allocated).*|<?alloc::alloc::.*|__rust.*";
const KINDS: [Kind; 4] = [
    ("alloc_objects", "count"),
    ("alloc_space", "bytes"),
    ("inuse_objects", "count"),
    ("inuse_space", "bytes"),
];

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    #[error("heap profiling not active; activate with /debug/pprof/heap/profiling?activate=true")]
    Inactive,
    #[error("the kernel does not let the process read its own stacks: {0}")]
    Unreadable(io::Error),
    #[error("cannot compress the profile: {0}")]
    Compress(io::Error),
}

/// The system's allocator with an eye on it; made to be the program's global one.
pub struct Heap;

static ACTIVE: AtomicBool = AtomicBool::new(false);
static LIVE: Live = Live::new();
static SAMPLER: Mutex<Option<Box<Sampler>>> = Mutex::new(None);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Heap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ACTIVE.load(Ordering::Relaxed) {
            // SAFETY: promised by the caller.
            return allocated(unsafe { System.alloc(layout) }, layout.size());
        }
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if ACTIVE.load(Ordering::Relaxed) {
            // SAFETY: promised by the caller.
            return allocated(unsafe { System.alloc_zeroed(layout) }, layout.size());
        }
        // SAFETY: promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if ACTIVE.load(Ordering::Relaxed) {
            released(pointer);
        }
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if ACTIVE.load(Ordering::Relaxed) {
            // Before the address can become another's; if there is no memory the old one is alive, but no longer known.
            released(pointer);
            // SAFETY: promised by the caller.
            return allocated(unsafe { System.realloc(pointer, layout, size) }, size);
        }
        // SAFETY: promised by the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Begins to sample from nothing, or stops and forgets. Says whether it samples now.
///
/// # Errors
/// When stacks cannot be read here.
pub fn activate(active: bool) -> Result<bool, HeapError> {
    let mut fresh = None;
    if active && !ACTIVE.load(Ordering::Relaxed) {
        stack::check().map_err(HeapError::Unreadable)?;
        fresh = Some(Box::new(Sampler::new()));
    }
    let old;
    {
        let mut sampler = sampler();
        if active && sampler.is_some() {
            return Ok(true);
        }
        LIVE.clear();
        old = std::mem::replace(&mut *sampler, fresh);
        ACTIVE.store(sampler.is_some(), Ordering::Relaxed);
    }
    // Outside of the lock, as everything that frees or allocates much.
    drop(old);
    Ok(active)
}

/// The profile of what was sampled since the activation, compressed with gzip. Blocks.
///
/// # Errors
/// When nothing is sampled.
pub fn profile() -> Result<Vec<u8>, HeapError> {
    let mut found = Found::new();
    found.read(sampler().as_ref().ok_or(HeapError::Inactive)?);
    let mut builder = Builder::new(&KINDS, (("space", "bytes"), INTERVAL as i64));
    builder.lasted(found.lasted);
    builder.shows("inuse_space");
    builder.hides(OWN);
    if found.lost > 0 {
        builder.remark(&format!(
            "there was no room for {} more samples",
            found.lost
        ));
    }
    for (stack, values) in found.samples() {
        let values = values.map(|value| value as i64).to_vec();
        builder.sample(stack.frames(), values, &[]);
    }
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed
        .write_all(&builder.finish())
        .map_err(HeapError::Compress)?;
    packed.finish().map_err(HeapError::Compress)
}

fn sampler() -> MutexGuard<'static, Option<Box<Sampler>>> {
    SAMPLER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sampler if it can be had within so many turns of the other threads.
fn sampler_soon() -> Option<MutexGuard<'static, Option<Box<Sampler>>>> {
    const TURNS: usize = 1000;
    for _ in 0..TURNS {
        match SAMPLER.try_lock() {
            Ok(sampler) => return Some(sampler),
            Err(TryLockError::Poisoned(sampler)) => return Some(sampler.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

thread_local! {
    static COUNTDOWN: Countdown = const { Countdown { left: Cell::new(0), seed: Cell::new(0) } };
}

/// How far a thread is from its next sample. It has no destructor, so that it may be used while a thread ends.
struct Countdown {
    /// Bytes.
    left: Cell<i64>,
    /// State of the generator of random numbers; zero before the first is drawn.
    seed: Cell<u64>,
}

impl Countdown {
    /// Counts an allocation, and says whether one is due to be sampled.
    fn count(&self, size: usize) -> bool {
        if self.seed.get() == 0 {
            static SEED: AtomicU64 = AtomicU64::new(1);
            let seed = SEED.fetch_add(2, Ordering::Relaxed);
            self.seed.set(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            self.draw();
        }
        let left = self.left.get().saturating_sub_unsigned(size as u64);
        self.left.set(left);
        left <= 0
    }

    /// Draws the way to the next sample.
    fn draw(&self) {
        // Marsaglia's xorshift.
        let mut seed = self.seed.get();
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        self.seed.set(seed);
        // Uniform in (0, 1], of 53 bits.
        let uniform = ((seed >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        self.left.set((-uniform.ln() * INTERVAL as f64) as i64);
    }
}

/// Counts an allocation, and remembers it if it is due. Gives the pointer back.
#[cold]
fn allocated(pointer: *mut u8, size: usize) -> *mut u8 {
    let due = !pointer.is_null() && COUNTDOWN.with(|countdown| countdown.count(size));
    if due
        && let Some(mut sampler) = sampler_soon()
        && let Some(sampler) = sampler.as_mut()
    {
        COUNTDOWN.with(Countdown::draw);
        // An allocator must not unwind, whatever happens.
        let _ = catch_unwind(AssertUnwindSafe(|| sampler.add(pointer as usize, size)));
    }
    pointer
}

#[cold]
fn released(pointer: *mut u8) {
    LIVE.remove(pointer as usize);
}

/// So many allocations of a size one sampled allocation stands for.
fn weight(size: usize) -> f64 {
    1.0 / -(-(size as f64) / INTERVAL as f64).exp_m1()
}

/// A stack that allocated.
#[derive(Clone, Copy)]
struct Stack {
    frames: Frames,
    depth: usize,
    objects: f64,
    bytes: f64,
}

impl Stack {
    fn frames(&self) -> &[u64] {
        &self.frames[..self.depth]
    }
}

/// All that is known of samples. Everything has its room from the start.
struct Sampler {
    since: Instant,
    walker: Walker,
    moment: Moment,
    stacks: Vec<Stack>,
    /// Places in `stacks`, from one, by the hash of the frames and the next free place; zero is none.
    index: Vec<u16>,
    /// Place in `stacks` and size of what is alive, by its place in `LIVE`.
    live: Vec<(u16, usize)>,
    /// Samples without a place.
    lost: u64,
}

impl Sampler {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            walker: Walker::new(),
            moment: Moment::new(),
            stacks: Vec::with_capacity(STACKS),
            index: vec![0; INDEX],
            live: vec![(0, 0); PLACES],
            lost: 0,
        }
    }

    /// Remembers an allocation. Does not allocate.
    #[inline(never)]
    fn add(&mut self, address: usize, size: usize) {
        self.moment.take(Registers::here());
        let mut frames = [0; DEPTH];
        let depth = self.walker.walk(&self.moment, &mut frames);
        let Some(stack) = self.stack(&frames, depth) else {
            self.lost += 1;
            return;
        };
        let weight = weight(size);
        self.stacks[stack].objects += weight;
        self.stacks[stack].bytes += weight * size as f64;
        match LIVE.insert(address) {
            Some(place) => self.live[place] = (stack as u16, size),
            None => self.lost += 1,
        }
    }

    /// The place of a stack, new or known; none when there is no room.
    fn stack(&mut self, frames: &Frames, depth: usize) -> Option<usize> {
        let mut hasher = DefaultHasher::new();
        frames[..depth].hash(&mut hasher);
        let mut at = hasher.finish() as usize % INDEX;
        while let Some(known) = usize::from(self.index[at]).checked_sub(1) {
            let stack = &self.stacks[known];
            if *stack.frames() == frames[..depth] {
                return Some(known);
            }
            at = (at + 1) % INDEX;
        }
        if self.stacks.len() == STACKS {
            return None;
        }
        self.stacks.push(Stack {
            frames: *frames,
            depth,
            objects: 0.0,
            bytes: 0.0,
        });
        self.index[at] = self.stacks.len() as u16;
        Some(self.stacks.len() - 1)
    }
}

/// A copy of what was sampled.
struct Found {
    lasted: Duration,
    lost: u64,
    stacks: Vec<Stack>,
    /// Objects and bytes that are alive, by the place of their stack.
    alive: Vec<(f64, f64)>,
}

impl Found {
    /// Room for everything, so that reading does not allocate.
    fn new() -> Self {
        Self {
            lasted: Duration::ZERO,
            lost: 0,
            stacks: Vec::with_capacity(STACKS),
            alive: vec![(0.0, 0.0); STACKS],
        }
    }

    fn read(&mut self, sampler: &Sampler) {
        self.lasted = sampler.since.elapsed();
        self.lost = sampler.lost;
        self.stacks.extend_from_slice(&sampler.stacks);
        for place in LIVE.places() {
            let (stack, size) = sampler.live[place];
            let (objects, bytes) = &mut self.alive[usize::from(stack)];
            *objects += weight(size);
            *bytes += weight(size) * size as f64;
        }
    }

    /// Every stack with the values of `KINDS`.
    fn samples(&self) -> impl Iterator<Item = (&Stack, [f64; KINDS.len()])> {
        self.stacks
            .iter()
            .zip(&self.alive)
            .map(|(stack, alive)| (stack, [stack.objects, stack.bytes, alive.0, alive.1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums over all stacks.
    fn sums() -> [f64; KINDS.len()] {
        let mut found = Found::new();
        found.read(sampler().as_ref().unwrap());
        let mut sums = [0.0; KINDS.len()];
        for (_, values) in found.samples() {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        sums
    }

    // The program's own allocator is the standard one in this test, so only what is asked of `Heap` is seen.
    #[test]
    fn what_is_allocated_and_freed_is_estimated() {
        const SIZE: usize = 16 << 10;
        const COUNT: usize = 8192;
        let layout = Layout::from_size_align(SIZE, 16).unwrap();
        // SAFETY: of a size that is not zero, and freed below with the same layout.
        let allocate = || (0..COUNT).map(|_| unsafe { Heap.alloc(layout) } as usize);
        let before: Vec<usize> = allocate().collect();
        assert!(matches!(profile(), Err(HeapError::Inactive)));
        assert!(activate(true).unwrap());
        assert!(activate(true).unwrap(), "once more changes nothing");
        // Allocators of other threads are not disturbed.
        let pointers: Vec<usize> = std::thread::scope(|scope| {
            let halves = [(); 2].map(|()| scope.spawn(|| allocate().collect::<Vec<_>>()));
            halves
                .into_iter()
                .flat_map(|half| half.join().unwrap())
                .collect()
        });
        let all = (2 * COUNT * SIZE) as f64;
        let [objects, bytes, alive, alive_bytes] = sums();
        // 512 samples: the estimate's standard deviation is less than a twentieth.
        let near = |value: f64, truth: f64| (value - truth).abs() < truth / 4.0;
        assert!(near(bytes, all), "{bytes} of {all}");
        assert!(near(objects, (2 * COUNT) as f64), "{objects}");
        assert!(
            near(alive, objects) && near(alive_bytes, bytes),
            "{alive} {alive_bytes}"
        );
        let free = |pointers: &[usize]| {
            for pointer in pointers {
                // SAFETY: allocated above with this layout, and freed once.
                unsafe { Heap.dealloc(*pointer as *mut u8, layout) };
            }
        };
        free(&before);
        free(&pointers[..COUNT]);
        let [_, still, _, alive_bytes] = sums();
        assert_eq!(still, bytes);
        assert!(near(alive_bytes, all / 2.0), "{alive_bytes} of {all}");
        assert_eq!(profile().unwrap()[..2], [0x1f, 0x8b], "it is of gzip");
        // SAFETY: allocated above; the new size is not zero, and it is freed with it.
        let grown = unsafe {
            let grown = Heap.realloc(pointers[COUNT] as *mut u8, layout, 4 * SIZE);
            Heap.dealloc(grown, Layout::from_size_align(4 * SIZE, 16).unwrap());
            grown
        };
        assert!(!grown.is_null());
        free(&pointers[COUNT + 1..]);
        assert_eq!(sums()[2..], [0.0, 0.0]);
        assert!(!activate(false).unwrap());
        assert!(matches!(profile(), Err(HeapError::Inactive)));
    }
}
