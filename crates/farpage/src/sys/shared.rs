//! Shared memory that several processes map: a window of a memfd, and typed views of it.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping of a part of a file, never unmapped: the domain's segment lives as long as the
/// process. Zero where nothing was written yet.
#[derive(Debug, Clone, Copy)]
pub struct SharedMap {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is shared memory that is never unmapped; all access goes through atomics or through
// `SharedArea::bytes`, whose contract makes its user responsible for exclusion.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `len` bytes of `file` from `offset`, shared, readable and writable, without reserving memory.
    pub fn new(file: impl AsFd, offset: u64, len: usize) -> rustix::io::Result<Self> {
        // SAFETY: the kernel chooses the address, so no existing mapping is touched.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                offset,
            )?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?, len })
    }

    /// Maps the first bytes of `file` in place of this mapping, or where there is none, fresh zeros: views of it see those
    /// from now on.
    ///
    /// # Errors
    /// What `mmap` says; the mapping is then what it was.
    pub fn replace(&self, file: Option<rustix::fd::BorrowedFd<'_>>) -> rustix::io::Result<()> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        let addr = self.base.as_ptr().cast();
        // SAFETY: exactly this mapping, whose views are of shared memory, which may change at any time.
        unsafe {
            match file {
                Some(file) => rustix::mm::mmap(addr, self.len, prot, flags, file, 0)?,
                None => rustix::mm::mmap_anonymous(addr, self.len, prot, flags)?,
            };
        }
        Ok(())
    }

    /// The part `[offset, offset + len)`. Panics if it lies outside.
    pub fn area(&self, offset: usize, len: usize) -> SharedArea {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping, as just checked.
        SharedArea { base: unsafe { self.base.add(offset) }, len }
    }

    /// Ends the mapping. For a window that was mapped for one task; views taken of it must be gone.
    pub fn unmap(self) {
        // SAFETY: the caller says that no view is left; the range is exactly this mapping.
        let done = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(done.is_ok());
    }

    /// A forked child does not get this mapping.
    pub fn keep_from_children(&self) -> rustix::io::Result<()> {
        let advice = rustix::mm::Advice::LinuxDontFork;
        // SAFETY: exactly this mapping; nothing in it changes.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, advice) }
    }

    /// Moves the mapping over the one at `addr` (of the same length), which it replaces.
    ///
    /// # Safety
    /// Views of the old mapping at `addr` stay valid addresses but see this mapping's bytes from now on.
    pub unsafe fn move_over(self, addr: usize) -> rustix::io::Result<Self> {
        // SAFETY: the caller's contract; both ranges are whole mappings of ours.
        let base = unsafe {
            rustix::mm::mremap_fixed(
                self.base.as_ptr().cast(),
                self.len,
                self.len,
                rustix::mm::MremapFlags::MAYMOVE,
                addr as *mut _,
            )?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?, len: self.len })
    }

    /// Address of the first byte.
    #[doc(hidden)]
    pub fn addr(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty (it never is).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Room for up to `N` bytes of a [`SharedArea`], which costs nothing before something is read into it.
pub struct Buffer<const N: usize> {
    bytes: [MaybeUninit<u8>; N],
    /// So many bytes from the start have values.
    len: usize,
}

impl<const N: usize> Buffer<N> {
    /// An empty one.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self { bytes: [const { MaybeUninit::uninit() }; N], len: 0 }
    }

    /// Copies `len` bytes (at most `N`) of the area from `offset` in; what was there before is gone. As in
    /// [`SharedArea::read`], they may be a mix.
    #[doc(hidden)]
    pub fn read(&mut self, area: SharedArea, offset: usize, len: usize) {
        let len = len.min(N);
        assert!(offset.checked_add(len).is_some_and(|end| end <= area.len));
        // SAFETY: inside the area and, as just limited, inside the array; the rest as in `SharedArea::read`.
        unsafe {
            let from = area.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, self.bytes.as_mut_ptr().cast(), len);
        }
        self.len = len;
    }

    /// The bytes read.
    #[doc(hidden)]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the first `len` bytes have been written by `read`.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast(), self.len) }
    }
}

/// A window of shared memory. Views are atomics, which any number of processes may use at once, or raw
/// bytes, for which the user keeps others away.
///
/// ```
/// use farpage::pagemap::SharedArea;
///
/// let area = SharedArea::anonymous(1 << 20)?;
/// assert_eq!((area.len(), area.is_empty()), (1 << 20, false));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SharedArea {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: as for `SharedMap`.
unsafe impl Send for SharedArea {}
// SAFETY: as for `SharedMap`.
unsafe impl Sync for SharedArea {}

impl SharedArea {
    /// An area of anonymous private memory, for tests and for a domain within one process. Leaked.
    pub fn anonymous(len: usize) -> rustix::io::Result<Self> {
        // SAFETY: the kernel chooses the address, so no existing mapping is touched.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
            )?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the area has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits off the first `len` bytes, rounded up to 64 (a cache line): `(first, rest)`.
    #[doc(hidden)]
    pub fn split(&self, len: usize) -> (SharedArea, SharedArea) {
        let at = len.next_multiple_of(64);
        assert!(at <= self.len, "shared area too small");
        // SAFETY: inside the area, as just checked.
        let rest = unsafe { self.base.add(at) };
        (Self { base: self.base, len }, Self { base: rest, len: self.len - at })
    }

    /// The part `[offset, offset + len)`. Panics if it lies outside.
    #[doc(hidden)]
    pub fn part(&self, offset: usize, len: usize) -> SharedArea {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the area, as just checked.
        Self { base: unsafe { self.base.add(offset) }, len }
    }

    /// The area as 32-bit atomics.
    #[doc(hidden)]
    pub fn atomics32(&self) -> &'static [AtomicU32] {
        assert!(self.base.as_ptr().cast::<AtomicU32>().is_aligned());
        // SAFETY: mapped for ever, aligned (just checked), and atomics may be shared by any number of users.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 4) }
    }

    /// The area as 64-bit atomics.
    #[doc(hidden)]
    pub fn atomics64(&self) -> &'static [AtomicU64] {
        assert!(self.base.as_ptr().cast::<AtomicU64>().is_aligned());
        // SAFETY: as for `atomics32`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }

    /// Makes the kernel provide the memory of `[offset, offset + len)` (whole pages) now, in one call. An error
    /// (no memory, no space on the file system) is what would have been a SIGBUS at the first touch.
    #[doc(hidden)]
    pub fn populate(&self, offset: usize, len: usize) -> rustix::io::Result<()> {
        self.advise(offset, len, rustix::mm::Advice::LinuxPopulateWrite)
    }

    /// Gives the memory of `[offset, offset + len)` (whole pages) back to the kernel, in every process. The bytes
    /// read as zero afterwards, and take memory again when they are touched.
    #[doc(hidden)]
    pub fn give_back(&self, offset: usize, len: usize) -> rustix::io::Result<()> {
        self.advise(offset, len, rustix::mm::Advice::LinuxRemove)
    }

    fn advise(&self, offset: usize, len: usize, advice: rustix::mm::Advice) -> rustix::io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping. Removing is in effect a write of zeros, which the shared bytes allow
        // anyone who owns the extent.
        unsafe { rustix::mm::madvise(self.base.as_ptr().add(offset).cast(), len, advice) }
    }

    /// Address of the first byte: for the system calls and for [`SharedArea::bytes`].
    #[doc(hidden)]
    pub fn addr(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Copies bytes out.
    ///
    /// Another process may be writing them (an object that was moved while we read): the result may then
    /// be a mix, which the caller finds by checksum.
    #[doc(hidden)]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset.checked_add(out.len()).is_some_and(|end| end <= self.len));
        // SAFETY: inside the area; `out` is ours. Racing writers are other processes or are kept away by the
        // caller; the bytes are plain data for which any value is valid.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes in. The caller owns the target (an extent that he allocated).
    #[doc(hidden)]
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= self.len));
        // SAFETY: inside the area; the caller owns the extent, so nobody else writes it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.as_ptr().add(offset), data.len()) }
    }

    /// The bytes in place, to decode from without a copy.
    ///
    /// # Safety
    /// Nobody may write them while the slice lives (the caller holds a reference to the frame they belong to).
    #[doc(hidden)]
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> &'static [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the area, mapped for ever; exclusion is the caller's part of the contract.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset), len) }
    }
}
