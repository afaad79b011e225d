//! Holding frames outside of page entries: what a mapping, a pin or a driver's allocation has.

use super::{AllocError, NotLive, Pagemap};
use crate::frame::ledger::{Extent, HolderKind, MAX_LEN, Place};
use crate::frame::{BATCH, GetError, Owner, Pfn};

/// References to a run of frames, one each, recorded in the pagemap's ledger: should the process be killed, whoever
/// cleans up after it gives them back.
///
/// It belongs to the process that made it. In a forked child its drop does nothing: the child has no references.
#[derive(Debug)]
pub struct Hold<'m> {
    map: &'m Pagemap,
    owner: Owner,
    pid: u32,
    pfn: Pfn,
    /// Frames held from `pfn` on.
    len: u32,
    /// The records, each but the last one of [`MAX_LEN`] frames.
    places: Vec<Place>,
}

/// Why frames could not be held.
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
        if len == 0 {
            return Err(HoldError::NoFrame(0, 0));
        }
        check(kind)?;
        let pfn = self.try_alloc_run(owner, len, align).map_err(|e| match e {
            AllocError::NotLive(e) => e.into(),
            AllocError::Full => HoldError::Full(len),
        })?;
        let _one_at_a_time = self.holding.lock();
        let mut hold = Hold::empty(self, owner, pfn);
        // Until a record names them the frames are in transit: whoever cleans up after us frees them.
        for from in (0..len).step_by(MAX_LEN as usize) {
            let n = (len - from).min(MAX_LEN);
            let extent = Extent { owner, kind, pfn: pfn + from, len: n, moving: false };
            let Some(place) = self.ledger.add(extent) else {
                self.put_run_in_transit(pfn + from, len - from, owner);
                hold.drop_locked();
                return Err(HoldError::TooMany);
            };
            hold.places.push(place);
            hold.len += n;
            (pfn + from..pfn + from + n).for_each(|pfn| self.frames.settle(pfn));
        }
        Ok(hold)
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
    pub unsafe fn after_fork_in_child(&self) {
        // SAFETY: the caller's contract; no guard outlives the calls here.
        unsafe { self.holding.renew(()) }
    }

    /// Cleans up after a dead process in memory that page entries do not name: its transfers, what it held, what it
    /// had half changed. Before its slot is another's. `owner` is the caller.
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
        check(kind)?;
        let end = pfn.checked_add(len).filter(|end| self.frames.covers(pfn, *end));
        let end = end.ok_or(HoldError::NoFrame(pfn, u64::from(pfn) + u64::from(len)))?;
        let _live = self.live(owner)?;
        let _one_at_a_time = self.holding.lock();
        let mut hold = Hold::empty(self, owner, pfn);
        for next in pfn..end {
            if let Err(e) = hold.grow(kind, next) {
                hold.drop_locked();
                return Err(e);
            }
        }
        Ok(hold)
    }
}

impl<'m> Hold<'m> {
    fn empty(map: &'m Pagemap, owner: Owner, pfn: Pfn) -> Self {
        Self { map, owner, pid: std::process::id(), pfn, len: 0, places: Vec::new() }
    }

    /// The pagemap.
    pub fn map(&self) -> &'m Pagemap {
        self.map
    }

    /// The first frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// How many frames.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it holds nothing (it never does).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether this process made it, and is not a forked child.
    pub(super) fn is_ours(&self) -> bool {
        self.pid == std::process::id()
    }

    /// One more frame at the end. One at a time: who waits for another's transfer must not be in one himself.
    fn grow(&mut self, kind: HolderKind, pfn: Pfn) -> Result<(), HoldError> {
        let ledger = &self.map.ledger;
        let begins = self.len.is_multiple_of(MAX_LEN);
        if begins {
            let place = ledger.begin(self.owner, kind, pfn).ok_or(HoldError::TooMany)?;
            self.places.push(place);
        }
        let place = self.places[self.places.len() - 1];
        match ledger.grow(place, &self.map.frames) {
            Ok(()) => self.len += 1,
            Err(e) => {
                if begins {
                    self.places.pop();
                }
                return Err(HoldError::Frame(pfn, e));
            }
        }
        Ok(())
    }

    /// Frames in the records before the last one.
    fn full_before(&self) -> u32 {
        (self.places.len().max(1) as u32 - 1) * MAX_LEN
    }

    /// Gives everything back, from the end; the ledger's lock is held.
    fn drop_locked(&mut self) {
        let (map, owner) = (self.map, self.owner);
        let mut last = [0; BATCH];
        let mut n = 0;
        while let Some(&place) = self.places.last() {
            let before = self.full_before();
            while self.len > before {
                self.len -= 1;
                if map.ledger.shrink(place, &map.frames) {
                    last[n] = self.pfn + self.len;
                    n += 1;
                }
                if n == BATCH {
                    map.free_batch(&mut last, owner);
                    n = 0;
                }
            }
            map.ledger.end(place);
            self.places.pop();
        }
        map.free_batch(&mut last[..n], owner);
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if self.is_ours() && !self.places.is_empty() {
            let _one_at_a_time = self.map.holding.lock();
            self.drop_locked();
        }
    }
}
