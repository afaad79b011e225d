//! Mappings that take one another's place.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use crate::{PAGE_SIZE, Page};

/// May be read, written, executed.
type Rights = (bool, bool, bool);

fn prot((read, write, exec): Rights) -> ProtFlags {
    let mut flags = ProtFlags::empty();
    for (has, flag) in [(read, ProtFlags::READ), (write, ProtFlags::WRITE), (exec, ProtFlags::EXEC)] {
        flags.set(flag, has);
    }
    flags
}

/// Maps `len` bytes of a file at `addr`, in place of what is there.
pub fn map_shared(
    addr: usize,
    len: usize,
    rights: Rights,
    file: impl AsFd,
    offset: u64,
) -> Result<(), Errno> {
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the caller has brought the bytes that were here to that place of the file.
    unsafe { rustix::mm::mmap(addr as *mut _, len, prot(rights), flags, file, offset) }.map(|_| ())
}

/// Fresh private memory that is to take the place of other memory.
pub struct Fresh {
    addr: usize,
    len: usize,
}

impl Fresh {
    /// So many bytes, whole pages.
    pub fn new(len: usize) -> Result<Self, Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address.
        let p = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        Ok(Self { addr: p as usize, len })
    }

    /// Its pages.
    pub fn pages(&mut self) -> &mut [Page] {
        // SAFETY: our own memory, page-aligned, mapped and writable as long as this lives.
        unsafe { std::slice::from_raw_parts_mut(self.addr as *mut Page, self.len / PAGE_SIZE) }
    }

    /// Moves it to `to`, in place of what is there, with one call, and with these rights.
    pub fn replace(self, to: usize, rights: Rights) -> Result<(), Errno> {
        let flags = MprotectFlags::from_bits_retain(prot(rights).bits());
        let from = self.addr as *mut _;
        // SAFETY: our own memory; the caller has copied to it what is at `to`.
        unsafe {
            rustix::mm::mprotect(from, self.len, flags)?;
            rustix::mm::mremap_fixed(from, self.len, self.len, MremapFlags::MAYMOVE, to as *mut _)?;
        }
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: our own memory, which nobody uses any more.
        let _gone = unsafe { rustix::mm::munmap(self.addr as *mut _, self.len) };
    }
}

/// What may be done with the mapping at `addr`.
pub fn rights(addr: usize) -> Option<Rights> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (s, e) = range.split_once('-')?;
        let (s, e) = (usize::from_str_radix(s, 16).ok()?, usize::from_str_radix(e, 16).ok()?);
        let flag = |i: usize, c: u8| rest.as_bytes().get(i) == Some(&c);
        (s <= addr && addr < e).then(|| (flag(0, b'r'), flag(1, b'w'), flag(2, b'x')))
    })
}

const _: () = assert!(size_of::<Page>() == PAGE_SIZE);
