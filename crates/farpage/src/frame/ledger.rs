//! The ledger of holds: which process holds references to which run of frames outside of its page entries, and what for
//! (a mapping, a pin, a driver's allocation).
//!
//! It is to those references what a page entry is to the others: a process killed at any moment leaves it behind, and
//! with it whoever cleans up knows what to put ([`Ledger::of`]), and whoever waits for a frame knows for whom.
//!
//! A record is one atomic word: owner (12 bits), kind (4), *moving* (1), length in frames (15), first frame (32). A
//! record grows and shrinks by one frame at a time, at its end. While it does, the frame behind its end is *moving*: if
//! that carries the owner's transit mark, the reference is not counted ([`Ledger::publishes`]).
use super::platform::{AtomicU32, AtomicU64, Ordering};
use super::{Owner, Pfn};

/// What a reference to a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HolderKind {
    /// Memory of a process through which the CPU reaches the frame.
    Mapping,
    /// A pin: the page must neither move nor go.
    Pin,
    /// An allocation of a driver.
    Driver,
    /// A page entry: the page is away, and this is where.
    Entry,
    /// A page entry: the page is in DRAM, and this is its clean copy.
    CleanCopy,
}

impl HolderKind {
    /// Those that are kept in a ledger; their places here are their numbers there.
    const KEPT: [Self; 3] = [Self::Mapping, Self::Pin, Self::Driver];
}

impl std::fmt::Display for HolderKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Mapping => "mapping",
            Self::Pin => "pin",
            Self::Driver => "driver",
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
    /// The frame behind the last one is on its way in or out.
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
        if extent.len > MAX_LEN || extent.owner == 0 || !HolderKind::KEPT.contains(&extent.kind) {
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

    /// Changes a record, which is the caller's: its length and whether a frame is moving. Nothing of either: the record
    /// is free.
    pub fn set(&self, place: Place, len: u32, moving: bool) {
        let record = &self.records[place.0 as usize];
        let Some(old) = Extent::unpack(record.load(Ordering::Relaxed)) else { return };
        let new = if len == 0 && !moving { 0 } else { Extent { len, moving, ..old }.pack() };
        record.store(new, Ordering::Release);
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
            if e.moving && e.pfn.wrapping_add(e.len) == pfn {
                return false;
            }
            covered |= e.covers(pfn);
        }
        covered
    }
}

#[cfg(test)]
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
        ledger.set(place, 0, false);
        assert_eq!(ledger.iter().count(), 0);
        assert!(ledger.add(e).is_some());
    }
}
