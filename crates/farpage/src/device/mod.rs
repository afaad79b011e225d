//! Devices: where pages live when they are not in DRAM. One file a device, behind the narrow trait
//! [`Device`]; counts and free frames are the business of [`crate::pagemap`].

use crate::Page;
pub use crate::frame::{Owner, Pfn};
use crate::sys::SharedArea;

mod file;
mod inject;
mod mem;
pub mod memory;
mod ops;
pub(crate) mod ram;
pub mod spec;
#[cfg(test)]
pub(crate) mod testing;

pub use ops::{Driver, MemoryType, PagemapOps};

/// A page's checksum: the low 96 bits of its 128-bit XXH3. Equal checksums mean equal pages (the chance
/// of an error is 2⁻⁹⁶ a comparison); 96 bits keep the metadata of a page within 24 bytes.
///
/// ```
/// use farpage::device::Sum;
/// use farpage::{PAGE_SIZE, Page};
///
/// let (zeros, mut page) = (Page([0; PAGE_SIZE]), Page([0; PAGE_SIZE]));
/// assert_eq!(Sum::of(&page), Sum::of(&zeros));
/// page.0[17] = 1;
/// assert_ne!(Sum::of(&page), Sum::of(&zeros));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Sum(pub [u32; 3]);

impl Sum {
    /// The checksum of a page.
    pub fn of(page: &Page) -> Self {
        let h = twox_hash::XxHash3_128::oneshot(&page.0);
        Self([h as u32, (h >> 32) as u32, (h >> 64) as u32])
    }
}

/// What can go wrong on a device. Nothing is lost by any of them: a page that could not be stored is
/// still in DRAM, a page that could not be loaded is poisoned alone.
///
/// See the example of [`Device`].
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// No room for this page now.
    #[error("device is full")]
    Full,
    /// The operating system refused the transfer (an errno).
    #[error("I/O error {0}")]
    Io(i32),
    /// The bytes read are not the bytes written.
    #[error("checksum mismatch")]
    Corrupt,
}

/// One page to store: filled in by the device is `result`.
///
/// See the example of [`Device`].
pub struct StoreOp<'a> {
    /// The frame, allocated and exclusively the caller's.
    pub pfn: Pfn,
    /// The bytes.
    pub page: &'a Page,
    /// Their checksum, to be kept with them; none ([`Sum::default`]) for a device that [is memory](Device::is_memory).
    pub sum: Sum,
    /// The outcome.
    pub result: Result<(), DeviceError>,
}

/// One page to load: filled in by the device are `page` and `result` (the checksum stored with it).
///
/// See the example of [`Device`].
pub struct LoadOp<'a> {
    /// A frame that the caller holds a reference to.
    pub pfn: Pfn,
    /// Where the bytes go.
    pub page: &'a mut Page,
    /// The checksum kept with the page, or why it could not be read. Comparing it is the caller's part.
    pub result: Result<Sum, DeviceError>,
}

/// How full a device is, in bytes.
///
/// See the example of [`Device`].
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// What the device may use.
    pub capacity: u64,
    /// What it uses now, waste included.
    pub used: u64,
    /// What the pages on it need at least (for `ram`: the compressed bytes).
    pub payload: u64,
    /// The most that it has used at once.
    pub peak: u64,
}

/// Where pages live when they are not in DRAM.
///
/// A frame is stored once after its allocation and never changed in place, so no call needs to lock out
/// another on the same frame: `load` and `free` of one frame never overlap (a loader holds a reference),
/// and `store` comes before the frame is published. All state that must outlive one process lies in the
/// shared area given at creation. Calls come from several threads and processes at once, and a process
/// may be killed inside any of them: what it had locked must be taken over by the next
/// ([`crate::sys::RobustLock`]) and what it had half changed must be rebuilt from what is stored.
/// A device must not panic and must not touch memory that the domain manages.
///
/// # Example
///
/// Pages in a vector. (`examples/device.rs` stores equal pages once.)
///
/// ```
/// use std::sync::Mutex;
///
/// use farpage::device::{Device, DeviceError, LoadOp, Owner, Pfn, StoreOp, Sum, Usage};
/// use farpage::{Domain, Page, Target};
///
/// struct Shelf(Mutex<Vec<Option<(Page, Sum)>>>);
///
/// impl Shelf {
///     fn places(&self) -> std::sync::MutexGuard<'_, Vec<Option<(Page, Sum)>>> {
///         self.0.lock().unwrap()
///     }
/// }
///
/// impl Device for Shelf {
///     fn name(&self) -> &str {
///         "shelf"
///     }
///     fn frames(&self) -> u32 {
///         self.places().len() as u32
///     }
///     fn store(&self, ops: &mut [StoreOp<'_>], _: Owner) {
///         for op in ops {
///             op.result = match self.places().get_mut(op.pfn as usize) {
///                 Some(place) => Ok(*place = Some((op.page.clone(), op.sum))),
///                 None => Err(DeviceError::Full),
///             };
///         }
///     }
///     fn load(&self, ops: &mut [LoadOp<'_>]) {
///         for op in ops {
///             op.result = match self.places().get(op.pfn as usize) {
///                 Some(Some((page, sum))) => {
///                     op.page.clone_from(page);
///                     Ok(*sum)
///                 }
///                 _ => Err(DeviceError::Corrupt),
///             };
///         }
///     }
///     fn sum(&self, pfn: Pfn) -> Sum {
///         self.places()[pfn as usize].as_ref().map_or(Sum::default(), |(_, sum)| *sum)
///     }
///     fn free(&self, pfns: &[Pfn], _: Owner) {
///         pfns.iter().for_each(|&pfn| self.places()[pfn as usize] = None);
///     }
///     fn usage(&self) -> Usage {
///         let used = 4096 * self.places().iter().flatten().count() as u64;
///         Usage { capacity: 4096 * u64::from(self.frames()), used, payload: used, peak: used }
///     }
/// }
///
/// let shelf = Shelf(Mutex::new(vec![None; 1024]));
/// let space = Domain::builder().dram("8M").own_device(shelf).build()?.start_inline()?;
/// let v = space.region_from_fn(1 << 20, |i| (i >> 12) as u8)?;
/// space.migrate(v.pages(..), Target::Device(0))?;
/// assert_eq!(space.domain.pagemap(0).device.usage().used, 1 << 20);
/// assert!(v.iter().enumerate().all(|(i, &x)| x == (i >> 12) as u8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Device: Send + Sync {
    /// A short name for messages, for example `ram:1G`.
    fn name(&self) -> &str;
    /// How many frames it can have.
    fn frames(&self) -> u32;
    /// Stores a batch; each page succeeds or fails on its own.
    fn store(&self, ops: &mut [StoreOp<'_>], owner: Owner);
    /// Loads a batch; each page succeeds or fails on its own.
    fn load(&self, ops: &mut [LoadOp<'_>]);
    /// The checksum of a stored frame.
    fn sum(&self, pfn: Pfn) -> Sum;
    /// The checksums, and perhaps the bytes, of these frames are going to be asked for: a device in memory may have
    /// them fetched into the cache, all at the same time.
    ///
    /// See the example of [`Driver`].
    fn soon(&self, pfns: &mut dyn Iterator<Item = Pfn>) {
        let _pfns = pfns;
    }
    /// The frame's storage is no longer needed (Linux: `page_free`). Must be idempotent: a process that
    /// died inside it has it called again. `pfns` may be many: one pass, one lock.
    fn free(&self, pfns: &[Pfn], owner: Owner);
    /// A process of the domain has died: take over what it had locked and repair what it had half changed. To be
    /// called by the launcher after each death and before the dead process's slot is given to another, which a
    /// lock could not tell from the dead. `owner` is the caller.
    ///
    /// See the example of [`Driver`].
    fn repair(&self, owner: Owner) {
        let _owner = owner;
    }
    /// Whether it is plain memory, in which pages lie as they are: it needs no checksum with a page that is stored, and
    /// what it loads is not verified; a store is so short that it may be done under a lock.
    ///
    /// See the example of [`Driver`].
    fn is_memory(&self) -> bool {
        false
    }
    /// The address in this process of the frame's bytes, where they lie in memory as they are: in the domain's shared memory, or
    /// in [`Device::memory`]. From there a page can be mapped in place.
    ///
    /// See the example of [`Driver`].
    fn address_of(&self, pfn: Pfn) -> Option<usize> {
        let _pfn = pfn;
        None
    }
    /// The memory in which the pages lie, where the CPU reaches them at frame number × 4096 bytes: it gives the device's
    /// pagemap its type.
    ///
    /// See the example of [`Driver`].
    fn memory(&self) -> Option<&memory::DeviceMemory> {
        None
    }
    /// The frames `[first, end)` are free and are not going to be allocated: what memory stands behind them may go back to
    /// the kernel. Returns how many bytes did.
    ///
    /// See the example of [`Driver`].
    fn shrunk(&self, first: Pfn, end: Pfn) -> u64 {
        let _frames = (first, end);
        0
    }
    /// All frames are free and nobody can get one: gives what is still held of the system's memory or storage back.
    /// (Nothing, where freeing the frames has done it.)
    ///
    /// See the example of [`Driver`].
    fn remove(&self, owner: Owner) -> Result<(), rustix::io::Errno> {
        let _owner = owner;
        Ok(())
    }
    /// How full it is.
    fn usage(&self) -> Usage;
}

/// What a device needs to be opened by one process of the domain.
#[doc(hidden)]
pub struct Attach {
    /// Its zero-initialised shared memory, of the length that [`spec::Spec::shared_len`] gave; the same bytes
    /// in every process, at different addresses.
    pub area: SharedArea,
    /// For devices with a file: a path by which every process of the domain can open it.
    pub path: Option<String>,
    /// Who is alive, for [`crate::sys::RobustLock`].
    pub peers: std::sync::Arc<dyn crate::sys::Peers>,
    /// True once, in the launcher: the area is fresh and may be formatted.
    pub create: bool,
}
