//! Stacks of threads: copied at once wherever a thread happens to be, and walked in the copy alone.
//!
//! Neither the copying nor the walking allocates, locks or follows an address that may not be there, so that both may be done
//! inside the allocator and the copying in a signal handler. What lies deeper than the copy reaches is not seen.

use std::arch::asm;
use std::io;

use framehop::{
    CacheNative, ExplicitModuleSectionInfo, Module, MustNotAllocateDuringUnwind, UnwindRegsNative,
    Unwinder, UnwinderNative,
};
use libc::{PF_R, PF_X, PT_GNU_EH_FRAME, PT_LOAD, c_int, c_void};

/// So many frames of a stack are kept, the innermost first.
pub const DEPTH: usize = 64;
/// So much of a stack is copied, in bytes.
const WINDOW: usize = 64 << 10;
/// A piece of memory that is there as a whole or not at all.
const PAGE: usize = 4096;

/// The addresses that a stack is made of.
pub type Frames = [u64; DEPTH];

/// What a walk starts with.
#[derive(Clone, Copy, Default)]
pub struct Registers {
    pc: u64,
    sp: u64,
    fp: u64,
    #[cfg(target_arch = "aarch64")]
    lr: u64,
}

impl Registers {
    /// Those of the function that this is called in, which must not return before its stack is copied.
    #[inline(always)]
    pub fn here() -> Self {
        let mut here = Self::default();
        #[cfg(target_arch = "x86_64")]
        // SAFETY: registers are read and nothing is changed.
        unsafe {
            asm!(
                "lea {pc}, [rip]", "mov {sp}, rsp", "mov {fp}, rbp",
                pc = out(reg) here.pc, sp = out(reg) here.sp, fp = out(reg) here.fp,
                options(nomem, nostack, preserves_flags)
            );
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: registers are read and nothing is changed.
        unsafe {
            asm!(
                "adr {pc}, .", "mov {sp}, sp", "mov {fp}, x29", "mov {lr}, x30",
                pc = out(reg) here.pc, sp = out(reg) here.sp, fp = out(reg) here.fp, lr = out(reg) here.lr,
                options(nomem, nostack, preserves_flags)
            );
        }
        here
    }

    /// Those of the code that a signal has interrupted.
    pub fn interrupted(context: &libc::ucontext_t) -> Self {
        let machine = &context.uc_mcontext;
        #[cfg(target_arch = "x86_64")]
        return Self {
            pc: machine.gregs[libc::REG_RIP as usize] as u64,
            sp: machine.gregs[libc::REG_RSP as usize] as u64,
            fp: machine.gregs[libc::REG_RBP as usize] as u64,
        };
        #[cfg(target_arch = "aarch64")]
        return Self {
            pc: machine.pc,
            sp: machine.sp,
            fp: machine.regs[29],
            lr: machine.regs[30],
        };
    }

    fn unwind(self) -> UnwindRegsNative {
        #[cfg(target_arch = "x86_64")]
        return UnwindRegsNative::new(self.pc, self.sp, self.fp);
        #[cfg(target_arch = "aarch64")]
        return UnwindRegsNative::new(self.lr, self.sp, self.fp);
    }
}

/// A thread at one moment: its registers, and its stack from the stack pointer on.
pub struct Moment {
    registers: Registers,
    /// So much of `stack` is filled, in bytes.
    filled: usize,
    stack: Box<[u8]>,
}

impl Moment {
    /// Room for a moment.
    pub fn new() -> Self {
        Self {
            registers: Registers::default(),
            filled: 0,
            stack: vec![0; WINDOW].into_boxed_slice(),
        }
    }

    /// Fills in the calling thread's moment; a signal handler may call this.
    ///
    /// The kernel copies, page by page: where the stack's memory ends the copy ends, and no fault comes of it.
    pub fn take(&mut self, registers: Registers) {
        const NONE: libc::iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut pages = [NONE; WINDOW / PAGE + 1];
        let (mut at, mut left, mut count) = (registers.sp as usize, WINDOW, 0);
        while left > 0 && count < pages.len() {
            let length = (PAGE - at % PAGE).min(left);
            pages[count] = libc::iovec {
                iov_base: at as *mut c_void,
                iov_len: length,
            };
            (at, left, count) = (at.wrapping_add(length), left - length, count + 1);
        }
        let copy = libc::iovec {
            iov_base: self.stack.as_mut_ptr().cast(),
            iov_len: self.stack.len(),
        };
        // SAFETY: the kernel writes into `stack` only, and checks what it reads.
        let copied = unsafe {
            libc::process_vm_readv(libc::getpid(), &copy, 1, pages.as_ptr(), count as _, 0)
        };
        self.registers = registers;
        self.filled = copied.try_into().unwrap_or(0);
    }

    /// The word at an address of the stack.
    fn word(&self, address: u64) -> Result<u64, ()> {
        let at = address.checked_sub(self.registers.sp).ok_or(())? as usize;
        let bytes = self.stack[..self.filled].get(at..).ok_or(())?;
        bytes
            .first_chunk()
            .map(|word| u64::from_ne_bytes(*word))
            .ok_or(())
    }
}

/// Whether stacks can be copied here.
///
/// # Errors
/// What the kernel says against it.
pub fn check() -> io::Result<()> {
    let mut moment = Moment::new();
    moment.take(Registers::here());
    if moment.filled == 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Finds the callers, with the unwind tables of the program and the libraries that were loaded when it was made.
pub struct Walker {
    unwinder: UnwinderNative<&'static [u8], MustNotAllocateDuringUnwind>,
    cache: CacheNative<MustNotAllocateDuringUnwind>,
}

impl Walker {
    /// Looks at what is loaded.
    pub fn new() -> Self {
        let mut unwinder = UnwinderNative::new();
        // SAFETY: the callback gets what it expects, and is not called after this.
        unsafe { libc::dl_iterate_phdr(Some(add), (&raw mut unwinder).cast()) };
        Self {
            unwinder,
            cache: CacheNative::new_in(),
        }
    }

    /// Fills in the frames, and says how many there are. Each is an address inside of an instruction that was under way.
    pub fn walk(&mut self, moment: &Moment, frames: &mut Frames) -> usize {
        let registers = moment.registers;
        let mut read = |address| moment.word(address);
        let cache = &mut self.cache;
        let mut callers =
            self.unwinder
                .iter_frames(registers.pc, registers.unwind(), cache, &mut read);
        let mut count = 0;
        while count < DEPTH
            && let Ok(Some(frame)) = callers.next()
        {
            frames[count] = frame.address_for_lookup();
            count += 1;
        }
        count
    }
}

/// Adds a loaded object to an unwinder.
///
/// # Safety
/// Called by `dl_iterate_phdr` with the unwinder of `Walker::new`.
unsafe extern "C" fn add(info: *mut libc::dl_phdr_info, _: usize, unwinder: *mut c_void) -> c_int {
    // SAFETY: the linker gives a valid description, whose headers live as long as the object is loaded.
    let (info, headers) = unsafe {
        let info = &*info;
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
        (info, headers)
    };
    // SAFETY: promised by the caller.
    let unwinder = unsafe {
        &mut *unwinder.cast::<UnwinderNative<&'static [u8], MustNotAllocateDuringUnwind>>()
    };
    // The bytes from an address of the object to the end of its segment.
    let bytes = |address: u64| -> Option<&'static [u8]> {
        let segment = headers.iter().find(|header| {
            let readable = header.p_type == PT_LOAD && header.p_flags & PF_R != 0;
            readable && (header.p_vaddr..header.p_vaddr + header.p_filesz).contains(&address)
        })?;
        let length = segment.p_vaddr + segment.p_filesz - address;
        let start = (info.dlpi_addr + address) as *const u8;
        // SAFETY: within a readable segment; libraries that were loaded stay, because nothing here unloads any.
        Some(unsafe { std::slice::from_raw_parts(start, length as usize) })
    };
    let code = headers
        .iter()
        .filter(|header| header.p_type == PT_LOAD && header.p_flags & PF_X != 0);
    let ends = code.map(|header| (header.p_vaddr, header.p_vaddr + header.p_memsz));
    let ends = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    let index = headers
        .iter()
        .find(|header| header.p_type == PT_GNU_EH_FRAME);
    if let (Some((start, end)), Some(index)) = (ends, index)
        && let Some(table) = bytes(index.p_vaddr)
        && let Some(frames_at) = frames_at(index.p_vaddr, table)
        && let Some(frames) = bytes(frames_at)
    {
        let table = &table[..table.len().min(index.p_memsz as usize)];
        let sections = ExplicitModuleSectionInfo {
            eh_frame_svma: Some(frames_at..frames_at + frames.len() as u64),
            eh_frame: Some(frames),
            eh_frame_hdr_svma: Some(index.p_vaddr..index.p_vaddr + table.len() as u64),
            eh_frame_hdr: Some(table),
            ..ExplicitModuleSectionInfo::default()
        };
        let range = info.dlpi_addr + start..info.dlpi_addr + end;
        unwinder.add_module(Module::new(String::new(), range, info.dlpi_addr, sections));
    }
    0
}

/// Where the frame descriptions are, by the header of their index: only in the encoding that linkers use.
fn frames_at(index: u64, table: &[u8]) -> Option<u64> {
    /// Four bytes, signed, relative to themselves (DW_EH_PE_pcrel | DW_EH_PE_sdata4).
    const RELATIVE: u8 = 0x1b;
    let (&[1, RELATIVE, ..], offset) = table.split_first_chunk::<4>()? else {
        return None;
    };
    let offset = i32::from_ne_bytes(*offset.first_chunk()?);
    (index + 4).checked_add_signed(offset.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn inner(moment: &mut Moment) -> u64 {
        moment.take(Registers::here());
        std::hint::black_box(1)
    }

    #[inline(never)]
    fn outer(moment: &mut Moment) -> u64 {
        inner(moment) + std::hint::black_box(1)
    }

    fn name(address: u64) -> String {
        let mut name = String::new();
        backtrace::resolve((address + 1) as *mut c_void, |symbol| {
            name = symbol
                .name()
                .map(|name| format!("{name:#}"))
                .unwrap_or_default();
        });
        name
    }

    #[test]
    fn a_walk_names_the_callers_innermost_first() {
        let mut moment = Moment::new();
        outer(&mut moment);
        let mut frames = [0; DEPTH];
        let count = Walker::new().walk(&moment, &mut frames);
        let names: Vec<String> = frames[..count].iter().map(|frame| name(*frame)).collect();
        // How much of its path a name has depends on the debug information.
        let expected = ["inner", "outer", "a_walk_names_the_callers_innermost_first"];
        for (name, expected) in names.iter().zip(expected) {
            assert!(name.ends_with(expected), "{names:#?}");
        }
        // All the way down to where the thread began, through the standard library and that of C.
        assert!(
            names.iter().any(|name| name.contains("thread_start")),
            "{names:#?}"
        );
        assert!(count < DEPTH);
    }

    #[test]
    fn an_address_that_is_not_there_is_an_end() {
        let mut moment = Moment::new();
        for sp in [0, 8, u64::MAX - 100, 1 << 63] {
            let registers = Registers {
                sp,
                pc: 1,
                ..Registers::default()
            };
            moment.take(registers);
            assert_eq!(moment.filled, 0, "{sp:x}");
            assert_eq!(moment.word(sp), Err(()));
            let mut frames = [0; DEPTH];
            assert_eq!(Walker::new().walk(&moment, &mut frames), 1);
        }
    }
}
