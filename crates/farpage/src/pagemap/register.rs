//! Registering device memory (Linux: `memremap_pages`).

use std::ops::Range;

use super::{MemoryType, NotLive, Pagemap, PagemapOps};
use crate::device::memory::DeviceMemory;
use crate::device::{Device, Driver};
use crate::frame::ledger::Ledger;
use crate::frame::live::{Live, Phase, STRIDE};
use crate::frame::{FrameTable, MAX_OWNER, Owner, Pfn};
use crate::sys::SharedArea;

/// Ranges begin and end at multiples of so many frames (or end with the device): one word of free-frame hints.
pub const RANGE_ALIGN: u32 = 64;

/// The highest number of a pagemap: what a page entry can name.
const MAX_ID: u8 = 15;
/// Records of a pagemap's ledger.
const HOLDS: usize = 1 << 14;
/// Bytes of the head: search cursor, waiters, high marks, the limit; on the next line the state.
const HEAD: usize = 128;
const SLOTS: usize = (MAX_OWNER as usize + 1) * STRIDE * 4;
/// Who registers: the launcher, whose end is that of all.
const NOBODY: Owner = 0;
const LEDGER: usize = HOLDS * 8;

/// Whose device memory is (Linux: `dev_pagemap.owner`): a driver finds its own pages by it.
///
/// See the example of [`PagemapOps`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct DriverId(pub u64);

/// What is to be registered.
///
/// ```
/// use farpage::pagemap::{Pagemap, RegisterError, Registration, SharedArea};
/// use farpage::device::memory::MemorySpec;
///
/// let memory = || "generic:memfd:1M".parse::<MemorySpec>().unwrap().create();
/// let counts = SharedArea::anonymous(Pagemap::shared_len(256))?;
/// let what = Registration { ranges: vec![0..64, 128..256], ..Registration::memory(3, memory()?) };
/// let map = Pagemap::register(what, counts, true)?;
/// assert!(map.has(63) && !map.has(64) && map.has(128));
///
/// // What is wrong is said precisely.
/// let what = Registration { ranges: vec![0..128, 64..256], ..Registration::memory(4, memory()?) };
/// let error = Pagemap::register(what, counts, true).unwrap_err();
/// assert_eq!(error, RegisterError::Overlap(0..128, 64..256));
/// assert_eq!(error.to_string(), "frames 0..128 and 64..256 overlap");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Registration {
    /// Its number in the domain, 0 to 15.
    pub id: u8,
    /// The type.
    pub memory_type: MemoryType,
    /// Whose it is.
    pub driver: DriverId,
    /// The frames: one or several ranges, which begin and end at multiples of [`RANGE_ALIGN`] or with the device.
    pub ranges: Vec<Range<Pfn>>,
    /// The driver.
    pub ops: Box<dyn PagemapOps>,
}

impl Registration {
    /// All frames of memory that the CPU reaches in place.
    pub fn memory(id: u8, memory: DeviceMemory) -> Self {
        let (memory_type, frames) = (memory.memory_type(), memory.frames());
        let driver = DriverId(u64::from(id));
        Self { id, memory_type, driver, ranges: vec![0..frames; 1], ops: Box::new(memory) }
    }

    /// All frames of a device that stores and loads pages.
    ///
    /// ```
    /// # use farpage::device::{Device, LoadOp, Owner, Pfn, StoreOp, Sum, Usage};
    /// # struct Shelf;
    /// # impl Device for Shelf {
    /// #     fn name(&self) -> &str { "shelf" }
    /// #     fn frames(&self) -> u32 { 1024 }
    /// #     fn store(&self, _: &mut [StoreOp<'_>], _: Owner) {}
    /// #     fn load(&self, _: &mut [LoadOp<'_>]) {}
    /// #     fn sum(&self, _: Pfn) -> Sum { Sum::default() }
    /// #     fn free(&self, _: &[Pfn], _: Owner) {}
    /// #     fn usage(&self) -> Usage { Usage::default() }
    /// # }
    /// use farpage::pagemap::{MemoryType, Pagemap, Registration, SharedArea};
    ///
    /// let counts = SharedArea::anonymous(Pagemap::shared_len(1024))?;
    /// let map = Pagemap::register(Registration::paging(0, Box::new(Shelf)), counts, true)?;
    /// assert_eq!((map.memory_type, map.used()), (MemoryType::Private, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn paging(id: u8, device: Box<dyn Device>) -> Self {
        let frames = device.frames();
        Self {
            id,
            memory_type: MemoryType::Private,
            driver: DriverId(u64::from(id)),
            ranges: vec![0..frames; 1],
            ops: Box::new(device),
        }
    }
}

/// Why memory could not be registered.
///
/// See the example of [`Registration`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Nothing was to be registered.
    #[error("no frames: {}", .0.as_ref().map_or("no range".into(), |r| format!("range {}..{} is empty", r.start, r.end)))]
    Empty(Option<Range<Pfn>>),
    /// See [`RANGE_ALIGN`].
    #[error("frames {}..{} do not begin and end at multiples of {RANGE_ALIGN}", .0.start, .0.end)]
    Unaligned(Range<Pfn>),
    /// Two ranges have frames in common.
    #[error("frames {}..{} and {}..{} overlap", .0.start, .0.end, .1.start, .1.end)]
    Overlap(Range<Pfn>, Range<Pfn>),
    /// A range goes beyond the device's frames.
    #[error("frames {}..{} go beyond the {} that the device has", .0.start, .0.end, .1)]
    Beyond(Range<Pfn>, u32),
    /// The shared memory for counts is too small.
    #[error("{0} bytes of shared memory, {1} are needed")]
    Area(usize, usize),
    /// The type needs an operation that the driver does not have.
    #[error("{0:?} memory needs `{1}`")]
    MissingOp(MemoryType, &'static str),
    /// The type cannot be registered.
    #[error("{0:?} pages are not a device's")]
    Type(MemoryType),
    /// The driver's memory is of another type.
    #[error("{1:?} memory cannot be registered as {0:?}")]
    Differs(MemoryType, MemoryType),
    /// The number is above 15.
    #[error("pagemap number {0} is above {MAX_ID}")]
    Id(u8),
    /// The memory is registered already.
    #[error("already registered")]
    Registered,
    /// Joining what was never registered.
    #[error(transparent)]
    NotLive(#[from] NotLive),
}

impl Pagemap {
    /// Bytes of shared memory that the counts of `frames` frames, and what goes with them, need. Sparse: what is never
    /// used costs nothing.
    pub fn shared_len(frames: u32) -> usize {
        HEAD + SLOTS + LEDGER + FrameTable::shared_len(frames as usize)
    }

    /// Where things lie in an area of so many frames' counts: what all who use it touch, process slot `owner` among them.
    pub(crate) fn shared_parts(owner: Owner) -> [Range<usize>; 3] {
        let slot = HEAD + usize::from(owner) * STRIDE * 4;
        [0..HEAD, slot..slot + STRIDE * 4, HEAD + SLOTS..HEAD + SLOTS + LEDGER]
    }

    /// … and the counts of these frames, with their hints: whole groups of 64.
    pub(crate) fn counts_parts(frames: u32, which: &Range<Pfn>) -> [Range<usize>; 2] {
        let words = HEAD + SLOTS + LEDGER;
        let hints = words + (frames as usize).next_multiple_of(64) * 4;
        let (from, to) = (which.start as usize / 64, (which.end as usize).div_ceil(64));
        [words + from * 256..words + to * 256, hints + from * 8..hints + to * 8]
    }

    /// Registers a device's frames; every count is 0, of every type. `area` is shared memory of
    /// [`Pagemap::shared_len`] bytes of the device's highest frame. `create`: the memory is registered for all
    /// processes; otherwise this process joins what another has registered with the same `what`.
    ///
    /// After [`Pagemap::unregister`] the same area can be used to register again.
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing has changed then.
    pub fn register(what: Registration, area: SharedArea, create: bool) -> Result<Self, RegisterError> {
        let Registration { id, memory_type, driver, mut ranges, ops } = what;
        let end = check(id, memory_type, &mut ranges, &*ops)?;
        if area.len() < Self::shared_len(end) {
            return Err(RegisterError::Area(area.len(), Self::shared_len(end)));
        }
        let (head, rest) = area.split(HEAD);
        let (live, rest) = rest.split(SLOTS);
        let (ledger, rest) = rest.split(LEDGER);
        let (words, hints) = rest.split((end as usize).next_multiple_of(64) * 4);
        let head = head.atomics32();
        let frames = FrameTable::new(words.atomics32(), hints.atomics64(), &head[0], &head[1], &head[2])
            .limited_to(&ranges);
        let map = Self {
            id,
            memory_type,
            frames,
            device: Driver(ops),
            driver,
            limit: &head[4],
            live: Live::new(&head[16], live.atomics32()),
            ledger: Ledger::new(ledger.atomics64(), &head[3]),
            holding: crate::sys::Mutex::new(()),
        };
        if !create {
            // What is going or has gone is joined all the same: a process that starts then has the other devices, and
            // this one says on each use that it is not there.
            return if map.live.phase() == Phase::Fresh { Err(map.not_live().into()) } else { Ok(map) };
        }
        if !map.live.begin_open(NOBODY) {
            return Err(RegisterError::Registered);
        }
        // All counts are 0; somebody who died may have left a hint.
        map.frames.format();
        map.live.finish_open(NOBODY);
        Ok(map)
    }
}

/// The end of the highest range.
fn check(
    id: u8,
    memory_type: MemoryType,
    ranges: &mut [Range<Pfn>],
    ops: &dyn PagemapOps,
) -> Result<Pfn, RegisterError> {
    if id > MAX_ID {
        return Err(RegisterError::Id(id));
    }
    match memory_type {
        MemoryType::System => return Err(RegisterError::Type(memory_type)),
        MemoryType::Private | MemoryType::Coherent if ops.migrate_to_ram().is_none() => {
            return Err(RegisterError::MissingOp(memory_type, "migrate_to_ram"));
        }
        MemoryType::Coherent | MemoryType::Generic | MemoryType::P2pDma if ops.memory().is_none() => {
            return Err(RegisterError::MissingOp(memory_type, "memory"));
        }
        _ => {}
    }
    if let Some(memory) = ops.memory().filter(|memory| memory.memory_type() != memory_type) {
        return Err(RegisterError::Differs(memory_type, memory.memory_type()));
    }
    ranges.sort_by_key(|r| (r.start, r.end));
    let end = ranges.iter().map(|r| r.end).max().ok_or(RegisterError::Empty(None))?;
    if let Some(empty) = ranges.iter().find(|r| r.start >= r.end) {
        return Err(RegisterError::Empty(Some(empty.clone())));
    }
    let device_end = ops.frames();
    if let Some(beyond) = ranges.iter().find(|r| r.end > device_end) {
        return Err(RegisterError::Beyond(beyond.clone(), device_end));
    }
    let aligned = |pfn: Pfn| pfn.is_multiple_of(RANGE_ALIGN);
    if let Some(r) = ranges.iter().find(|r| !aligned(r.start) || !(aligned(r.end) || r.end == device_end)) {
        return Err(RegisterError::Unaligned(r.clone()));
    }
    if let Some(two) = ranges.windows(2).find(|two| two[0].end > two[1].start) {
        return Err(RegisterError::Overlap(two[0].clone(), two[1].clone()));
    }
    Ok(end)
}
