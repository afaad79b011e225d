//! Cuts: ranges of frames that are about to go (a file's pages that are to be truncated or punched), seen by every process.
//!
//! A cut is a record in shared memory. Whoever takes references looks for cuts afterwards, and gives them back if one is
//! in the way; whoever cuts looks at the counts after he has entered his record. Both have a full fence in between, so
//! one of the two sees the other. Nothing is written for a page, so that a cut costs the same for a page and for a
//! terabyte, and a killed cutter leaves one word behind.
//!
//! | phase | what others do |
//! |---|---|
//! | [`Phase::Pins`] | take no new references; those who have pinned give the pins up in their own time |
//! | [`Phase::Mappings`] | … and give up their mappings at once: no pin stands in the way |
//!
//! Mutations tried by hand, and a test of `tests/loom_cuts.rs` that catches each:
//!
//! | mutation | caught by |
//! |---|---|
//! | either of the fences in `begin` and `over` is missing | `who_has_a_page_has_it_until_he_gives_it_back` and one more |
//! | `end` is Relaxed; the counts are looked at Relaxed | the same |
//! | the fence before the bounds is missing; bounds are not checked to be of the state; a record's number stays; the phase comes before the bounds; … Relaxed | `a_phase_is_seen_with_the_pages_of_its_cut` |
//! | `forget` leaves the record | `what_a_dead_cutter_left_is_in_nobodys_way` |

use std::ops::Range;

use super::platform::{AtomicU64, Ordering, fence};
use super::{Owner, Pfn};

/// Cuts that can be under way at once.
pub const CUTS: usize = 64;

/// How far a cut is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for pins.
    Pins = 2,
    /// Waiting for mappings.
    Mappings = 3,
}

/// The record is being filled in.
const FORMING: u64 = 1;

/// A cut that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Which record.
    pub place: usize,
    /// Who cuts.
    pub owner: Owner,
    /// The pages.
    pub pages: Range<Pfn>,
    /// How far it is.
    pub phase: Phase,
    /// Tells one use of the record from the next.
    pub number: u64,
}

/// The records, in shared memory; zeros are none. A state is phase (8 bits), owner (16), and a number (40) that tells one
/// use of the record from the next.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    states: &'static [AtomicU64],
    bounds: &'static [AtomicU64],
}

impl Cut {
    /// Tells this cut from all others of the table.
    pub fn id(&self) -> u64 {
        self.number * CUTS as u64 + self.place as u64
    }
}

fn state(number: u64, owner: Owner, phase: u64) -> u64 {
    number << 24 | u64::from(owner) << 8 | phase
}

fn phase(state: u64) -> u64 {
    state & 0xff
}

fn owner(state: u64) -> Owner {
    (state >> 8) as Owner
}

impl Cuts {
    /// Over at most [`CUTS`] words of states and as many of bounds.
    pub fn new(states: &'static [AtomicU64], bounds: &'static [AtomicU64]) -> Self {
        Self { states: &states[..states.len().min(CUTS)], bounds: &bounds[..bounds.len().min(CUTS)] }
    }

    /// Enters a cut. From now on, once this has returned, nobody keeps a new reference to a page of it. `None`: so many
    /// are under way. The caller has made sure, under a lock, that it overlaps with none.
    pub fn begin(&self, owner: Owner, pages: &Range<Pfn>) -> Option<Cut> {
        let (place, number) = (0..self.states.len()).find_map(|place| {
            let old = self.states[place].load(Ordering::Relaxed);
            let number = (old >> 24) + 1;
            let new = state(number, owner, FORMING);
            let free = phase(old) == 0
                // Acquire pairs with the Release of `end`: the last user has gone.
                && self.states[place].compare_exchange(old, new, Ordering::Acquire, Ordering::Relaxed).is_ok();
            free.then_some((place, number))
        })?;
        // With the fence in `get`: who sees these bounds sees that the record is another's by now.
        fence(Ordering::Release);
        self.bounds[place].store(u64::from(pages.start) << 32 | u64::from(pages.end), Ordering::Relaxed);
        let cut = Cut { place, owner, pages: pages.clone(), phase: Phase::Pins, number };
        self.set(&cut, Phase::Pins);
        // With the fence in `over`: he sees the cut, or we see his reference.
        fence(Ordering::SeqCst);
        Some(cut)
    }

    fn set(&self, cut: &Cut, phase: Phase) {
        // Release: who sees the phase sees the bounds.
        self.states[cut.place].store(state(cut.number, cut.owner, phase as u64), Ordering::Release);
    }

    /// Goes on to the next phase.
    pub fn advance(&self, cut: &mut Cut) {
        cut.phase = Phase::Mappings;
        self.set(cut, Phase::Mappings);
    }

    /// The cut is over.
    pub fn end(&self, cut: &Cut) {
        // Release: what was done to the file comes before.
        self.states[cut.place].store(state(cut.number, 0, 0), Ordering::Release);
    }

    /// All cuts under way.
    pub fn iter(&self) -> impl Iterator<Item = Cut> + '_ {
        (0..self.states.len()).filter_map(|place| self.get(place))
    }

    fn get(&self, place: usize) -> Option<Cut> {
        loop {
            // Acquire pairs with the Release of `set`.
            let before = self.states[place].load(Ordering::Acquire);
            let phase = match phase(before) {
                2 => Phase::Pins,
                3 => Phase::Mappings,
                // One that is forming will see the references that there are.
                _ => return None,
            };
            let bounds = self.bounds[place].load(Ordering::Relaxed);
            // The bounds are those of this use of the record if it is still the same one.
            fence(Ordering::Acquire);
            let after = self.states[place].load(Ordering::Relaxed);
            if before >> 8 == after >> 8 {
                let pages = (bounds >> 32) as Pfn..bounds as Pfn;
                return Some(Cut { place, owner: owner(before), pages, phase, number: before >> 24 });
            }
        }
    }

    /// Whether anything is under way at all: cheap, for those who look often.
    pub fn any(&self) -> bool {
        self.states.iter().any(|s| phase(s.load(Ordering::Relaxed)) != 0)
    }

    /// For whoever has just taken references to these pages: a cut that is in their way, so that they must go again.
    pub fn over(&self, pages: &Range<Pfn>) -> Option<Cut> {
        // With the fence in `begin`.
        fence(Ordering::SeqCst);
        self.overlapping(pages)
    }

    /// A cut of some of these pages.
    pub fn overlapping(&self, pages: &Range<Pfn>) -> Option<Cut> {
        self.iter().find(|cut| cut.pages.start < pages.end && pages.start < cut.pages.end)
    }

    /// Ends what a dead process was cutting; true if there was something.
    pub fn forget(&self, dead: Owner) -> bool {
        let mut any = false;
        for s in self.states {
            let old = s.load(Ordering::Acquire);
            if phase(old) != 0 && owner(old) == dead {
                s.store(state(old >> 24, 0, 0), Ordering::Release);
                any = true;
            }
        }
        any
    }
}
