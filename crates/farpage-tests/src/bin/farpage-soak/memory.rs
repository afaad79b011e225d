//! Checksummed memory: mappings that know what each of their pages must hold.

use std::ffi::c_void;
use std::io;

/// Bytes of a page.
pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
type Words = [u64; WORDS];

/// Why the soak ends early.
#[derive(Debug, thiserror::Error)]
pub enum Fail {
    /// A page holds something else.
    #[error(
        "page {page} of {pages} at {at:#x}, word {word}: found {found:016x}, expected {want:016x} (seed {seed})"
    )]
    Lost {
        /// Its number in the region.
        page: usize,
        /// The region's pages.
        pages: usize,
        /// Its address.
        at: usize,
        /// The first wrong word.
        word: usize,
        /// What is there.
        found: u64,
        /// What should be.
        want: u64,
        /// The page's seed, 0 for never written.
        seed: u32,
    },
    /// A system call failed.
    #[error("{0}: {1}")]
    Call(&'static str, io::Error),
    /// A child ended otherwise than well.
    #[error("a child ended with wait status {0:#x}")]
    Child(i32),
    /// A thread panicked.
    #[error("a thread panicked")]
    Thread,
}

fn failed(call: &'static str) -> Fail {
    Fail::Call(call, io::Error::last_os_error())
}

fn mix(x: u64) -> u64 {
    farpage_tests::Rng::new(x).draw()
}

/// The word `i` of a page with `seed`: by turns half-compressible, noise, and one word repeated.
fn word(seed: u32, page: usize, i: usize) -> u64 {
    if seed == 0 {
        return 0;
    }
    let base = mix((u64::from(seed) << 32) ^ page as u64);
    match seed % 8 {
        0 => base,
        1 => mix(base ^ i as u64),
        _ if i < WORDS / 2 => mix(base ^ i as u64),
        _ => base,
    }
}

/// A private anonymous mapping with what must be in it. Each page carries its number along, so that its
/// contents stay what they are when the mapping is cut.
#[derive(Debug)]
pub struct Region {
    at: *mut Words,
    /// Seed and number of each page.
    holds: Vec<(u32, usize)>,
}

// SAFETY: the mapping belongs to the Region alone and does not depend on a thread.
unsafe impl Send for Region {}

impl Region {
    /// A fresh mapping.
    pub fn map(pages: usize) -> Result<Self, Fail> {
        let at = map_at(std::ptr::null_mut(), pages, 0)?;
        Ok(Self { at, holds: (0..pages).map(|n| (0, n)).collect() })
    }

    /// How many pages.
    pub fn pages(&self) -> usize {
        self.holds.len()
    }

    fn page(&self, i: usize) -> *mut Words {
        assert!(i < self.holds.len());
        // SAFETY: the mapping is `holds.len()` pages long, and `i` is below that.
        unsafe { self.at.add(i) }
    }

    fn range(&self, from: usize, count: usize) -> (*mut c_void, usize) {
        assert!(from + count <= self.holds.len());
        (self.at.wrapping_add(from).cast(), count * PAGE)
    }

    /// Verifies `count` pages.
    pub fn check(&self, from: usize, count: usize) -> Result<(), Fail> {
        for i in from..from + count {
            let (seed, number) = self.holds[i];
            // SAFETY: the page is mapped readable, and only this thread writes it.
            let words = unsafe { &*self.page(i) };
            for (w, found) in words.iter().enumerate() {
                let want = word(seed, number, w);
                if *found != want {
                    let at = self.page(i) as usize;
                    return Err(Fail::Lost {
                        page: i,
                        pages: self.pages(),
                        at,
                        word: w,
                        found: *found,
                        want,
                        seed,
                    });
                }
            }
        }
        Ok(())
    }

    /// Verifies every page.
    pub fn check_all(&self) -> Result<(), Fail> {
        self.check(0, self.pages())
    }

    /// Verifies and rewrites `count` pages.
    pub fn write(&mut self, from: usize, count: usize, seed: u32) -> Result<(), Fail> {
        if seed.is_multiple_of(2) {
            self.check(from, count)?;
        }
        for i in from..from + count {
            self.holds[i].0 = seed;
            let number = self.holds[i].1;
            // SAFETY: the page is mapped writable, and only this thread uses it.
            let words = unsafe { &mut *self.page(i) };
            for (w, slot) in words.iter_mut().enumerate() {
                *slot = word(seed, number, w);
            }
        }
        Ok(())
    }

    /// Gives the mapping back, verified once more.
    pub fn unmap(self) -> Result<(), Fail> {
        self.check_all()?;
        let (at, len) = self.range(0, self.pages());
        // SAFETY: the range is this region's, and the region ends here.
        if unsafe { libc::munmap(at, len) } != 0 { Err(failed("munmap")) } else { Ok(()) }
    }

    /// Unmaps a part; what is left are up to two regions.
    pub fn cut(mut self, from: usize, count: usize) -> Result<Vec<Self>, Fail> {
        let (at, len) = self.range(from, count);
        // SAFETY: the range is this region's, and no part of what is left reaches into it.
        if unsafe { libc::munmap(at, len) } != 0 {
            return Err(failed("munmap of a part"));
        }
        let behind = self.holds.split_off(from + count);
        self.holds.truncate(from);
        let right = Self { at: self.at.wrapping_add(from + count), holds: behind };
        Ok([self, right].into_iter().filter(|r| r.pages() > 0).collect())
    }

    /// `mremap` to more pages; it may move.
    pub fn grow(&mut self, more: usize) -> Result<(), Fail> {
        let pages = self.pages();
        if self.remap(pages + more, libc::MREMAP_MAYMOVE, std::ptr::null_mut())? {
            self.holds.extend((pages..pages + more).map(|n| (0, n)));
        }
        Ok(())
    }

    /// `mremap` to fewer pages.
    pub fn shrink(&mut self, pages: usize) -> Result<(), Fail> {
        if self.remap(pages, 0, std::ptr::null_mut())? {
            self.holds.truncate(pages);
        }
        Ok(())
    }

    /// `mremap` onto another mapping.
    pub fn relocate(&mut self) -> Result<(), Fail> {
        let pages = self.pages();
        let target = map_at(std::ptr::null_mut(), pages, 0)?;
        // SAFETY: the target is this function's own mapping of that many pages.
        unsafe { (*target)[0] = 0xdead };
        if !self.remap(pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target.cast())? {
            // SAFETY: the target is still this function's own mapping.
            unsafe { libc::munmap(target.cast(), pages * PAGE) };
        }
        Ok(())
    }

    /// False where the kernel refuses because the range is not one mapping any more (`EFAULT`).
    fn remap(&mut self, pages: usize, flags: i32, target: *mut c_void) -> Result<bool, Fail> {
        let (at, len) = self.range(0, self.pages());
        // SAFETY: the source is this region's, the target (where flags name one) the caller's own mapping.
        let new = unsafe { libc::mremap(at, len, pages * PAGE, flags, target) };
        if new == libc::MAP_FAILED {
            let e = io::Error::last_os_error();
            return if e.raw_os_error() == Some(libc::EFAULT) {
                Ok(false)
            } else {
                Err(Fail::Call("mremap", e))
            };
        }
        self.at = new.cast();
        Ok(true)
    }

    /// `MADV_DONTNEED`: the pages read as zeros.
    pub fn forget(&mut self, from: usize, count: usize) -> Result<(), Fail> {
        self.madvise(from, count, libc::MADV_DONTNEED)?;
        self.holds[from..from + count].iter_mut().for_each(|h| h.0 = 0);
        self.check(from, 1)
    }

    /// Advice that changes no contents.
    pub fn advise(&self, from: usize, count: usize, choice: usize) -> Result<(), Fail> {
        const ADVICE: [i32; 4] =
            [libc::MADV_PAGEOUT, libc::MADV_COLD, libc::MADV_WILLNEED, libc::MADV_POPULATE_READ];
        self.madvise(from, count, ADVICE[choice % ADVICE.len()])
    }

    fn madvise(&self, from: usize, count: usize, advice: i32) -> Result<(), Fail> {
        let (at, len) = self.range(from, count);
        // SAFETY: the range is this region's; dropping contents is recorded by the caller.
        if unsafe { libc::madvise(at, len, advice) } != 0 { Err(failed("madvise")) } else { Ok(()) }
    }

    /// `mprotect` to no access or read-only, and back.
    pub fn protect(&mut self, from: usize, count: usize, none: bool) -> Result<(), Fail> {
        let (at, len) = self.range(from, count);
        let prot = if none { libc::PROT_NONE } else { libc::PROT_READ };
        // SAFETY: the range is this region's, and nothing touches it while it is closed.
        if unsafe { libc::mprotect(at, len, prot) } != 0 {
            return Err(failed("mprotect"));
        }
        if !none {
            self.check(from, count.min(8))?;
        }
        // SAFETY: the range is this region's.
        if unsafe { libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(failed("mprotect back"));
        }
        self.check(from, count.min(8))
    }

    /// `mlock` and `munlock`, where permitted.
    pub fn lock(&self, from: usize, count: usize) -> Result<(), Fail> {
        let (at, len) = self.range(from, count);
        // SAFETY: locking changes no contents.
        if unsafe { libc::mlock(at, len) } == 0 {
            self.check(from, count)?;
            // SAFETY: as above.
            if unsafe { libc::munlock(at, len) } != 0 {
                return Err(failed("munlock"));
            }
        }
        Ok(())
    }
}

fn map_at(at: *mut c_void, pages: usize, flags: i32) -> Result<*mut Words, Fail> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: a new mapping where the kernel likes; it replaces nothing (no MAP_FIXED is passed in).
    let p = unsafe { libc::mmap(at, pages * PAGE, prot, flags, -1, 0) };
    if p == libc::MAP_FAILED { Err(failed("mmap")) } else { Ok(p.cast()) }
}

/// Runs `body` in a child and waits for it. The body must not allocate: other threads may have held the heap's
/// locks at the fork.
pub fn in_child(mut body: impl FnMut() -> Result<(), Fail>) -> Result<(), Fail> {
    // SAFETY: the child calls only `body`, which does not allocate, and `_exit`.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(failed("fork"));
    }
    if pid == 0 {
        let status = match body() {
            Ok(()) => 0,
            // A child can say no more than this without allocating: 3 a page was lost, 4 a call failed.
            Err(Fail::Lost { .. }) => 3,
            Err(_) => 4,
        };
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(status) }
    }
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    while unsafe { libc::waitpid(pid, &mut status, 0) } != pid {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(failed("waitpid"));
        }
    }
    if status == 0 { Ok(()) } else { Err(Fail::Child(status)) }
}
