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
//! | closed | opening | [`Live::begin_resume`] |
//! | opening | live | [`Live::finish_open`] |
//! | live, closed | removing | [`Live::begin_remove`] |
//! | removing | gone, closed | [`Live::finish_remove`] |
//!
//! The words are opened and closed only while *opening* and *removing*, which one owner at a time is at; so nobody
//! opens what another closes, nor the other way round. Should he die, [`Live::forget`] takes it back to *closed*.
//!
//! Mutations tried by hand, and a test of `tests/loom_live.rs` that catches each:
//!
//! | mutation | caught by |
//! |---|---|
//! | a reference is taken Relaxed | `who_gets_in_sees_what_was_registered` |
//! | … is given back Relaxed; `drain` loads Relaxed | `who_has_looked_it_up_has_the_memory` and four more |
//! | a refused reference is not taken back | `a_crash_while_resuming` |
//! | the last one wakes nobody | `unregistering_waits_for_gets_and_puts` |
//! | removing does not close the words | `unregistering_waits_for_gets_and_puts` |
//! | two remove at once | `of_two_one_removes` and six more |
//! | resuming while another removes | `who_resumes_does_not_open_what_another_closes` |
//! | closing the words of what another has opened (the first form of this module) | the same |
//! | `forget` leaves the references | `a_crash_while_looking_up` |
//! | `forget` leaves *removing*; leaves *opening* | `a_crash_while_unregistering`; `a_crash_while_resuming` |
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
    /// No new references, and nobody is at it: [`Phase::Removing`] has been given up.
    Closed,
    /// No new references: somebody waits until nobody has one, and then takes the memory away.
    Removing,
    /// It has gone.
    Gone,
}

const PHASES: [Phase; 6] =
    [Phase::Fresh, Phase::Opening, Phase::Live, Phase::Closed, Phase::Removing, Phase::Gone];

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

    /// For who gives up taking the memory away. False: it is not closed.
    #[must_use]
    pub fn begin_resume(&self, owner: Owner) -> bool {
        self.step(word(Phase::Closed, 0), word(Phase::Opening, owner))
    }

    /// References can be had (again).
    pub fn finish_open(&self, owner: Owner) {
        self.all().for_each(|(_, w)| _ = w.fetch_and(!CLOSED, Ordering::Release));
        let live = self.step(word(Phase::Opening, owner), word(Phase::Live, 0));
        debug_assert!(live, "only {owner} can end this phase");
    }

    /// No new references from now on. False: it is not live, or another is at it.
    #[must_use]
    pub fn begin_remove(&self, owner: Owner) -> bool {
        let begun =
            [Phase::Live, Phase::Closed].iter().any(|p| self.step(word(*p, 0), word(Phase::Removing, owner)));
        if begun {
            // Relaxed: the bit carries nothing; `drain` has the Acquire.
            self.all().for_each(|(_, w)| _ = w.fetch_or(CLOSED, Ordering::Relaxed));
        }
        begun
    }

    /// After [`Self::begin_remove`]: waits until no reference is left. `Err`: an owner that still had one at the
    /// `deadline`, and how many.
    pub fn drain(&self, deadline: Instant) -> Result<(), (Owner, u32)> {
        // Who dies wakes nobody: look again from time to time.
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

    /// The memory has gone; or it has not, and is closed.
    pub fn finish_remove(&self, owner: Owner, gone: bool) {
        let phase = if gone { Phase::Gone } else { Phase::Closed };
        let ended = self.step(word(Phase::Removing, owner), word(phase, 0));
        debug_assert!(ended, "only {owner} can end this phase");
    }

    /// `owner` is dead: what it held is given back, what it had begun can be begun again.
    pub fn forget(&self, owner: Owner) {
        // Release: what it did under its references is over.
        self.word(owner).fetch_and(CLOSED, Ordering::Release);
        platform::futex_wake(self.word(owner), i32::MAX);
        for phase in [Phase::Opening, Phase::Removing] {
            // Words that he left open are closed by the next who removes.
            self.step(word(phase, owner), word(Phase::Closed, 0));
        }
    }

    /// References that `owner` has.
    pub fn count(&self, owner: Owner) -> u32 {
        self.word(owner).load(Ordering::Acquire) & !CLOSED
    }
}
