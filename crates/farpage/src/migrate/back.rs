//! Back to DRAM: the way of a fault, for many pages at once.

use super::{Outcome, Refusal, WINDOW};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::fault::resolve::{self, Why};
use crate::reclaim::Hands;
use crate::space::bits::{mask, runs};
use crate::space::ops::window;
use crate::space::range::{GRANULE, Range, STRETCH, Stretch, flag};
use crate::space::{Space, World};

/// How often a pending announcement is read before a page is left where it is.
const TRIES: u32 = 100;

impl Space {
    /// Moves `[s, e)`, which lies in `range` and in one window, to DRAM. `room`: how many pages may still come in.
    pub(super) fn migrate_back(
        &self,
        world: &World,
        range: &Range,
        (s, e): (usize, usize),
        room: &mut usize,
        pages: &mut [Outcome],
        hands: &mut Hands,
    ) {
        let mut set = |at: usize, n: usize, outcome: Outcome| {
            pages[(at - s) / PAGE_SIZE..][..n].fill(outcome);
        };
        let stretch = range.stretch(s, e);
        let whole = if e - s == WINDOW { self.put_back_huge(world, &stretch) } else { 0 };
        for found in stretch.iter() {
            let (from, to) = (found.start.max(s), found.end.min(e));
            set(from, (to - from) / PAGE_SIZE, Outcome::There);
            // What is staged is on its way out, and turns round.
            let guard = found.granule.lock();
            let Some(slot) = found.granule.slot() else { continue };
            let staged = self.slots.staged(slot) & window(from, to);
            if staged != 0 && !self.in_flux(from, to) {
                self.put_back(world, found, slot, staged);
            }
            let left = self.slots.staged(slot) & staged;
            drop(guard);
            for (what, outcome) in [(staged & !left, Outcome::Moved), (left, Outcome::Refused(Refusal::Busy))]
            {
                for (first, n) in runs(what) {
                    set(found.start / GRANULE * GRANULE + first * PAGE_SIZE, n, outcome);
                }
            }
        }
        set(s, whole, Outcome::Moved);
        let entry = |at: usize| {
            let found = range.granule(at);
            if found.granule.has(flag::ENTRIES) { self.entries.get(at) } else { Entry::Kernel }
        };
        let away = |at: usize| matches!(entry(at), Entry::Away(..) | Entry::Same(_));
        let mut at = s;
        let mut tries = 0;
        while at < e {
            match entry(at) {
                Entry::Kernel | Entry::Copied(..) => {
                    at += PAGE_SIZE;
                    continue;
                }
                Entry::Lost => {
                    set(at, 1, Outcome::Refused(Refusal::Lost));
                    at += PAGE_SIZE;
                    continue;
                }
                Entry::Away(..) | Entry::Same(_) => {}
            }
            let run = (at..e).step_by(PAGE_SIZE).take_while(|&a| away(a)).count();
            let n = run.min(*room);
            if n == 0 {
                set(at, run.max(1), Outcome::Refused(Refusal::NoMemory));
                at += run.max(1) * PAGE_SIZE;
                continue;
            }
            if self.in_flux(at, at + n * PAGE_SIZE) {
                set(at, n, Outcome::Refused(Refusal::Busy));
                at += n * PAGE_SIZE;
                continue;
            }
            let (done, outcome) = self.bring_in(world, range, at, n, Why::Migrate, hands);
            set(at, done, Outcome::Moved);
            at += done * PAGE_SIZE;
            *room -= done;
            if done != 0 {
                tries = 0;
                continue;
            }
            if outcome == resolve::Outcome::Later && tries < TRIES {
                tries += 1;
                self.hear(world);
                continue;
            }
            // A fault was quicker; or an announcement does not end; or the device does not give it.
            let refusal = match outcome {
                _ if !away(at) => None,
                resolve::Outcome::Later => Some(Refusal::Busy),
                resolve::Outcome::Wake => Some(Refusal::Device),
            };
            set(at, 1, refusal.map_or(Outcome::Moved, Outcome::Refused));
            at += PAGE_SIZE;
        }
    }

    /// Moves a window that is staged as a whole, as it lay, back with one call: if it is a huge page it stays one. Returns how
    /// many pages, from the start, are back.
    fn put_back_huge(&self, world: &World, stretch: &Stretch<'_>) -> usize {
        let _guards = stretch.lock();
        let (start, end) = (stretch[0].start, stretch[stretch.len() - 1].end);
        let Some(first) = stretch[0].granule.slot() else { return 0 };
        let slots = (first..).zip(stretch.iter());
        let as_it_lay = stretch.len() == STRETCH
            && self.slots.addr(first, 0).is_multiple_of(WINDOW)
            && slots.clone().all(|(slot, f)| {
                f.granule.slot() == Some(slot) && self.slots.staged(slot) == mask(0, GRANULE / PAGE_SIZE)
            });
        if !as_it_lay || self.in_flux(start, end) {
            return 0;
        }
        // What stops it is the business of who takes them one by one.
        let (done, _) = world.move_pages(&world.uffd, start, self.slots.addr(first, 0), end - start, false);
        for (slot, found) in slots {
            let back = done.saturating_sub(found.start - start).min(GRANULE) / PAGE_SIZE;
            if back != 0 {
                self.slots.set_staged(slot, self.slots.staged(slot) & !mask(0, back));
                found.granule.set(flag::REQUEUE);
            }
        }
        self.touched(start, start + done);
        done / PAGE_SIZE
    }
}
