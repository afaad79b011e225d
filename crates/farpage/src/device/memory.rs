//! Memory that the CPU reaches in place: device-dax nodes, files on DAX, huge pages, memory of a node.
//!
//! | specification | memory type | the memory |
//! |---|---|---|
//! | `generic:SOURCE[:SIZE]` | `Generic` | never moves |
//! | `coherent:SOURCE[:SIZE]` | `Coherent` | moves on request |
//! | `numa:NODE[:SIZE]` | `Coherent` | of that memory node and no other |
//! | `p2pdma:SOURCE[:SIZE]` | `P2pDma` | its driver's; mapped only on request |
//!
//! Memory of the first three can be a device of a domain as well: then its frames, of 4 KiB each, serve as storage of pages
//! ([`super::spec::Spec::Memory`], [`MemorySpec::attach`]).
//!
//! `SOURCE` is a device-dax node (`/dev/dax0.0`), a regular file without data (on a DAX file system it is the storage itself),
//! a directory for an unlinked file (hugetlbfs: huge pages), or one of the words `memfd` and `hugetlb` (huge pages
//! without a mount). A frame is what the memory is handed out in: 4 KiB, or 2 MiB for huge pages and a device-dax node
//! aligned so. The memory of a free frame is given back to the system where it can be (not on device-dax).
//!
//! Files and nodes are locked (`flock`): who stores pages in one has it alone.

use std::os::fd::OwnedFd;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Device, DeviceError, LoadOp, MemoryType, PagemapOps, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};
use crate::sys::{SharedArea, SharedMap, SteadyFile};
use crate::{PAGE_SIZE, Page};

mod open;
mod spec;

pub use open::{InPlace, MemoryError};
pub use spec::{MemorySpec, MemorySpecError, Source};

/// Bytes of a huge page.
pub const HUGE: u64 = 2 << 20;
/// The smallest: a page.
pub const MIN_SIZE: u64 = PAGE_SIZE as u64;
/// The largest: what 32-bit frame numbers and their counts can do.
pub const MAX_SIZE: u64 = 8 << 40;

/// Memory that can be mapped; see the module's description. It is a pagemap's driver ([`PagemapOps`]), of each type
/// the same; what `Coherent` adds is that it stores and loads pages ([`Device`]).
///
/// See the example of [`MemorySpec`].
pub struct DeviceMemory {
    name: String,
    memory_type: MemoryType,
    frames: u32,
    frame_size: u64,
    /// Memory can be given back in pieces of so many bytes, which are zero afterwards; `None`: it cannot.
    piece: Option<u64>,
    /// Pages are stored in its frames, by another who has this ([`super::mem::Mem`]).
    stores: bool,
    file: SteadyFile,
    /// What the first process opened, by whose path the others open it.
    _origin: Option<OwnedFd>,
    /// All of it, for copies in and out: if it is `Coherent`, or stores pages.
    whole: Option<SharedMap>,
}

impl DeviceMemory {
    /// Its type.
    pub fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    /// How many frames it has.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Bytes of a frame.
    pub fn frame_size(&self) -> u64 {
        self.frame_size
    }

    /// The file that is to be mapped; frame `n` is at `n` times [`Self::frame_size`].
    #[doc(hidden)]
    pub fn file(&self) -> &SteadyFile {
        &self.file
    }

    /// Whether frames that are allocated may hold old bytes: whoever hands them out clears them.
    #[doc(hidden)]
    pub fn must_clear(&self) -> bool {
        self.stores || self.piece.is_none()
    }

    /// Whether pages are stored in its frames.
    #[doc(hidden)]
    pub fn stores_pages(&self) -> bool {
        self.stores
    }

    /// Whether the memory of a single frame of 4 KiB can be given back to the system.
    pub(super) fn gives_back_pages(&self) -> bool {
        self.piece == Some(PAGE_SIZE as u64)
    }

    /// Whether its memory can be given back at all.
    pub(super) fn gives_back(&self) -> bool {
        self.piece.is_some()
    }

    /// All of it, where there is a mapping.
    pub(super) fn area(&self) -> Option<SharedArea> {
        self.whole.map(|map| map.area(0, map.len()))
    }

    /// Bytes of the system's memory that it takes just now.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn in_use(&self) -> Result<u64, Errno> {
        Ok(rustix::fs::fstat(self.file.get()?)?.st_blocks as u64 * 512)
    }

    fn punch(&self, pfn: Pfn, frames: u32) -> Result<(), Errno> {
        let (at, len) = (u64::from(pfn) * self.frame_size, u64::from(frames) * self.frame_size);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.file.get()?, hole, at, len)
    }

    /// A frame's bytes in the mapping of the whole, for copies. Only frames of 4 KiB are moved.
    fn offset(&self, pfn: Pfn) -> Option<(SharedMap, usize)> {
        let map = self.whole.filter(|_| pfn < self.frames && self.frame_size == PAGE_SIZE as u64)?;
        Some((map, pfn as usize * PAGE_SIZE))
    }

    fn read(&self, pfn: Pfn, page: &mut Page) -> Result<Sum, DeviceError> {
        let (map, at) = self.offset(pfn).ok_or(DeviceError::Io(libc::EINVAL))?;
        map.area(0, map.len()).read(at, &mut page.0);
        Ok(Sum::of(page))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.whole.into_iter().for_each(SharedMap::unmap);
    }
}

impl PagemapOps for DeviceMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn page_free(&self, pfns: &[Pfn], _owner: Owner) {
        if self.piece.is_none() {
            return;
        }
        let mut sorted: arrayvec::ArrayVec<Pfn, { crate::frame::BATCH }> = arrayvec::ArrayVec::new();
        for batch in pfns.chunks(crate::frame::BATCH) {
            sorted.clear();
            sorted.extend(batch.iter().copied());
            sorted.sort_unstable();
            for run in sorted.chunk_by(|a, b| a + 1 == *b) {
                if let Err(e) = self.punch(run[0], run.len() as u32) {
                    // Old bytes would be seen by the next user.
                    crate::sys::say(&format!("memory {}: cannot free frame {}: {e}", self.name, run[0]));
                }
            }
        }
    }

    fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
        self.whole.is_some().then_some(self as _)
    }

    fn memory(&self) -> Option<&DeviceMemory> {
        Some(self)
    }

    fn remove(&self, _owner: Owner) -> Result<(), Errno> {
        if self.piece.is_some() { self.punch(0, self.frames) } else { Ok(()) }
    }
}

/// Pages are copied in and out in place; the CPU may change them there, so a checksum says what they are now.
impl Device for DeviceMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        for op in ops {
            // Memory that cannot be had is an error here and not a SIGBUS at the first byte.
            op.result = self.offset(op.pfn).ok_or(DeviceError::Io(libc::EINVAL)).and_then(|(map, at)| {
                let area = map.area(0, map.len());
                area.populate(at, PAGE_SIZE).map_err(|_| DeviceError::Full)?;
                area.write(at, &op.page.0);
                Ok(())
            });
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        ops.iter_mut().for_each(|op| op.result = self.read(op.pfn, op.page));
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        self.read(pfn, &mut Page([0; PAGE_SIZE])).unwrap_or_default()
    }

    fn free(&self, pfns: &[Pfn], owner: Owner) {
        PagemapOps::page_free(self, pfns, owner);
    }

    fn usage(&self) -> Usage {
        let used = self.in_use().unwrap_or(0);
        let capacity = u64::from(self.frames) * self.frame_size;
        Usage { capacity, used, payload: used, peak: used }
    }
}
