//! Memory that is kept although nobody uses it, and when it is given back to the kernel: the allocator's, and the program's
//! own pages that only its start needed.

use std::sync::Arc;
use std::time::Duration;

use crate::telemetry::Telemetry;

/// When the start is over.
const START: Duration = Duration::from_secs(1);
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

/// Unmaps the pages of code and constants, which come back from the page cache as they are needed.
///
/// Reading the configuration, compiling filters and shaking hands for the first time touches most of the program once.
fn forget_start() {
    // SAFETY: the callback gets what it expects.
    unsafe { libc::dl_iterate_phdr(Some(unmap), std::ptr::null_mut()) };
}

/// Unmaps a loaded object's pages that nobody can have written to.
///
/// # Safety
/// Called by `dl_iterate_phdr`.
unsafe extern "C" fn unmap(
    info: *mut libc::dl_phdr_info,
    _: usize,
    _: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: usize = 4096;
    // SAFETY: the linker gives a valid description.
    let (base, headers) = unsafe {
        let info = &*info;
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
        (info.dlpi_addr as usize, headers)
    };
    let fixed = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(fixed) {
        let start = (base + header.p_vaddr as usize) & !(PAGE - 1);
        let end = base + (header.p_vaddr + header.p_filesz) as usize;
        // Where pages are larger, or the object has no file, the call fails and changes nothing.
        // SAFETY: the pages are the file's own; whatever is read there next is read from the file again.
        unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_DONTNEED) };
    }
    0
}

/// Gives memory back once the start is over and after every burst of flows, for ever.
pub async fn follow(telemetry: Arc<Telemetry>) {
    tokio::time::sleep(START).await;
    forget_start();
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
