//! Pagemaps: a registered range of a device's frames with a memory type (Linux: `dev_pagemap`).
//!
//! Here the counts of [`crate::frame`] and the driver of a device meet: allocation takes a frame from 0 to 1, and the
//! last `put`, of whatever type, runs the one path that hands it back.
//!
//! | to do | call |
//! |---|---|
//! | bring a device's frames in | [`Pagemap::register`] |
//! | find the pagemap of a frame, and keep it for a moment | [`lookup`], [`Pagemap::live`] |
//! | take a free frame; one more reference; drop references | [`Pagemap::alloc_held`], [`Pagemap::get`], [`Pagemap::put`] |
//! | hold frames outside of page entries, so that a killed process's are found | [`Hold`] |
//! | reach the memory itself | [`Mapping`] |
//! | take the device away | [`Pagemap::unregister`] |
//!
//! ```
//! use std::time::Duration;
//!
//! use farpage::device::memory::MemorySpec;
//! use farpage::pagemap::{Owner, Pagemap, Registration, SharedArea};
//!
//! const ME: Owner = 1; // this process's slot
//! let memory = "generic:memfd:4M".parse::<MemorySpec>()?.create()?;
//! let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
//! let map = Pagemap::register(Registration::memory(0, memory), counts, true)?;
//!
//! let two = map.map_new(ME, 8192, 4096)?;
//! let again = map.map(ME, two.hold().pfn(), 4096)?;
//! two.write(0, b"hello");
//! assert_eq!(map.count(two.hold().pfn()), 2);
//!
//! drop(two);
//! let error = map.unregister(&mut (), ME, Duration::ZERO).unwrap_err();
//! assert!(error.to_string().contains("frame 0 (1 reference: 1 mapping of process slot 1)"));
//! drop(again);
//! map.unregister(&mut (), ME, Duration::ZERO)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What checks what
//!
//! Mutations tried by hand, and the tests that catch each (`tests/pagemap.rs`, `mapping.rs`, `pagemap_model.rs`):
//!
//! | mutation | caught by |
//! |---|---|
//! | `page_free` is not called; is called twice | `one_life_for_every_type`; and many more |
//! | allocating, or `get`, while unregistering | `unregistering_waits_and_says_for_whom` |
//! | unregistering does not wait for frames | `unregistering_waits_and_says_for_whom` |
//! | … for live references | `a_lookup_finds_the_pagemap_until_it_goes`, `a_dead_process_keeps_nothing_alive` |
//! | … leaves a `ram` device's memory, a `file` device's blocks | `a_paging_device_gives_back_all_that_it_took` |
//! | a child's drop of a hold puts; a child inherits mappings | `a_child_does_not_inherit_a_mapping` |
//! | the memory of free frames stays | `a_mapped_page_has_a_reference_and_the_last_unmap_frees_it` |
//! | peer memory is mapped for everyone | `peer_memory_is_in_use_from_its_allocation_and_mapped_on_request` |
//! | reaping forgets the ledger | `what_a_killed_process_held_is_given_back`, `model_equals_pagemap` |
//! | overlapping ranges | `registering_says_what_is_wrong` |

use arrayvec::ArrayVec;

use crate::device::{DeviceError, LoadOp, Sum};
pub use crate::device::{Driver, MemoryType, PagemapOps};
pub use crate::frame::ledger::HolderKind;
use crate::frame::ledger::Ledger;
use crate::frame::live::{self, Phase};
use crate::frame::{BATCH, FrameTable};
pub use crate::frame::{GetError, Owner, Pfn};
pub use crate::sys::SharedArea;

mod hold;
mod mapping;
mod register;
mod unregister;

pub use hold::{Hold, HoldError, Run};
pub use mapping::{MapError, Mapping};
pub use register::{DriverId, RANGE_ALIGN, RegisterError, Registration};
pub use unregister::{Held, Holder, Tenants, UnregisterError};

/// How often a load is tried.
const ATTEMPTS: u64 = 3;

/// A device's frames under the one rule.
///
/// ```
/// use std::time::Duration;
///
/// use farpage::device::memory::MemorySpec;
/// use farpage::pagemap::{
///     AllocError, GetError, HolderKind, MapError, NotLive, Owner, Pagemap, RefError, Registration, SharedArea, lookup,
/// };
///
/// const ME: Owner = 1;
/// let memory = "generic:memfd:1M".parse::<MemorySpec>()?.create()?;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
/// let maps = [Pagemap::register(Registration::memory(0, memory), counts, true)?];
/// let map = lookup(&maps, 0, 255, ME)?; // is not unregistered meanwhile
/// assert_eq!((map.name(), map.has(255), map.has(256)), ("generic:memfd:1M", true, false));
/// assert_eq!(map.live(ME).err(), None);
///
/// // One frame, held by a driver; a reader has it for a moment.
/// let hold = map.alloc_held(ME, HolderKind::Driver, 1, 1)?;
/// let pfn = hold.pfn();
/// map.get(pfn, ME)?;
/// assert_eq!((map.count(pfn), map.used()), (2, 1));
/// assert_eq!(map.holders(pfn)[0].kind, HolderKind::Driver);
/// map.put(&[pfn], ME);
/// drop(hold);
/// assert_eq!(map.get(pfn, ME), Err(RefError::Frame(GetError::Free)), "nothing resurrects it");
/// assert!(matches!(map.map(ME, pfn, 4096), Err(MapError::Hold(_))), "nor maps it");
///
/// map.set_limit(64); // frames from there on are not allocated
/// assert_eq!(map.limit(), 64);
///
/// drop(map);
/// let map = &maps[0];
/// let hold = map.map_p2p(ME, map.map_new(ME, 4096, 4096)?.hold().pfn(), 4096)?; // as `map`, also of peer memory
/// assert!(map.unregister(&mut (), ME, Duration::ZERO).is_err());
/// assert_eq!(map.live(ME).err(), Some(NotLive::Unregistering));
/// assert!(map.resume(ME) && map.live(ME).is_ok());
/// # drop(hold);
/// # let _type: Option<AllocError> = None;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Pagemap {
    /// Its number in the domain, 0 to 15, which page entries name.
    pub id: u8,
    /// The type.
    pub memory_type: MemoryType,
    /// The counts.
    #[doc(hidden)]
    pub frames: FrameTable,
    /// Frames from this number on are not allocated; 0: there is no such limit. Shared, as the counts are.
    limit: &'static std::sync::atomic::AtomicU32,
    /// The driver, as a device that stores and loads pages.
    pub device: Driver,
    /// Whose the memory is: pagemaps of one driver have the same.
    pub driver: DriverId,
    live: live::Live,
    /// References that are in no page entry.
    #[doc(hidden)]
    pub ledger: Ledger,
    /// One thread of a process at a time changes the ledger, so that a mark and a record that moves belong together.
    holding: crate::sys::Mutex<()>,
}

/// Why a pagemap gives no new references.
///
/// See the example of [`Pagemap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotLive {
    /// [`Pagemap::unregister`] has begun.
    #[error("the memory is being unregistered")]
    Unregistering,
    /// It has ended, or registering has not.
    #[error("the memory is not registered")]
    Unregistered,
}

/// Why a frame could not be allocated.
///
/// See the example of [`Pagemap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AllocError {
    /// See [`NotLive`].
    #[error(transparent)]
    NotLive(#[from] NotLive),
    /// No frame, or no run of so many, is free.
    #[error("no free frame")]
    Full,
}

/// Why a reference could not be had.
///
/// See the example of [`Pagemap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RefError {
    /// See [`NotLive`].
    #[error(transparent)]
    NotLive(#[from] NotLive),
    /// The frame is in none of the pagemap's ranges, or there is no pagemap of that number.
    #[error("no such frame")]
    NoFrame,
    /// See [`GetError`].
    #[error(transparent)]
    Frame(#[from] GetError),
}

/// A pagemap that is not unregistered while this lives. Short-lived, like a lock's guard: unregistering waits for it.
/// Not to be taken into a forked child.
///
/// See the example of [`Pagemap`].
pub struct Live<'a> {
    map: &'a Pagemap,
    owner: Owner,
}

impl std::ops::Deref for Live<'_> {
    type Target = Pagemap;

    fn deref(&self) -> &Pagemap {
        self.map
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.map.live.put(self.owner);
    }
}

/// The pagemap of frame `pfn` of device `id`, with a live reference for `owner` (Linux: `get_dev_pagemap`).
///
/// See the example of [`Pagemap`].
///
/// # Errors
/// [`RefError::NoFrame`]; [`RefError::NotLive`] once unregistering has begun.
pub fn lookup(maps: &[Pagemap], id: u8, pfn: Pfn, owner: Owner) -> Result<Live<'_>, RefError> {
    let map =
        maps.get(usize::from(id)).filter(|map| map.id == id && map.has(pfn)).ok_or(RefError::NoFrame)?;
    Ok(map.live(owner)?)
}

impl Pagemap {
    /// The driver's name, for messages.
    pub fn name(&self) -> &str {
        self.device.ops().name()
    }

    /// Whether the frame is in one of its ranges.
    pub fn has(&self, pfn: Pfn) -> bool {
        pfn.checked_add(1).is_some_and(|end| self.frames.covers(pfn, end))
    }

    /// The frame's reference count: 0 if it is free, or is no frame of this memory.
    pub fn count(&self, pfn: Pfn) -> u32 {
        if self.has(pfn) { self.frames.count(pfn) } else { 0 }
    }

    /// How many frames are in use: have a count above 0.
    pub fn used(&self) -> usize {
        self.frames.used()
    }

    /// A live reference for `owner`.
    ///
    /// # Errors
    /// [`NotLive`] once unregistering has begun.
    pub fn live(&self, owner: Owner) -> Result<Live<'_>, NotLive> {
        if self.live.try_get(owner) {
            return Ok(Live { map: self, owner });
        }
        Err(self.not_live())
    }

    /// Frames from this number on are not allocated.
    pub fn limit(&self) -> Pfn {
        // SeqCst: who has set it, and then finds a frame free, knows that it stays so.
        match self.limit.load(std::sync::atomic::Ordering::SeqCst) {
            0 => self.frames.len() as Pfn,
            limit => limit,
        }
    }

    /// Sets that limit. Frames beyond it that are in use stay in use, until they are moved ([`crate::space::Space::shrink`]).
    pub fn set_limit(&self, limit: Pfn) {
        self.limit.store(limit.max(1), std::sync::atomic::Ordering::SeqCst);
    }

    /// What is to be said when a live reference could not be had.
    fn not_live(&self) -> NotLive {
        match self.live.phase() {
            Phase::Fresh | Phase::Gone => NotLive::Unregistered,
            // Live: just again; it was not a moment ago.
            Phase::Opening | Phase::Live | Phase::Closed | Phase::Removing => NotLive::Unregistering,
        }
    }

    /// Allocates a frame for `owner`, in transit until [`FrameTable::settle`]. `None`: see [`Self::try_alloc`].
    #[doc(hidden)]
    pub fn alloc(&self, owner: Owner) -> Option<Pfn> {
        self.try_alloc(owner).ok()
    }

    /// Allocates a frame for `owner`, in transit until [`FrameTable::settle`].
    ///
    /// # Errors
    /// [`AllocError::Full`]; [`AllocError::NotLive`] once unregistering has begun.
    #[doc(hidden)]
    pub fn try_alloc(&self, owner: Owner) -> Result<Pfn, AllocError> {
        let live = self.live(owner)?;
        live.frames.alloc_below(self.limit(), owner).ok_or(AllocError::Full)
    }

    /// Allocates `len` frames that follow each other, the first a multiple of `align`; each in transit until it is
    /// settled.
    ///
    /// # Errors
    /// As [`Self::try_alloc`].
    #[doc(hidden)]
    pub fn try_alloc_run(&self, owner: Owner, len: u32, align: u32) -> Result<Pfn, AllocError> {
        let live = self.live(owner)?;
        live.frames.alloc_run(owner, len, align).ok_or(AllocError::Full)
    }

    /// One more reference to a frame in use, for a moment; [`Hold`] is for longer.
    ///
    /// # Errors
    /// [`RefError::Frame`] if it is free or frozen; the others as [`lookup`].
    pub fn get(&self, pfn: Pfn, owner: Owner) -> Result<(), RefError> {
        if !self.has(pfn) {
            return Err(RefError::NoFrame);
        }
        let live = self.live(owner)?;
        Ok(live.frames.get(pfn)?)
    }

    /// One more reference for `owner`, in transit; waits out another's transfer. It is made from one that the caller
    /// holds, so unregistering, which waits for that one, does not refuse it: `fork` cannot fail for it.
    #[doc(hidden)]
    pub fn get_in_transit(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        self.frames.get_in_transit_waiting(pfn, owner)
    }

    /// Drops a reference of each frame, whatever its type (Linux: `release_pages`); those whose last it was go back to
    /// the driver, all at once.
    pub fn put(&self, pfns: &[Pfn], owner: Owner) {
        self.put_batches(pfns, owner, false);
    }

    /// Drops references that transfers hold ([`FrameTable::begin_put`] or an allocation), as [`Self::put`].
    #[doc(hidden)]
    pub fn put_in_transit(&self, pfns: &[Pfn], owner: Owner) {
        self.put_batches(pfns, owner, true);
    }

    fn put_batches(&self, pfns: &[Pfn], owner: Owner, in_transit: bool) {
        let mut last = [0; BATCH];
        for batch in pfns.chunks(BATCH) {
            let n = self.frames.put_all(batch, owner, in_transit, &mut last);
            self.free_batch(&mut last[..n], owner);
        }
    }

    /// The one path at count 0: storage back to the driver, then the frame is free.
    #[doc(hidden)]
    pub fn free(&self, pfns: &[Pfn], owner: Owner) {
        for batch in pfns.chunks(BATCH) {
            let mut batch: ArrayVec<Pfn, BATCH> = batch.iter().copied().collect();
            self.free_batch(&mut batch, owner);
        }
    }

    fn free_batch(&self, pfns: &mut [Pfn], owner: Owner) {
        if !pfns.is_empty() {
            self.device.ops().page_free(pfns, owner);
            self.frames.release_all(pfns);
        }
    }

    /// A process has died (the caller is `owner`): repairs what it had half changed. Before its slot is another's.
    #[doc(hidden)]
    pub fn repair(&self, dead: Owner, owner: Owner) {
        self.device.ops().repair(owner);
        self.live.forget(dead);
        // It may have died between freeing a frame and saying so.
        self.frames.format();
    }

    /// Loads frames that the caller holds references to, each verified against its checksum and tried again before it is
    /// given up. Returns how many from the start are good, how many attempts went wrong, and what was wrong with
    /// the first that is not good.
    #[doc(hidden)]
    pub fn load(&self, ops: &mut [LoadOp<'_>]) -> (usize, u64, Result<(), DeviceError>) {
        self.device.load(ops);
        let verify = !self.device.is_memory();
        let mut bad = 0;
        for (good, op) in ops.iter_mut().enumerate() {
            for attempt in 1.. {
                let error = match &op.result {
                    Ok(sum) if !verify || *sum == Sum::of(op.page) => break,
                    Ok(_) => DeviceError::Corrupt,
                    Err(e) => e.clone(),
                };
                bad += 1;
                if attempt == ATTEMPTS {
                    return (good, bad, Err(error));
                }
                self.device.load(std::slice::from_mut(op));
            }
        }
        (ops.len(), bad, Ok(()))
    }
}

impl std::fmt::Debug for Pagemap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pagemap").field("id", &self.id).field("name", &self.name()).finish_non_exhaustive()
    }
}
