//! The first half of the way out: a granule moves from the program into a staging slot.

use crate::PAGE_SIZE;
use crate::domain::Counter;
use crate::space::ops::window;
use crate::space::range::{Found, flag};
use crate::space::slots::mask;
use crate::space::{Space, World};
use crate::sys::uffd::Stop;

use super::Hands;
use super::settle::Settled;

/// What came of trying to evict a granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evicted {
    /// This many pages are staged now.
    Pages(u32),
    /// An event is pending, or there is no empty slot: later.
    Later,
    /// No granule is queued.
    Nothing,
}

impl Space {
    /// Takes the granule that arrived first out of the program.
    pub(crate) fn evict_oldest(&self, world: &World) -> Evicted {
        self.unpark(world);
        // Each granule at most once: some cannot move.
        for _ in 0..=self.queued() {
            let Some(addr) = self.dequeue() else { return Evicted::Nothing };
            let Some(found) = world.ranges.granule(addr) else { continue };
            if !found.granule.has(flag::QUEUED) {
                continue;
            }
            match self.evict(world, &found) {
                Evicted::Pages(0) | Evicted::Nothing => {}
                done => return done,
            }
        }
        Evicted::Nothing
    }

    /// Takes this granule out of the program, but for the pages that the kernel has pinned.
    pub(crate) fn evict(&self, world: &World, found: &Found<'_>) -> Evicted {
        let granule = found.granule;
        if granule.has(flag::GRANTED) && self.revoke(world, found).is_err() {
            return self.not_now(found);
        }
        let Some(slot) = self.slots.take_empty() else { return self.not_now(found) };
        let mut left_behind = false;
        let mut in_flux = false;
        let outcome = 'out: {
            let mut at = found.start;
            let mut moved_any = false;
            let mut owned = 0;
            let _guard = granule.lock();
            granule.clear(flag::QUEUED);
            let mut news = self.faults.no_news();
            if self.in_flux(found.start, found.end) {
                in_flux = true;
                break 'out Evicted::Pages(0);
            }
            if granule.slot().is_some() {
                // On its way out already; what came back meanwhile queues when that is settled.
                granule.set(flag::REQUEUE);
                break 'out Evicted::Pages(0);
            }
            let base = found.start / crate::space::range::GRANULE * crate::space::range::GRANULE;
            while at < found.end {
                let dst = self.slots.addr(slot, (at - base) / PAGE_SIZE);
                let (done, stop) = world.move_pages(&world.slot_uffd, dst, at, found.end - at, true);
                at += done;
                moved_any |= done > 0;
                match stop {
                    None => break,
                    Some(Stop::Busy) if at >= owned => {
                        // Pinned, or shared since a fork: a write fault that changes nothing makes pages ours alone. Only
                        // pages that are there: an absent one would be ours to bring in, and we hold its lock.
                        owned = found.end;
                        // A write fault may need the handler.
                        drop(news.take());
                        let own = |s: usize, e: usize| crate::sys::write_fault(s, e - s);
                        if world.scan.present(at, found.end, own).is_err() {
                            owned = at + PAGE_SIZE;
                        }
                        news = self.faults.no_news();
                        if self.in_flux(found.start, found.end) {
                            left_behind = true;
                            break;
                        }
                    }
                    Some(Stop::Busy) => {
                        self.count(Counter::PinnedSkips, 1);
                        left_behind = true;
                        at += PAGE_SIZE;
                    }
                    // A boundary of mappings, or one that may not be written: this page stays.
                    Some(Stop::Invalid | Stop::Gone | Stop::Exists | Stop::NoMemory | Stop::Other(_)) => {
                        let one = world.move_pages(
                            &world.slot_uffd,
                            self.slots.addr(slot, (at - base) / PAGE_SIZE),
                            at,
                            PAGE_SIZE,
                            true,
                        );
                        left_behind |= one.1.is_some();
                        moved_any |= one.0 > 0;
                        at += PAGE_SIZE;
                    }
                    Some(Stop::Again) => {
                        left_behind = true;
                        break;
                    }
                }
            }
            drop(news);
            let mut staged = 0;
            if moved_any {
                let from = self.slots.addr(slot, 0);
                let to = from + crate::space::range::GRANULE;
                let seen = world.scan.present(from, to, |s, e| {
                    staged |= mask((s - from) / PAGE_SIZE, (e - s) / PAGE_SIZE);
                });
                if seen.is_err() {
                    // Not knowing which pages are there, we must not lose any: all of them back.
                    staged = window(found.start, found.end);
                }
            }
            if staged == 0 {
                break 'out Evicted::Pages(0);
            }
            granule.set(flag::ENTRIES);
            // Before it is in the queue: who takes it from there must find it attached.
            granule.set_slot(Some(slot));
            self.slots.attach(slot, found.start, staged);
            if left_behind {
                granule.set(flag::REQUEUE);
            }
            Evicted::Pages(staged.count_ones())
        };
        match outcome {
            Evicted::Pages(0) => {
                self.slots.give_back(slot);
                if in_flux {
                    self.enqueue(found);
                } else if left_behind {
                    self.park(found);
                }
            }
            Evicted::Pages(n) => self.count(Counter::PagesOut, u64::from(n)),
            _ => {}
        }
        outcome
    }

    /// Evicts a granule and, if `settle`, gets it to a device, whatever the budget says.
    pub(crate) fn push_out(&self, world: &World, found: &Found<'_>, settle: bool, hands: &mut Hands) {
        let outcome = self.evict(world, found);
        if matches!(outcome, Evicted::Later) {
            return;
        }
        let Some(slot) = found.granule.slot().filter(|&s| settle && self.slots.pick(s)) else { return };
        loop {
            match self.settle(world, slot, hands) {
                Settled::Done => break,
                Settled::More => {}
                Settled::Full => {
                    self.slots.unsettled(slot, false);
                    break;
                }
            }
        }
    }

    fn not_now(&self, found: &Found<'_>) -> Evicted {
        found.granule.clear(flag::QUEUED);
        self.enqueue(found);
        Evicted::Later
    }
}
