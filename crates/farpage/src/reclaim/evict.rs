//! The first half of the way out: granules move from the program into staging slots.

use crate::PAGE_SIZE;
use crate::domain::Counter;
use crate::space::bits::{mask, runs};
use crate::space::ops::window;
use crate::space::range::{Found, GRANULE, GRANULE_PAGES, STRETCH, Stretch, flag};
use crate::space::slots::Run;
use crate::space::{Space, World};
use crate::sys::MutexGuard;
use crate::sys::uffd::Stop;

use super::Hands;
use super::settle::Settled;

/// What came of trying to evict.
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
    /// The most granules that come in or leave together: not too many of a small budget.
    pub(crate) fn most_together(&self) -> usize {
        (self.domain.budget() as usize / 64 / GRANULE_PAGES).clamp(1, STRETCH)
    }

    /// Takes the granule that arrived first out of the program, and with it those that follow it in the queue as well as
    /// in memory: what came in as a stream leaves as one.
    pub(crate) fn evict_oldest(&self, world: &World) -> Evicted {
        self.unpark(world);
        // Each granule at most once: some cannot move.
        for _ in 0..=self.queued() {
            let Some(addr) = self.dequeue(world) else { return Evicted::Nothing };
            let Some(found) = world.ranges.granule(addr) else { continue };
            if !found.granule.has(flag::QUEUED) {
                continue;
            }
            let most = self.slots.empty_run(self.most_together()).max(1);
            let (mut n, mut end) = (1, found.end);
            // Not beyond a page table: the kernel moves the pages of each by itself.
            while n < most && end < found.range.end && !end.is_multiple_of(STRETCH * GRANULE) {
                let next = found.range.granule(end);
                if !next.granule.has(flag::QUEUED) || !self.dequeue_if(world, end) {
                    break;
                }
                (n, end) = (n + 1, next.end);
            }
            match self.evict(world, &found.range.stretch(found.start, end)) {
                Evicted::Pages(0) | Evicted::Nothing => {}
                done => return done,
            }
        }
        Evicted::Nothing
    }

    /// Takes these granules out of the program, but for the pages that the kernel has pinned.
    pub(crate) fn evict(&self, world: &World, stretch: &Stretch<'_>) -> Evicted {
        let granted = |f: &Found<'_>| f.granule.has(flag::GRANTED);
        let mut ready = stretch.len();
        for (i, found) in stretch.iter().enumerate() {
            if granted(found) && self.revoke(world, found).is_err() {
                ready = i;
                break;
            }
        }
        let slots = if ready > 0 { self.slots.take_empty(ready) } else { None };
        let (slot, ready) = slots.unwrap_or((0, 0));
        for found in &stretch[ready..] {
            found.granule.clear(flag::QUEUED);
            self.enqueue(found);
        }
        if ready == 0 {
            return Evicted::Later;
        }
        let founds = &stretch[..ready];
        let (mut in_flux, mut left, mut total) = (0u64, 0u64, 0);
        let mut empty = mask(0, ready);
        {
            let _guards = stretch.lock();
            let _moving = self.begin_move();
            let mut wanted = [0u64; STRETCH];
            for (i, found) in founds.iter().enumerate() {
                found.granule.clear(flag::QUEUED);
                if self.in_flux(found.start, found.end) || self.is_held(found.start, found.end) {
                    in_flux |= mask(i, 1);
                } else if found.granule.slot().is_some() {
                    // On its way out already; what came back meanwhile queues when that is settled.
                    found.granule.set(flag::REQUEUE);
                } else {
                    let pinned = found.granule.pinned();
                    wanted[i] = window(found.start, found.end) & !pinned;
                    if pinned != 0 {
                        left |= mask(i, 1);
                    }
                }
            }
            let (staged, stayed) = self.take_out(world, founds, slot, &wanted, &mut |_, _| {});
            left |= stayed;
            for (i, (found, &staged)) in founds.iter().zip(&staged).enumerate() {
                if staged == 0 {
                    continue;
                }
                empty &= !mask(i, 1);
                total += staged.count_ones();
                found.granule.set(flag::ENTRIES);
                // Before it is in the queue: who takes it from there must find it attached.
                let slot = slot + i as u32;
                found.granule.set_slot(Some(slot));
                self.slots.attach(slot, found.start, staged);
                if left & mask(i, 1) != 0 {
                    found.granule.set(flag::REQUEUE);
                }
            }
        }
        for (i, found) in founds.iter().enumerate().filter(|(i, _)| empty & mask(*i, 1) != 0) {
            self.slots.give_back(slot + i as u32);
            if in_flux & mask(i, 1) != 0 {
                self.enqueue(found);
            } else if left & mask(i, 1) != 0 {
                self.park(found);
            }
        }
        self.count(Counter::PagesOut, u64::from(total));
        Evicted::Pages(total)
    }

    /// Moves the `wanted` pages of these granules, as far as they can be moved, into the empty slots from `slot` on. Under the
    /// granules' locks, after [`Space::begin_move`]. Returns what is in the slots now, and the set of granules of which something
    /// was left behind; `stays` is told which pages, and why.
    pub(crate) fn take_out(
        &self,
        world: &World,
        founds: &[Found<'_>],
        slot: u32,
        wanted: &[u64; STRETCH],
        stays: &mut dyn FnMut(usize, Stop),
    ) -> ([u64; STRETCH], u64) {
        let mut news = self.faults.no_news();
        let base = founds[0].start / GRANULE * GRANULE;
        let mut left = 0u64;
        let mut next = None::<(usize, usize)>;
        for (i, &wanted) in wanted[..founds.len()].iter().enumerate() {
            for (first, n) in runs(wanted) {
                let at = base + i * GRANULE + first * PAGE_SIZE;
                match &mut next {
                    Some((_, end)) if *end == at => *end += n * PAGE_SIZE,
                    _ => {
                        if let Some(span) = next.replace((at, at + n * PAGE_SIZE)) {
                            left |= self.move_out(world, founds, slot, span, &mut news, stays);
                        }
                    }
                }
            }
        }
        if let Some(span) = next {
            left |= self.move_out(world, founds, slot, span, &mut news, stays);
        }
        drop(news);
        let mut staged = [0u64; STRETCH];
        for (i, n) in runs(wanted.iter().enumerate().fold(0, |m, (i, &w)| m | u64::from(w != 0) << i)) {
            self.find_staged(
                world,
                &founds[i..i + n],
                slot + i as u32,
                &wanted[i..i + n],
                &mut staged[i..i + n],
            );
        }
        (staged, left)
    }

    /// The part of [`Space::take_out`] for one run of pages, which may reach over several granules.
    fn move_out<'a>(
        &'a self,
        world: &World,
        founds: &[Found<'_>],
        slot: u32,
        (start, end): (usize, usize),
        news: &mut Option<MutexGuard<'a, ()>>,
        stays: &mut dyn FnMut(usize, Stop),
    ) -> u64 {
        let base = founds[0].start / GRANULE * GRANULE;
        let place = |at: usize| self.slots.addr(slot, (at - base) / PAGE_SIZE);
        let granule = |at: usize| mask((at - base) / GRANULE, 1);
        let from = |at: usize| mask((at - base) / GRANULE, (end - 1) / GRANULE - at / GRANULE + 1);
        let granule_end = |at: usize| (base + GRANULE * ((at - base) / GRANULE + 1)).min(end);
        if self.in_flux(start, end) {
            stays(start, Stop::Again);
            return from(start);
        }
        let mut left = 0;
        let mut owned = 0;
        let mut at = start;
        let mut one_by_one = false;
        while at < end {
            let to = if one_by_one { granule_end(at) } else { end };
            let (done, stop) = world.move_pages(&world.slot_uffd, place(at), at, to - at, true);
            at += done;
            match stop {
                None => {}
                Some(Stop::Busy) if at >= owned => {
                    // Pinned, or shared since a fork: a write fault that changes nothing makes pages ours alone. Only
                    // pages that are there: an absent one would be ours to bring in, and we hold its lock.
                    owned = granule_end(at);
                    // A write fault may need the handler.
                    drop(news.take());
                    let own = |s: usize, e: usize| crate::sys::write_fault(s, e - s);
                    if world.scan.present(at, owned, own).is_err() {
                        owned = at + PAGE_SIZE;
                    }
                    *news = self.faults.no_news();
                    if self.in_flux(at, end) {
                        stays(at, Stop::Again);
                        return left | from(at);
                    }
                }
                Some(Stop::Busy) => {
                    self.count(Counter::PinnedSkips, 1);
                    left |= granule(at);
                    stays(at, Stop::Busy);
                    at += PAGE_SIZE;
                }
                Some(Stop::Invalid | Stop::Gone) if to > granule_end(at) => one_by_one = true,
                // A boundary of mappings, or one that may not be written: this page stays.
                Some(Stop::Invalid | Stop::Gone | Stop::Exists | Stop::NoMemory | Stop::Other(_)) => {
                    let one = world.move_pages(&world.slot_uffd, place(at), at, PAGE_SIZE, true);
                    if let Some(why) = one.1 {
                        left |= granule(at);
                        stays(at, why);
                    }
                    at += PAGE_SIZE;
                }
                Some(Stop::Again) => {
                    stays(at, Stop::Again);
                    return left | from(at);
                }
            }
        }
        left
    }

    /// Which pages of these granules are in the slots from `slot` on.
    fn find_staged(
        &self,
        world: &World,
        founds: &[Found<'_>],
        slot: u32,
        wanted: &[u64],
        staged: &mut [u64],
    ) {
        let from = self.slots.addr(slot, 0);
        let seen = world.scan.present(from, from + founds.len() * GRANULE, |s, e| {
            let run = Run { slot, first: (s - from) / PAGE_SIZE, len: (e - s) / PAGE_SIZE };
            for (at, pages) in run.parts(0, run.len) {
                staged[(at - slot) as usize] |= pages;
            }
        });
        if seen.is_err() {
            // Not knowing which pages are there, we must not lose any: all of them back.
            staged.copy_from_slice(wanted);
        }
    }

    /// Evicts a granule and, if `settle`, gets it to a device, whatever the budget says.
    pub(crate) fn push_out(&self, world: &World, found: &Found<'_>, settle: bool, hands: &mut Hands) {
        let stretch = found.range.stretch(found.start, found.end);
        if matches!(self.evict(world, &stretch), Evicted::Later) {
            // No slot: those that hold nothing but frames in stock are worth less than what is asked for.
            let given = self.slots.give_up();
            self.domain.uncharge(self.me(), given);
            if matches!(self.evict(world, &stretch), Evicted::Later) {
                return;
            }
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
}
