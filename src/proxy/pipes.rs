//! The pipes through which a worker's bulk flows move in the kernel: a few, lent for as long as they hold bytes.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// What a pipe should take, in bytes. The kernel may allow less (`/proc/sys/fs/pipe-user-pages-soft`).
const SIZE: usize = 1 << 20;
/// A pipe that takes less is of no use.
const LEAST: usize = 64 << 10;
/// Empty pipes that a worker keeps.
const SPARE: usize = 8;
/// Pipes that a worker may have in all: slow readers could hold one each.
const MOST: usize = 64;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { spare: Vec::new(), lent: 0 }) };
}

struct Pool {
    spare: Vec<Pipe>,
    lent: usize,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

/// A pipe on loan. It goes back when dropped, and is closed instead if it still holds bytes.
pub struct Loan {
    /// Only none while it is dropped.
    pipe: Option<Pipe>,
    held: usize,
}

impl Loan {
    /// An empty pipe; none when there are too many or the kernel gives none that is large enough.
    pub fn take() -> Option<Self> {
        POOL.with_borrow_mut(|pool| {
            if pool.lent == MOST {
                return None;
            }
            let pipe = match pool.spare.pop() {
                Some(pipe) => pipe,
                None => Pipe::new().ok()?,
            };
            pool.lent += 1;
            Some(Self {
                pipe: Some(pipe),
                held: 0,
            })
        })
    }

    /// Whether all that came in has gone out.
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what a socket has received into the empty pipe; gives how much, 0 at the socket's end.
    ///
    /// # Errors
    /// The kernel's error; `WouldBlock` means that the socket has nothing.
    pub fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        // With bytes in it, a full pipe could not be told from an empty socket.
        debug_assert!(self.is_empty());
        let Some(pipe) = &self.pipe else { return Ok(0) };
        self.held = transfer(from, &pipe.write, pipe.size)?;
        Ok(self.held)
    }

    /// Moves bytes on to a socket; gives how many.
    ///
    /// # Errors
    /// The kernel's error; `WouldBlock` means that the socket takes nothing now.
    pub fn drain(&mut self, to: impl AsFd) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Ok(0) };
        let moved = transfer(&pipe.read, to, self.held)?;
        if moved == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held -= moved;
        Ok(moved)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let pipe = self.pipe.take().filter(|_| self.held == 0);
        // The thread may be ending; then the pipe simply closes.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.lent -= 1;
            if pool.spare.len() < SPARE {
                pool.spare.extend(pipe);
            }
        });
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let mut wanted = SIZE;
        while wanted >= LEAST {
            match fcntl(&write, FcntlArg::F_SETPIPE_SZ(wanted as i32)) {
                Ok(size) => {
                    let size = size as usize;
                    return Ok(Self { read, write, size });
                }
                Err(Errno::EPERM | Errno::ENOMEM) => wanted /= 2,
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::OutOfMemory.into())
    }
}

fn transfer(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, most, flags)?)
}

#[cfg(test)]
pub mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// How many pipes this thread keeps and how many it has lent.
    pub fn pipes() -> (usize, usize) {
        POOL.with_borrow(|pool| (pool.spare.len(), pool.lent))
    }

    #[test]
    fn an_empty_pipe_is_lent_again_and_a_filled_one_never() {
        let (mut near, end) = UnixStream::pair().unwrap();
        near.write_all(b"hello").unwrap();
        let mut loan = Loan::take().unwrap();
        assert_eq!(loan.fill(&end).unwrap(), 5);
        assert_eq!(pipes(), (0, 1));
        loan.drain(&end).unwrap();
        assert!(loan.is_empty());
        let mut back = [0; 5];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
        drop(loan);
        assert_eq!(pipes(), (1, 0));

        let mut loan = Loan::take().unwrap();
        near.write_all(b"left").unwrap();
        assert_eq!(loan.fill(&end).unwrap(), 4);
        drop(loan);
        assert_eq!(pipes(), (0, 0));
    }

    #[test]
    fn a_worker_has_a_bounded_number_of_pipes() {
        let loans: Vec<_> = std::iter::from_fn(Loan::take).collect();
        assert_eq!(loans.len(), MOST);
        drop(loans);
        assert_eq!(pipes(), (SPARE, 0));
    }
}
