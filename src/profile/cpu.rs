//! The CPU profile: the kernel's profiling timer interrupts whatever runs, and the interrupted stack is counted.
//!
//! The signal handler only copies (`stack::Moment`); walking and counting is done by the thread that records. One profile at a
//! time, because a process has one such timer.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use libc::{c_int, c_void};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::time::TimeValLike;

use super::pprof::{Builder, Kind, nanos};
use super::stack::{self, DEPTH, Moment, Registers, Walker};

/// So many stacks wait to be counted; what comes while all are taken is only added to the others' weight.
const SLOTS: usize = 32;
/// How often they are looked at.
const LOOK: Duration = Duration::from_millis(5);
const CPU: Kind = ("cpu", "nanoseconds");

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error("a CPU profile is being taken already; try again when it has ended")]
    Busy,
    #[error("the kernel does not let the process read its own stacks: {0}")]
    Unreadable(io::Error),
    #[error("cannot start the profiling timer: {0}")]
    Timer(io::Error),
}

/// Records for a while, and gives the profile. `frequency` is in samples per second of CPU time. Ends early, with
/// nothing, once `stop` is set. Blocks.
///
/// # Errors
/// Why it cannot.
pub fn record(length: Duration, frequency: u32, stop: &AtomicBool) -> Result<Vec<u8>, CpuError> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = match ONE.try_lock() {
        Err(TryLockError::WouldBlock) => return Err(CpuError::Busy),
        Ok(one) => one,
        Err(TryLockError::Poisoned(one)) => one.into_inner(),
    };
    stack::check().map_err(CpuError::Unreadable)?;
    handle_ticks().map_err(CpuError::Timer)?;
    let (start, spent) = (Instant::now(), cpu_time());
    let mut counts = Counts::new();
    let ring = Published::new();
    let period = Duration::from_secs(1) / frequency;
    let timer = Timer::start(period).map_err(CpuError::Timer)?;
    while start.elapsed() < length && !stop.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK.min(length.saturating_sub(start.elapsed())));
        ring.get().drain(|slot| counts.add(slot));
    }
    drop(timer);
    let (length, spent) = (start.elapsed(), cpu_time().saturating_sub(spent));
    let ring = ring.take_back();
    ring.drain(|slot| counts.add(slot));
    if stop.load(Ordering::Relaxed) {
        return Ok(Vec::new());
    }

    let mut builder = Builder::new(&[("samples", "count"), CPU], (CPU, nanos(period)));
    builder.lasted(length);
    let (stacks, sum) = (counts.stacks, counts.sum);
    let missed = ring.missed.load(Ordering::Relaxed);
    if missed > 0 {
        builder.remark(&format!("{missed} more samples came too quickly"));
    }
    for ((frames, thread), count) in stacks {
        // The kernel's tick may be coarser than the period: a sample stands for its share of what was really spent.
        let share = spent.as_nanos() * u128::from(count) / u128::from(sum);
        let values = vec![count as i64, share.try_into().unwrap_or(i64::MAX)];
        let thread = String::from_utf8_lossy(&thread);
        builder.sample(
            &frames,
            values,
            &[("thread", thread.trim_end_matches('\0'))],
        );
    }
    Ok(builder.finish())
}

/// The CPU time that the process has spent.
fn cpu_time() -> Duration {
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        let spent = usage.user_time() + usage.system_time();
        Duration::from_micros(spent.num_microseconds().try_into().unwrap_or(0))
    })
}

/// A thread's name as the kernel keeps it.
type Name = [u8; 16];

/// How often each stack was seen in each thread.
struct Counts {
    walker: Walker,
    stacks: HashMap<(Vec<u64>, Name), u64>,
    sum: u64,
}

impl Counts {
    fn new() -> Self {
        Self {
            walker: Walker::new(),
            stacks: HashMap::new(),
            sum: 0,
        }
    }

    fn add(&mut self, taken: &Taken) {
        let mut frames = [0; DEPTH];
        let count = self.walker.walk(&taken.moment, &mut frames);
        let key = (frames[..count].to_vec(), taken.thread);
        *self.stacks.entry(key).or_default() += 1;
        self.sum += 1;
    }
}

/// What a tick found.
struct Taken {
    moment: Moment,
    thread: Name,
}

const FREE: u8 = 0;
const HELD: u8 = 1;
const FULL: u8 = 2;

/// `taken` belongs to whoever set `state` to `HELD`, and to the recorder while it is `FULL`.
struct Slot {
    state: AtomicU8,
    taken: UnsafeCell<Taken>,
}

struct Ring {
    slots: Vec<Slot>,
    missed: AtomicU64,
}

// SAFETY: what is not atomic is only touched by the one that the slot's state names.
unsafe impl Sync for Ring {}

impl Ring {
    fn new() -> Self {
        let slot = |_| Slot {
            state: AtomicU8::new(FREE),
            taken: UnsafeCell::new(Taken {
                moment: Moment::new(),
                thread: Name::default(),
            }),
        };
        Self {
            slots: (0..SLOTS).map(slot).collect(),
            missed: AtomicU64::new(0),
        }
    }

    /// Notes what a signal has interrupted; the handler's only work.
    fn tick(&self, context: &libc::ucontext_t) {
        let free = self.slots.iter().find(|slot| {
            let held =
                slot.state
                    .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed);
            held.is_ok()
        });
        let Some(slot) = free else {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        // SAFETY: the slot was just made this handler's own.
        let taken = unsafe { &mut *slot.taken.get() };
        taken.moment.take(Registers::interrupted(context));
        // SAFETY: the kernel writes 16 bytes.
        unsafe { libc::prctl(libc::PR_GET_NAME, taken.thread.as_mut_ptr()) };
        slot.state.store(FULL, Ordering::Release);
    }

    fn drain(&self, mut take: impl FnMut(&Taken)) {
        for slot in &self.slots {
            if slot.state.load(Ordering::Acquire) == FULL {
                // SAFETY: handlers leave a full slot alone, and there is one recorder.
                take(unsafe { &*slot.taken.get() });
                slot.state.store(FREE, Ordering::Release);
            }
        }
    }
}

/// The ring that ticks go to; none between profiles.
static RING: AtomicPtr<Ring> = AtomicPtr::new(std::ptr::null_mut());
/// How many handlers are at work.
static INSIDE: AtomicUsize = AtomicUsize::new(0);

/// A ring that handlers may be using.
struct Published(*mut Ring);

impl Published {
    fn new() -> Self {
        let ring = Box::into_raw(Box::new(Ring::new()));
        RING.store(ring, Ordering::SeqCst);
        Self(ring)
    }

    fn get(&self) -> &Ring {
        // SAFETY: given back only by `retire`.
        unsafe { &*self.0 }
    }

    fn take_back(self) -> Box<Ring> {
        let ring = self.retire();
        std::mem::forget(self);
        ring
    }

    /// Takes the ring from the handlers. Called once.
    fn retire(&self) -> Box<Ring> {
        RING.store(std::ptr::null_mut(), Ordering::SeqCst);
        // A handler that saw the ring was counted before it looked.
        while INSIDE.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: it came from a box, and nobody else has it any more.
        unsafe { Box::from_raw(self.0) }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        drop(self.retire());
    }
}

extern "C" fn on_tick(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    let errno = nix::errno::Errno::last();
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let ring = RING.load(Ordering::SeqCst);
    // SAFETY: the ring stays while a handler is inside, and the kernel gives a valid context.
    if let Some(ring) = unsafe { ring.as_ref() } {
        ring.tick(unsafe { &*context.cast() });
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    errno.set();
}

/// Handles the timer's signal from now on. It is never given up: a last one may still be under way, and would end the process.
fn handle_ticks() -> io::Result<()> {
    let flags = SaFlags::SA_RESTART | SaFlags::SA_SIGINFO;
    let action = SigAction::new(SigHandler::SigAction(on_tick), flags, SigSet::empty());
    // SAFETY: the handler only does what signal handlers may: atomics, two system calls, and writing to memory of its own.
    unsafe { sigaction(Signal::SIGPROF, &action)? };
    Ok(())
}

/// The process's profiling timer, running.
struct Timer;

impl Timer {
    fn start(period: Duration) -> io::Result<Self> {
        Self::set(period)?;
        Ok(Self)
    }

    fn set(period: Duration) -> io::Result<()> {
        let time = libc::timeval {
            tv_sec: period.as_secs() as libc::time_t,
            tv_usec: libc::suseconds_t::from(period.subsec_micros() as i32),
        };
        let timer = libc::itimerval {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: a plain system call that reads `timer`.
        let result = unsafe { libc::setitimer(ITIMER_PROF, &timer, std::ptr::null_mut()) };
        nix::errno::Errno::result(result)?;
        Ok(())
    }
}

/// The timer that counts the CPU time of the whole process.
const ITIMER_PROF: c_int = 2;

impl Drop for Timer {
    fn drop(&mut self) {
        // Fails only for values that the kernel would have refused at the start.
        let _ = Self::set(Duration::ZERO);
    }
}
