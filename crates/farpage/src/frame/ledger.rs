//! The ledger of holds: which process holds references to which run of frames outside of its page entries, and what for
//! (a mapping, a pin, a driver's allocation).
//!
//! It is to those references what a page entry is to the others: a process killed at any moment leaves it behind, and
//! with it whoever cleans up knows what to put ([`Ledger::of`]), and whoever waits for a frame knows for whom.
//!
//! A record is one atomic word: owner (12 bits), kind (4), *moving* (1), length in frames (15), first frame (32). A
//! record grows and shrinks at its end, by at most [`BATCH`] frames at a time. While it does, the frames behind its end are
//! *moving*: those of them that carry the owner's transit mark have a reference that is not counted
//! ([`Ledger::publishes`]).
//!
//! Mutations tried by hand, and a test of `tests/loom_live.rs` that catches each:
//!
//! | mutation | caught by |
//! |---|---|
//! | `grow` does not say *moving* | `a_crash_while_a_hold_grows_over_another` |
//! | `shrink` does not say *moving*; `publishes` ignores it | `a_crash_while_holding_twice` |
//! | `shrink` changes the record before it marks the frame | `a_crash_while_holding` and two more |
//! | the high mark is not raised | `a_crash_while_holding` and two more |
use super::platform::{AtomicU32, AtomicU64, Ordering};
use super::{BATCH, FrameTable, GetError, Owner, Pfn};

/// What a reference to a frame is for.
///
/// See the example of [`Hold`](crate::pagemap::Hold).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HolderKind {
    /// Memory of a process through which the CPU reaches the frame.
    Mapping,
    /// A pin: the page must neither move nor go.
    Pin,
    /// An allocation of a driver.
    Driver,
    /// A pin for as long as its owner likes (`FOLL_LONGTERM`).
    LongPin,
    /// A page entry: the page is away, and this is where.
    Entry,
    /// A page entry: the page is in DRAM, and this is its clean copy.
    CleanCopy,
}

impl HolderKind {
    /// Those that are kept in a ledger; their places here are their numbers there.
    const KEPT: [Self; 4] = [Self::Mapping, Self::Pin, Self::Driver, Self::LongPin];

    /// Whether such references are kept in a ledger (the others are in page entries).
    pub fn is_kept(self) -> bool {
        Self::KEPT.contains(&self)
    }
}

impl std::fmt::Display for HolderKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Mapping => "mapping",
            Self::Pin => "pin",
            Self::Driver => "driver",
            Self::LongPin => "long-term pin",
            Self::Entry => "page entry",
            Self::CleanCopy => "clean copy",
        })
    }
}

/// One record of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The process slot that holds the references.
    pub owner: Owner,
    /// What for.
    pub kind: HolderKind,
    /// The first frame.
    pub pfn: Pfn,
    /// How many, at most [`MAX_LEN`].
    pub len: u32,
    /// Frames behind the last one are on their way in or out.
    pub moving: bool,
}

/// The longest extent, in frames (128 MiB); what is longer takes several.
pub const MAX_LEN: u32 = (1 << 15) - 1;

impl Extent {
    /// Whether it holds a reference to the frame.
    pub fn covers(&self, pfn: Pfn) -> bool {
        pfn.wrapping_sub(self.pfn) < self.len
    }

    fn pack(self) -> u64 {
        let kind = HolderKind::KEPT.iter().position(|k| *k == self.kind);
        // A kind that is not kept packs as one that `unpack` refuses; `Ledger::add` does not take it.
        let kind = kind.unwrap_or(15) as u64;
        debug_assert!(self.owner != 0 && self.len <= MAX_LEN);
        u64::from(self.owner) << 52
            | kind << 48
            | u64::from(self.moving) << 47
            | u64::from(self.len) << 32
            | u64::from(self.pfn)
    }

    fn unpack(word: u64) -> Option<Self> {
        Some(Self {
            owner: Some((word >> 52) as Owner).filter(|owner| *owner != 0)?,
            kind: *HolderKind::KEPT.get((word >> 48) as usize & 15)?,
            moving: word >> 47 & 1 != 0,
            len: (word >> 32) as u32 & MAX_LEN,
            pfn: word as u32,
        })
    }
}

/// A record's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(u32);

/// See the module's description. Zeroed memory is an empty ledger.
#[derive(Debug)]
pub struct Ledger {
    records: &'static [AtomicU64],
    /// Records from this one on were never used.
    high: &'static AtomicU32,
}

impl Ledger {
    /// A ledger over shared memory.
    pub fn new(records: &'static [AtomicU64], high: &'static AtomicU32) -> Self {
        Self { records, high }
    }

    /// Enters a record; `None`: the ledger is full, or the kind is not kept in it, or it is too long.
    pub fn add(&self, extent: Extent) -> Option<Place> {
        if extent.len > MAX_LEN || extent.owner == 0 || !extent.kind.is_kept() {
            return None;
        }
        for (i, record) in (0..).zip(self.records) {
            if record.load(Ordering::Relaxed) != 0 {
                continue;
            }
            // Before the record: one that is in use is always below the mark.
            if self.high.load(Ordering::Relaxed) <= i {
                self.high.fetch_max(i + 1, Ordering::AcqRel);
            }
            // Release: who finds the record finds the frames taken. Acquire: what its last user did is over.
            if record.compare_exchange(0, extent.pack(), Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(Place(i));
            }
        }
        None
    }

    /// A new record for `owner`, whose first frames are about to be taken with [`Self::grow`].
    pub fn begin(&self, owner: Owner, kind: HolderKind, pfn: Pfn) -> Option<Place> {
        self.add(Extent { owner, kind, pfn, len: 0, moving: true })
    }

    /// Takes up to `n` (at most [`BATCH`]) of the frames behind the end of the caller's record: one more reference each,
    /// which the record counts from now on; `first`: or the first one ([`FrameTable::take_in_transit`]). Returns how
    /// many it took, at least one.
    ///
    /// # Errors
    /// Why not even one. It waits for nobody, so [`GetError::Transit`] and [`GetError::Frozen`] are to be tried again.
    /// The record is as it was; if it was empty, it is free.
    pub fn grow(&self, place: Place, table: &FrameTable, n: u32, first: bool) -> Result<u32, GetError> {
        let Some(e) = self.get(place) else { return Err(GetError::Free) };
        let end = e.pfn + e.len;
        // Before the counts change: the marks on the frames mean nothing yet.
        self.set(place, Extent { moving: true, ..e });
        let mut taken = 0;
        let mut result = Ok(());
        while taken < n.min(BATCH as u32).min(MAX_LEN - e.len) && result.is_ok() {
            let pfn = end + taken;
            let take =
                if first { table.take_in_transit(pfn, e.owner) } else { table.get_in_transit(pfn, e.owner) };
            taken += u32::from(take.is_ok());
            result = take;
        }
        self.set(place, Extent { len: e.len + taken, moving: false, ..e });
        (end..end + taken).for_each(|pfn| table.settle(pfn));
        if taken > 0 { Ok(taken) } else { result.map(|()| 0) }
    }

    /// Drops the references to up to `n` (at most [`BATCH`]) frames at the end of the caller's record. Those whose last it
    /// was come first in `last`: they are now being freed by the owner, as after a last [`FrameTable::put`]. Returns how
    /// many it dropped, and how many of them were the last. What follows is another call or, at the end, [`Self::end`].
    /// It waits for nobody: (0, 0) if another is in transit on the frame at the end, or none is left.
    #[must_use]
    pub fn shrink(&self, place: Place, table: &FrameTable, n: u32, last: &mut [Pfn; BATCH]) -> (u32, usize) {
        let Some(e) = self.get(place) else { return (0, 0) };
        let end = e.pfn + e.len;
        let most = n.min(BATCH as u32).min(e.len);
        let begun = (1..=most).take_while(|i| table.try_begin_put(end - i, e.owner).is_ok()).count() as u32;
        // With the marks, and before the counts change: from here on the references are not the record's.
        self.set(place, Extent { len: e.len - begun, moving: true, ..e });
        let mut lasts = 0;
        for pfn in end - begun..end {
            if table.put_in_transit(pfn, e.owner) {
                last[lasts] = pfn;
                lasts += 1;
            }
        }
        (begun, lasts)
    }

    /// After [`Self::shrink`], where the caller keeps what is left: nothing moves any more.
    pub fn rest(&self, place: Place) {
        if let Some(e) = self.get(place) {
            self.set(place, Extent { moving: false, ..e });
        }
    }

    /// The record is free.
    pub fn end(&self, place: Place) {
        // Release: who uses the place next comes after.
        self.records[place.0 as usize].store(0, Ordering::Release);
    }

    fn get(&self, place: Place) -> Option<Extent> {
        Extent::unpack(self.records[place.0 as usize].load(Ordering::Relaxed))
    }

    fn set(&self, place: Place, e: Extent) {
        let word = if e.len == 0 && !e.moving { 0 } else { e.pack() };
        // Release: who finds it finds the counts that it speaks of.
        self.records[place.0 as usize].store(word, Ordering::Release);
    }

    /// All records.
    pub fn iter(&self) -> impl Iterator<Item = (Place, Extent)> + '_ {
        let used = self.high.load(Ordering::Acquire) as usize;
        let records = (0..).zip(self.records.iter().take(used));
        records.filter_map(|(i, r)| Some((Place(i), Extent::unpack(r.load(Ordering::Acquire))?)))
    }

    /// The records of one process.
    pub fn of(&self, owner: Owner) -> impl Iterator<Item = (Place, Extent)> + '_ {
        self.iter().filter(move |(_, e)| e.owner == owner)
    }

    /// For a dead `owner`'s transit mark on a frame ([`super::FrameTable::recover`]): whether a record of his counts the
    /// reference that he was moving.
    pub fn publishes(&self, owner: Owner, pfn: Pfn) -> bool {
        let mut covered = false;
        for (_, e) in self.of(owner) {
            if e.moving && pfn.wrapping_sub(e.pfn.wrapping_add(e.len)) < BATCH as u32 {
                return false;
            }
            covered |= e.covers(pfn);
        }
        covered
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn extents_round_trip() {
        for kind in HolderKind::KEPT {
            for (len, moving) in [(1, false), (MAX_LEN, true), (0, true)] {
                let e = Extent { owner: 4095, kind, pfn: u32::MAX - 3, len, moving };
                assert_eq!(Extent::unpack(e.pack()), Some(e));
            }
        }
        assert_eq!(Extent::unpack(0), None);
        assert_eq!(Extent::unpack(u64::MAX), None);
    }

    #[test]
    fn what_is_not_kept_is_refused() {
        let records = Vec::leak(vec![AtomicU64::new(0)]);
        let ledger = Ledger::new(records, Box::leak(Box::new(AtomicU32::new(0))));
        let e = Extent { owner: 1, kind: HolderKind::Entry, pfn: 0, len: 1, moving: false };
        assert_eq!(ledger.add(e), None);
        let e = Extent { kind: HolderKind::Pin, ..e };
        assert_eq!(ledger.add(Extent { len: MAX_LEN + 1, ..e }), None);
        let place = ledger.add(e).unwrap();
        assert_eq!(ledger.add(e), None, "full");
        ledger.end(place);
        assert_eq!(ledger.iter().count(), 0);
        assert!(ledger.add(e).is_some());
    }
}
