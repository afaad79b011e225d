//! Live references: who is using a whole range of frames just now (Linux: `percpu_ref` of a `dev_pagemap`), and
//! where that range is in its life.
//!
//! One word a process slot: a count, and a bit that says "closed". Taking a reference is one atomic addition that gives
//! the old value back, so it comes either before the closing, which then waits for it, or after it, and fails. Each
//! slot has a cache line of its own: processes do not disturb each other, and what a killed one held is known.
//!
//! | from | to | by |
//! |---|---|---|
//! | fresh, gone | opening | [`Live::begin_open`] |
//! | opening | live | [`Live::finish_open`] |
//! | live | closing | [`Live::close`] |
//! | closing | opening | [`Live::begin_resume`] |
//! | closing | removing | [`Live::begin_remove`], for one of those who close |
//! | removing | gone, closing | [`Live::finish_remove`] |
//!
//! Words are opened only while *opening*, by the one who opens; so nobody opens what another has begun to close. Opening
//! and removing carry their owner's number: should he die, [`Live::forget`] takes it back to *closing*.
use std::time::{Duration, Instant};

use super::Owner;
use super::platform::{self, AtomicU32, Ordering};

const CLOSED: u32 = 1 << 31;

/// Words from one slot's to the next one's: a cache line.
pub const STRIDE: usize = 16;

/// Where a range of frames is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Never registered.
    Fresh,
    /// Being registered, or made live again.
    Opening,
    /// References can be had.
    Live,
    /// No new references.
    Closing,
    /// Nobody has a reference, and the memory is going.
    Removing,
    /// It has gone.
    Gone,
}

const PHASES: [Phase; 6] =
    [Phase::Fresh, Phase::Opening, Phase::Live, Phase::Closing, Phase::Removing, Phase::Gone];

fn word(phase: Phase, owner: Owner) -> u32 {
    u32::from(owner) << 8 | phase as u32
}

/// See the module's description. Zeroed memory is fresh.
#[derive(Debug)]
pub struct Live {
    state: &'static AtomicU32,
    words: &'static [AtomicU32],
}

impl Live {
    /// Over a state and the words of the process slots, [`STRIDE`] words each.
    pub fn new(state: &'static AtomicU32, words: &'static [AtomicU32]) -> Self {
        Self { state, words }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        // Acquire pairs with `step`: who sees a phase sees what was done before.
        PHASES.get(self.state.load(Ordering::Acquire) as usize & 0xff).copied().unwrap_or(Phase::Gone)
    }

    /// AcqRel: what was done in one phase is seen in the next.
    fn step(&self, from: u32, to: u32) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn word(&self, owner: Owner) -> &AtomicU32 {
        &self.words[owner as usize * STRIDE]
    }

    fn all(&self) -> impl Iterator<Item = (Owner, &AtomicU32)> {
        (0..).zip(self.words.iter().step_by(STRIDE))
    }

    /// A live reference for `owner`; false if it is not live.
    #[must_use]
    pub fn try_get(&self, owner: Owner) -> bool {
        // Acquire pairs with the Release of `finish_open`: who gets in sees what was registered.
        if self.word(owner).fetch_add(1, Ordering::Acquire) & CLOSED == 0 {
            return true;
        }
        self.put(owner);
        false
    }

    /// Gives it back.
    pub fn put(&self, owner: Owner) {
        // Release pairs with the Acquire of `drain`: what was done under the reference is over.
        let was = self.word(owner).fetch_sub(1, Ordering::Release);
        debug_assert!(was & !CLOSED != 0, "live reference of {owner} given back twice");
        if was == CLOSED | 1 {
            platform::futex_wake(self.word(owner), i32::MAX);
        }
    }

    /// For who registers, in a fresh range or one that has gone. False: it is neither.
    #[must_use]
    pub fn begin_open(&self, owner: Owner) -> bool {
        [Phase::Fresh, Phase::Gone].iter().any(|p| self.step(word(*p, 0), word(Phase::Opening, owner)))
    }

    /// For who gives up closing. False: it is not closing.
    #[must_use]
    pub fn begin_resume(&self, owner: Owner) -> bool {
        self.step(word(Phase::Closing, 0), word(Phase::Opening, owner))
    }

    /// References can be had (again).
    pub fn finish_open(&self, owner: Owner) {
        self.all().for_each(|(_, w)| _ = w.fetch_and(!CLOSED, Ordering::Release));
        let live = self.step(word(Phase::Opening, owner), word(Phase::Live, 0));
        debug_assert!(live, "only {owner} can end this phase");
    }

    /// No new references from now on; again by whoever goes on where another stopped. False: it is neither live nor
    /// closing.
    #[must_use]
    pub fn close(&self) -> bool {
        if !self.step(word(Phase::Live, 0), word(Phase::Closing, 0)) && self.phase() != Phase::Closing {
            return false;
        }
        self.close_words();
        true
    }

    fn close_words(&self) {
        // Relaxed: the bit carries nothing; `drain` has the Acquire.
        self.all().for_each(|(_, w)| _ = w.fetch_or(CLOSED, Ordering::Relaxed));
    }

    /// After [`Self::close`]: waits until no reference is left. `Err`: an owner that still had one at the `deadline`,
    /// and how many.
    pub fn drain(&self, deadline: Instant) -> Result<(), (Owner, u32)> {
        // The dead wake nobody: look again from time to time.
        const AT_MOST: Duration = Duration::from_millis(50);
        for (owner, word) in self.all() {
            loop {
                let w = word.load(Ordering::Acquire);
                if w & !CLOSED == 0 {
                    break;
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err((owner, w & !CLOSED));
                }
                platform::futex_wait(word, w, Some(left.min(AT_MOST)));
            }
        }
        Ok(())
    }

    /// For who closes and sees no frame in use: he is the only one who goes on, nobody resumes, and who `still` sees a
    /// frame in use then (it had been live again meanwhile) steps back. True: the memory can go;
    /// [`Self::finish_remove`] is next.
    #[must_use]
    pub fn begin_remove(&self, owner: Owner, still: impl FnOnce() -> bool) -> bool {
        if !self.step(word(Phase::Closing, 0), word(Phase::Removing, owner)) {
            return false;
        }
        // Who was delayed between two looks may have begun with an older closing: close for certain, and look again.
        self.close_words();
        if self.drain(Instant::now()).is_ok() && !still() {
            return true;
        }
        self.finish_remove(owner, false);
        false
    }

    /// The memory has gone, or could not.
    pub fn finish_remove(&self, owner: Owner, gone: bool) {
        let phase = if gone { Phase::Gone } else { Phase::Closing };
        let ended = self.step(word(Phase::Removing, owner), word(phase, 0));
        debug_assert!(ended, "only {owner} can end this phase");
    }

    /// `owner` is dead: what it held is given back, what it had begun can be begun again.
    pub fn forget(&self, owner: Owner) {
        self.word(owner).fetch_and(CLOSED, Ordering::Release);
        for phase in [Phase::Opening, Phase::Removing] {
            // What he opened of the words is closed again by the next who closes.
            self.step(word(phase, owner), word(Phase::Closing, 0));
        }
    }

    /// References that `owner` has.
    pub fn count(&self, owner: Owner) -> u32 {
        self.word(owner).load(Ordering::Acquire) & !CLOSED
    }
}
