//! Batches of file transfers by io_uring.

use std::io::{IoSlice, IoSliceMut};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;

/// One vectored transfer at an offset of the ring's file.
pub enum Transfer<'a, 'b> {
    /// From memory to the file.
    Write(u64, &'a [IoSlice<'b>]),
    /// From the file to memory.
    Read(u64, &'a mut [IoSliceMut<'b>]),
}

/// A ring for one file, for the thread that made it: the manager's threads have descriptor tables of their own, so in another
/// thread the ring's descriptor may be another ring's. The ring holds its own reference to the file, so it keeps
/// working when the program closes the file's descriptor.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    pid: i32,
    tid: u32,
}

impl Ring {
    /// The most transfers that one [`Self::run`] takes.
    pub const MAX: usize = 64;

    /// Entries of the submission and of the completion queue: numbers that no program asks for (the kernel rounds
    /// them up to 64 and 128), by which the launcher tells the manager's rings from a program's.
    pub const SIGN: (u32, u32) = (61, 113);

    /// A ring for `file`. An error (`ENOSYS`, `EPERM`) where the kernel does not allow io_uring.
    pub fn new(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let ring =
            IoUring::builder().dontfork().setup_cqsize(Self::SIGN.1).build(Self::SIGN.0).map_err(errno)?;
        ring.submitter().register_files(&[file.as_raw_fd()]).map_err(errno)?;
        Ok(Self { ring: ManuallyDrop::new(ring), pid: pid(), tid: super::gettid() })
    }

    /// Whether this thread made the ring. A child that inherited the object must not use it either: the ring is its
    /// parent's, and its memory is not mapped in the child.
    pub fn is_ours(&self) -> bool {
        self.tid == super::gettid() && self.pid == pid()
    }

    /// Whether another thread of this process made the ring, and may go on using it.
    pub fn is_anothers(&self) -> bool {
        self.pid == pid() && self.tid != super::gettid()
    }

    /// Runs up to [`Self::MAX`] transfers and waits for all of them. Each result is a number of bytes or a negated
    /// errno. An error: the ring does not work (its descriptor was closed); nothing is in flight any more,
    /// some transfers may have been done, and the ring must be given up.
    pub fn run(&mut self, transfers: &mut [Transfer<'_, '_>], results: &mut [i32]) -> Result<(), Errno> {
        assert!(transfers.len() <= Self::MAX && transfers.len() <= results.len());
        if !self.is_ours() {
            return Err(Errno::BADF);
        }
        for (i, transfer) in transfers.iter_mut().enumerate() {
            let file = types::Fixed(0);
            let entry = match transfer {
                Transfer::Write(at, bufs) => {
                    opcode::Writev::new(file, bufs.as_ptr().cast(), bufs.len() as u32).offset(*at).build()
                }
                Transfer::Read(at, bufs) => {
                    opcode::Readv::new(file, bufs.as_mut_ptr().cast(), bufs.len() as u32).offset(*at).build()
                }
            };
            self.push(&entry.user_data(i as u64))?;
        }
        self.finish(transfers.len(), results)
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), Errno> {
        // SAFETY: the buffers stay borrowed until `run` returns, and `finish` does not return while the kernel
        // may use them.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| Errno::BUSY)
    }

    fn finish(&mut self, total: usize, results: &mut [i32]) -> Result<(), Errno> {
        let mut done = 0;
        let mut broken = None;
        loop {
            for entry in self.ring.completion() {
                if let Some(result) = results.get_mut(entry.user_data() as usize) {
                    *result = entry.result();
                }
                done += 1;
            }
            let queued = self.ring.submission().len();
            match broken {
                // What was never submitted is not waited for.
                Some(e) if done + queued >= total => return Err(e),
                None if done >= total => return Ok(()),
                // Completions arrive in the ring's memory without a working descriptor, too.
                Some(_) => super::yield_now(),
                None => match self.ring.submit_and_wait(total - done) {
                    Ok(_) => {}
                    Err(e) => match Errno::from_io_error(&e) {
                        Some(Errno::INTR | Errno::AGAIN | Errno::BUSY) => super::yield_now(),
                        other => broken = Some(other.unwrap_or(Errno::IO)),
                    },
                },
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // In a child the ring's memory is not mapped, and unmapping its addresses would hit something else: leave all
        // of it. In the thread that made it, close it if its descriptor is still a ring's.
        let path = format!("/proc/self/fd/{}", self.ring.as_raw_fd());
        let is_ring = std::fs::read_link(path).is_ok_and(|p| p.as_os_str() == "anon_inode:[io_uring]");
        if self.is_ours() && is_ring {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
        }
    }
}

fn pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn ring(file: &std::fs::File) -> Option<Ring> {
        Ring::new(file.as_fd()).inspect_err(|e| eprintln!("SKIPPED: io_uring is not available: {e}")).ok()
    }

    #[test]
    fn writes_and_reads_a_batch() {
        let file = tempfile::tempfile().unwrap();
        let Some(mut ring) = ring(&file) else { return };
        let (a, b) = ([1u8; 512], [2u8; 512]);
        let bufs = [IoSlice::new(&a), IoSlice::new(&b)];
        let mut results = [0; 3];
        let mut writes =
            [Transfer::Write(4096, &bufs), Transfer::Write(0, &bufs[1..]), Transfer::Write(9000, &[])];
        ring.run(&mut writes, &mut results).unwrap();
        assert_eq!(results, [1024, 512, 0]);

        let (mut x, mut y) = ([0u8; 1024], [0u8; 512]);
        let (mut x_bufs, mut y_bufs) = ([IoSliceMut::new(&mut x)], [IoSliceMut::new(&mut y)]);
        ring.run(&mut [Transfer::Read(4096, &mut x_bufs), Transfer::Read(0, &mut y_bufs)], &mut results)
            .unwrap();
        assert_eq!(results[..2], [1024, 512]);
        assert_eq!((x[0], x[1023], y[0]), (1, 2, 2));
    }

    #[test]
    fn a_full_batch_and_errors_of_single_transfers() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let read_only = std::fs::File::open(path.path()).unwrap();
        let Some(mut ring) = ring(&read_only) else { return };
        let page = [7u8; 16];
        let bufs = [IoSlice::new(&page)];
        let mut results = [0; Ring::MAX];
        let mut writes: Vec<_> = (0..Ring::MAX).map(|i| Transfer::Write(i as u64 * 16, &bufs)).collect();
        ring.run(&mut writes, &mut results).unwrap();
        assert!(results.iter().all(|&r| r == -libc::EBADF), "{results:?}");
    }

    #[test]
    fn a_closed_ring_says_so() {
        let file = tempfile::tempfile().unwrap();
        let Some(mut ring) = ring(&file) else { return };
        // SAFETY: what a program does that closes all descriptors.
        unsafe { rustix::io::close(ring.ring.as_raw_fd()) };
        let page = [7u8; 16];
        let bufs = [IoSlice::new(&page)];
        let mut results = [0; 1];
        assert_eq!(ring.run(&mut [Transfer::Write(0, &bufs)], &mut results), Err(Errno::BADF));
    }
}
