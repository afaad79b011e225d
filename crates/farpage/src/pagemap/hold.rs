//! Holding frames outside of page entries: what a mapping, a pin or a driver's allocation has.

use super::{AllocError, NotLive, Pagemap};
use crate::frame::ledger::{Extent, HolderKind, MAX_LEN, Place};
use crate::frame::{BATCH, GetError, Owner, Pfn};

/// References to a run of frames, one each, recorded in the pagemap's ledger: should the process be killed, whoever
/// cleans up after it gives them back.
///
/// It belongs to the process that made it. In a forked child its drop does nothing: the child has no references.
///
/// ```
/// use farpage::device::memory::MemorySpec;
/// use farpage::pagemap::{HoldError, HolderKind, Owner, Pagemap, Registration, SharedArea};
///
/// const ME: Owner = 1;
/// let memory = "generic:memfd:1M".parse::<MemorySpec>()?.create()?;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
/// let map = Pagemap::register(Registration::memory(0, memory), counts, true)?;
///
/// let driver = map.alloc_held(ME, HolderKind::Driver, 16, 16)?;
/// assert_eq!((driver.pfn() % 16, driver.len(), driver.is_empty(), driver.map().id), (0, 16, false, 0));
/// let pin = map.hold(ME, HolderKind::Pin, driver.pfn() + 3, 2)?;
/// drop(driver);
/// assert_eq!(map.used(), 2, "what is pinned stays");
/// drop(pin);
/// assert_eq!(map.alloc_held(ME, HolderKind::Driver, 257, 1).err(), Some(HoldError::Full(257)));
/// assert!(!HolderKind::Entry.is_kept(), "a page entry is its own record");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Hold<'m> {
    map: &'m Pagemap,
    run: Run,
}

/// What a [`Hold`] is, without the pagemap: for those who keep both. To be given back by [`Pagemap::end_run`].
#[derive(Debug)]
#[doc(hidden)]
pub struct Run {
    owner: Owner,
    pid: u32,
    pfn: Pfn,
    /// Frames held from `pfn` on.
    len: u32,
    /// The records, each but the last one of [`MAX_LEN`] frames.
    places: Vec<Place>,
}

/// Why frames could not be held.
///
/// See the example of [`Hold`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// See [`NotLive`].
    #[error(transparent)]
    NotLive(#[from] NotLive),
    /// No run of so many frames is free.
    #[error("no {0} free frames in a row")]
    Full(u32),
    /// No frames, or frames that the pagemap does not have.
    #[error("frames {0}..{1} are not all in this memory")]
    NoFrame(Pfn, u64),
    /// A frame to be held is not in use, or has too many references.
    #[error("frame {0}: {1}")]
    Frame(Pfn, GetError),
    /// The ledger has no room for one more record.
    #[error("too many mappings and pins of this memory")]
    TooMany,
    /// The counts of these pages have no memory yet, and there is none.
    #[error(
        "there is no memory for the reference counts of more pages ({0}): is /dev/shm, or where they are, full?"
    )]
    Memory(rustix::io::Errno),
    /// Page entries are not kept in a ledger.
    #[error("a {0} does not hold frames by a record")]
    Kind(HolderKind),
}

fn check(kind: HolderKind) -> Result<(), HoldError> {
    if kind.is_kept() { Ok(()) } else { Err(HoldError::Kind(kind)) }
}

impl Pagemap {
    /// Allocates `len` frames that follow each other, the first a multiple of `align`, and holds them.
    ///
    /// # Errors
    /// See [`HoldError`]; nothing is held then.
    pub fn alloc_held(
        &self,
        owner: Owner,
        kind: HolderKind,
        len: u32,
        align: u32,
    ) -> Result<Hold<'_>, HoldError> {
        Ok(Hold { map: self, run: self.alloc_run(owner, kind, len, align)? })
    }

    /// As [`Self::alloc_held`], for those who keep the pagemap themselves.
    ///
    /// # Errors
    /// See [`HoldError`]; nothing is held then.
    #[doc(hidden)]
    pub fn alloc_run(&self, owner: Owner, kind: HolderKind, len: u32, align: u32) -> Result<Run, HoldError> {
        if len == 0 {
            return Err(HoldError::NoFrame(0, 0));
        }
        check(kind)?;
        let pfn = self.try_alloc_run(owner, len, align).map_err(|e| match e {
            AllocError::NotLive(e) => e.into(),
            AllocError::Full => HoldError::Full(len),
        })?;
        let _one_at_a_time = self.holding.lock();
        let mut run = Run::empty(owner, pfn);
        // Until a record names them the frames are in transit: whoever cleans up after us frees them.
        for from in (0..len).step_by(MAX_LEN as usize) {
            let n = (len - from).min(MAX_LEN);
            let extent = Extent { owner, kind, pfn: pfn + from, len: n, moving: false };
            let Some(place) = self.ledger.add(extent) else {
                self.put_run_in_transit(pfn + from, len - from, owner);
                self.shrink_locked(&mut run, 0);
                return Err(HoldError::TooMany);
            };
            run.places.push(place);
            run.len += n;
            (pfn + from..pfn + from + n).for_each(|pfn| self.frames.settle(pfn));
        }
        Ok(run)
    }

    fn put_run_in_transit(&self, pfn: Pfn, len: u32, owner: Owner) {
        let mut batch = [0; BATCH];
        for from in (0..len).step_by(BATCH) {
            let n = (len - from).min(BATCH as u32);
            (0..n).for_each(|i| batch[i as usize] = pfn + from + i);
            self.put_in_transit(&batch[..n as usize], owner);
        }
    }

    /// Gives back all that a dead process held; its transfers have ended ([`crate::frame::FrameTable::recover`]).
    /// `owner` is the caller.
    #[doc(hidden)]
    pub fn put_holds(&self, dead: Owner, owner: Owner) {
        for (place, extent) in self.ledger.of(dead) {
            let mut batch = [0; BATCH];
            let mut len = extent.len;
            while len > 0 {
                let n = len.min(BATCH as u32);
                len -= n;
                (0..n).for_each(|i| batch[i as usize] = extent.pfn + len + i);
                self.put(&batch[..n as usize], owner);
            }
            self.ledger.end(place);
        }
    }

    /// In a forked child, before it holds anything: a thread of the parent may have been making or dropping a hold, and the
    /// lock that orders those threads would stay taken here. The holds are the parent's ([`Hold`]). (Of a space's domain,
    /// [`crate::space::Space::after_fork_in_child`] sees to it.)
    ///
    /// # Safety
    /// The caller is the only thread of the process.
    #[allow(unsafe_code, reason = "the contract of the lock")]
    #[doc(hidden)]
    pub unsafe fn after_fork_in_child(&self) {
        // SAFETY: the caller's contract; no guard outlives the calls here.
        unsafe { self.holding.renew(()) }
    }

    /// Cleans up after a dead process in memory that page entries do not name: its transfers, what it held, what it
    /// had half changed. Before its slot is another's. `owner` is the caller.
    #[doc(hidden)]
    pub fn reap(&self, dead: Owner, owner: Owner) {
        for pfn in self.frames.in_transit(dead) {
            if self.frames.recover(pfn, dead, self.ledger.publishes(dead, pfn)) {
                self.free(&[pfn], owner);
            }
        }
        self.put_holds(dead, owner);
        self.repair(dead, owner);
    }

    /// Holds frames that are in use: one more reference each.
    ///
    /// # Errors
    /// See [`HoldError`]; nothing is held then.
    pub fn hold(&self, owner: Owner, kind: HolderKind, pfn: Pfn, len: u32) -> Result<Hold<'_>, HoldError> {
        Ok(Hold { map: self, run: self.begin_run(owner, kind, pfn, len, false)? })
    }

    /// Holds these frames; `first`: those of them that are free are allocated. That is for memory whose frames have
    /// fixed places, as the pages of a file have ([`MemoryType::FsDax`](super::MemoryType::FsDax)).
    ///
    /// # Errors
    /// See [`HoldError`]; nothing is held then.
    #[doc(hidden)]
    pub fn begin_run(
        &self,
        owner: Owner,
        kind: HolderKind,
        pfn: Pfn,
        len: u32,
        first: bool,
    ) -> Result<Run, HoldError> {
        check(kind)?;
        let end = pfn.checked_add(len).filter(|end| self.frames.covers(pfn, *end));
        let end = end.ok_or(HoldError::NoFrame(pfn, u64::from(pfn) + u64::from(len)))?;
        let _live = self.live(owner)?;
        let _one_at_a_time = self.holding.lock();
        let mut run = Run::empty(owner, pfn);
        while run.end() < end {
            if let Err(e) = self.grow_locked(&mut run, kind, end, first) {
                self.shrink_locked(&mut run, 0);
                return Err(e);
            }
        }
        Ok(run)
    }

    /// Gives back the references of a run but for the first `len`.
    #[doc(hidden)]
    pub fn shrink_run(&self, run: &mut Run, len: u32) {
        if run.is_ours() && len < run.len {
            let _one_at_a_time = self.holding.lock();
            self.shrink_locked(run, len);
        }
    }

    /// Gives back all references of a run.
    #[doc(hidden)]
    pub fn end_run(&self, mut run: Run) {
        self.shrink_run(&mut run, 0);
    }

    /// Some more frames at the end. It is not in transit on any when it waits for another's transfer.
    fn grow_locked(&self, run: &mut Run, kind: HolderKind, end: Pfn, first: bool) -> Result<(), HoldError> {
        let begins = run.len.is_multiple_of(MAX_LEN);
        let mut waits = Waits::default();
        loop {
            // An empty record is gone when nothing could be taken.
            let place = match (begins, run.places.last()) {
                (false, Some(place)) => *place,
                _ => self.ledger.begin(run.owner, kind, run.end()).ok_or(HoldError::TooMany)?,
            };
            match self.ledger.grow(place, &self.frames, end - run.end(), first) {
                Ok(n) => {
                    if begins {
                        run.places.push(place);
                    }
                    run.len += n;
                    return Ok(());
                }
                Err(GetError::Transit | GetError::Frozen) => waits.wait(self, run.owner),
                Err(e) => return Err(HoldError::Frame(run.end(), e)),
            }
        }
    }

    /// Gives back references from the end; the lock is held.
    fn shrink_locked(&self, run: &mut Run, len: u32) {
        let mut last = [0; BATCH];
        let mut waits = Waits::default();
        while let Some(&place) = run.places.last() {
            let before = run.full_before();
            let n = run.len - before.max(len).min(run.len);
            if n == 0 {
                if run.len > before {
                    break;
                }
                self.ledger.end(place);
                run.places.pop();
                continue;
            }
            let (dropped, lasts) = self.ledger.shrink(place, &self.frames, n, &mut last);
            self.free_batch(&mut last[..lasts], run.owner);
            run.len -= dropped;
            if dropped == 0 {
                waits.wait(self, run.owner);
            }
        }
        if let Some(&place) = run.places.last() {
            self.ledger.rest(place);
        }
    }

    /// As [`Self::put_holds`], for one who can be killed himself: what the dead held is given back in the dead's name, so
    /// that the next to clean up goes on where this one stopped. Those who hold frames together and are dead must all
    /// have had their transfers ended before.
    #[doc(hidden)]
    pub fn put_holds_of(&self, dead: Owner) {
        let mut last = [0; BATCH];
        for (place, extent) in self.ledger.of(dead) {
            let mut left = extent.len;
            while left > 0 {
                let (dropped, lasts) = self.ledger.shrink(place, &self.frames, left, &mut last);
                self.free_batch(&mut last[..lasts], dead);
                left -= dropped;
                if dropped == 0 {
                    crate::sys::yield_now(); // a living one is just at it
                }
            }
            self.ledger.end(place);
        }
    }
}

/// Waiting for others' transfers, which are over in a moment unless their owner has died.
#[derive(Default)]
struct Waits(u32);

impl Waits {
    /// So many looks, then somebody may have to be cleaned up after.
    const PATIENCE: u32 = 1000;

    fn wait(&mut self, map: &Pagemap, owner: Owner) {
        self.0 += 1;
        if self.0.is_multiple_of(Self::PATIENCE) {
            map.device.ops().stuck(owner);
        }
        crate::sys::yield_now();
    }
}

impl Run {
    fn empty(owner: Owner, pfn: Pfn) -> Self {
        Self { owner, pid: crate::sys::pid(), pfn, len: 0, places: Vec::new() }
    }

    /// The first frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// How many frames.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// One past the last frame.
    pub fn end(&self) -> Pfn {
        self.pfn + self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether this process made it, and is not a forked child.
    pub fn is_ours(&self) -> bool {
        self.pid == crate::sys::pid()
    }

    /// Frames in the records before the last one.
    fn full_before(&self) -> u32 {
        (self.places.len().max(1) as u32 - 1) * MAX_LEN
    }
}

impl<'m> Hold<'m> {
    /// The pagemap.
    pub fn map(&self) -> &'m Pagemap {
        self.map
    }

    /// The first frame.
    pub fn pfn(&self) -> Pfn {
        self.run.pfn
    }

    /// How many frames.
    pub fn len(&self) -> u32 {
        self.run.len
    }

    /// Whether it holds nothing (it never does).
    pub fn is_empty(&self) -> bool {
        self.run.is_empty()
    }

    /// Whether this process made it, and is not a forked child.
    pub(super) fn is_ours(&self) -> bool {
        self.run.is_ours()
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.map.shrink_run(&mut self.run, 0);
    }
}
