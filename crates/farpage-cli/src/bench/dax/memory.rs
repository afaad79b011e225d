//! The bare side: a plain mapping, the calls on it, and copying, which is the same code on both sides.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use farpage::dax::DaxMapping;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::pipe::SpliceFlags;

/// A part of a file, mapped as without farpage; unmapped when dropped.
pub struct Bare {
    addr: usize,
    len: usize,
}

impl Bare {
    /// Maps it; `sync` with MAP_SYNC.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn map(file: impl AsFd, range: &Range<u64>, sync: bool) -> io::Result<Self> {
        let len = (range.end - range.start) as usize;
        let flags = if sync { MapFlags::SHARED_VALIDATE | MapFlags::SYNC } else { MapFlags::SHARED };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address.
        let addr = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, file, range.start)? };
        Ok(Self { addr: addr as usize, len })
    }

    /// The first address.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// `mlock` and `munlock`.
    ///
    /// # Errors
    /// The limit (`ulimit -l`).
    pub fn lock_and_unlock(&self) -> io::Result<()> {
        // SAFETY: our own mapping; no byte changes.
        unsafe {
            rustix::mm::mlock(self.addr as *mut _, self.len)?;
            rustix::mm::munlock(self.addr as *mut _, self.len)?;
        }
        Ok(())
    }

    /// Gives the first page to a pipe: until that is read the kernel uses the page, which it has not copied.
    ///
    /// # Errors
    /// What `vmsplice` says.
    pub fn splice_into(&self, pipe: impl AsFd) -> io::Result<()> {
        // SAFETY: a page of our own mapping, which outlives what is done with the pipe.
        let page = unsafe { std::slice::from_raw_parts(self.addr as *const u8, farpage::PAGE_SIZE) };
        // SAFETY: whoever reads the pipe may see later writes to the page; there are none.
        let n = unsafe {
            let page = rustix::pipe::IoSliceRaw::from_slice(page);
            rustix::pipe::vmsplice(pipe, &[page], SpliceFlags::empty())?
        };
        if n == farpage::PAGE_SIZE { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference remains.
        let _unmapped = unsafe { rustix::mm::munmap(self.addr as *mut _, self.len) };
    }
}

/// A mapping of either side, to be copied from and to by the same code.
pub enum Mapped<'m> {
    /// Plain.
    Bare(&'m Bare),
    /// The library's.
    Farpage(&'m DaxMapping),
}

impl Mapped<'_> {
    fn bytes(&self) -> (*mut u8, usize) {
        match self {
            Self::Bare(map) => (map.addr as *mut u8, map.len),
            Self::Farpage(map) => (map.as_ptr(), map.len()),
        }
    }

    /// The first address.
    pub fn addr(&self) -> usize {
        self.bytes().0 as usize
    }

    /// Copies all of it out, a buffer after the other.
    pub fn copy_out(&self, buffer: &mut [u8]) {
        let (start, len) = self.bytes();
        for at in (0..len).step_by(buffer.len()) {
            let n = buffer.len().min(len - at);
            // SAFETY: mapped while the borrow lasts, and only this thread works on it; the buffer has room for n.
            unsafe { std::ptr::copy_nonoverlapping(start.add(at), buffer.as_mut_ptr(), n) };
            std::hint::black_box(&*buffer);
        }
    }

    /// Fills it with the buffer, again and again.
    pub fn copy_in(&self, buffer: &[u8]) {
        let (start, len) = self.bytes();
        for at in (0..len).step_by(buffer.len()) {
            let n = buffer.len().min(len - at);
            let from = std::hint::black_box(buffer).as_ptr();
            // SAFETY: as above; nobody has a reference to these bytes.
            unsafe { std::ptr::copy_nonoverlapping(from, start.add(at), n) };
        }
    }
}
