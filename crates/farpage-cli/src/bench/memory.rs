//! The memory that the access program works on, as words that threads may share: an anonymous mapping, or a region of the
//! library.
#![allow(unsafe_code)] // here a mapping becomes a pointer

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::data::WORDS;

/// Private anonymous memory of whole pages, unmapped when dropped.
pub struct Region {
    start: *mut AtomicU64,
    pages: usize,
    /// Whose it is, if it is not a mapping of our own.
    region: Option<farpage::Region<u64>>,
}

// SAFETY: the region is only reached as `&[AtomicU64]`, which threads may share, and is unmapped only
// by its owner.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes`, rounded up to pages, with the machine's own huge-page setting. Fails as `mmap` does.
    pub fn new(bytes: u64) -> io::Result<Region> {
        let pages = usize::try_from(bytes.div_ceil(4096)).unwrap_or(usize::MAX / 8192).max(1);
        // The C library's mmap, as programs call it and as `farpage run` can take it over: rustix makes the
        // system call itself, and such memory would stay unmanaged.
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region { start: start.cast(), pages, region: None })
    }

    /// A region of `bytes`, rounded up to pages, in a space of the library.
    pub fn in_space(space: &farpage::Running, bytes: u64) -> io::Result<Region> {
        let pages = usize::try_from(bytes.div_ceil(4096)).unwrap_or(usize::MAX / 8192).max(1);
        let region = space.region::<u64>(pages * WORDS).map_err(io::Error::other)?;
        Ok(Region { start: region.addresses().start as *mut AtomicU64, pages, region: Some(region) })
    }

    /// Pages mapped.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The words of one page. Panics where there is no such page, as slices do.
    pub fn page(&self, page: usize) -> &[AtomicU64] {
        &self.words()[page * WORDS..][..WORDS]
    }

    /// Writes a whole page: `words` with the first one replaced by `stamp`.
    pub fn write(&self, page: usize, words: &[u64; WORDS], stamp: u64) {
        let to = self.page(page);
        // Relaxed here and in every access of the access program: threads meet at barriers and joins,
        // which order everything; the atomics only make the sharing sound.
        to[0].store(stamp, Ordering::Relaxed);
        for (to, from) in to.iter().zip(words).skip(1) {
            to.store(*from, Ordering::Relaxed);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is readable, writable, aligned, zero-initialised and lives as long as
        // `self`; nobody has a reference to it of another kind.
        unsafe { std::slice::from_raw_parts(self.start, self.pages * WORDS) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.region.is_some() {
            return;
        }
        // SAFETY: the mapping is ours and no reference to it outlives `self`. A failure only leaks it.
        let _ = unsafe { libc::munmap(self.start.cast(), self.pages * 4096) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_written() {
        let region = Region::new(3 * 4096 - 5).unwrap();
        assert_eq!(region.pages(), 3);
        region.write(2, &[7; WORDS], 99);
        assert_eq!(region.page(2)[0].load(Ordering::Relaxed), 99);
        assert_eq!(region.page(2)[511].load(Ordering::Relaxed), 7);
        assert_eq!(region.page(1)[0].load(Ordering::Relaxed), 0);
    }
}
