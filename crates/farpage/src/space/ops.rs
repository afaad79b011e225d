//! What changes a mapping: each operation runs with the world held exclusively, does the kernel's part first and,
//! only if that succeeded, ours. Nothing is given up for a call that fails.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::bits::{mask, runs};
use super::puts::Puts;
use super::range::{Found, GRANULE, Range, flag};
use super::{Space, World};
use crate::PAGE_SIZE;
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::sys::Write;
use crate::sys::uffd::Stop;

/// What a mapping gets at once before faults are answered.
const EARLY: usize = 4 << 20;

impl Space {
    /// Runs `f` with the world held: no fault is resolved and no page moves meanwhile. Signals wait until it is over,
    /// so that no handler meets a held lock.
    #[doc(hidden)]
    pub fn change<R>(&self, f: impl FnOnce(&mut World) -> R) -> R {
        let signals = crate::sys::BlockedSignals::new();
        let result = {
            let mut world = self.enter_world();
            let result = f(&mut world);
            // What our own calls made the kernel announce has been recognised as ours before it is forgotten.
            self.faults.caught_up();
            self.faults.expect_nothing();
            result
        };
        self.faults.nudge();
        drop(signals);
        result
    }

    /// The world, for changing it, with all that went past us seen to.
    pub(crate) fn enter_world(&self) -> Write<'_, World> {
        let mut tries = 0;
        loop {
            let mut world = self.world.write();
            // A thread may have its stack in managed memory, and no fault is resolved while it holds the world. (What
            // lies beyond the stack may be out of bounds: then it is not needed.)
            if let Some((start, end)) = world.away_from_stack().filter(|_| tries < 8) {
                tries += 1;
                drop(world);
                self.faults.nudge();
                crate::sys::read_fault(start, end - start);
                continue;
            }
            self.faults.caught_up();
            self.apply_changes(&mut world);
            return world;
        }
    }

    /// Whether any part of `[start, end)` is managed.
    pub fn manages(&self, start: usize, end: usize) -> bool {
        let _signals = crate::sys::BlockedSignals::new();
        self.world.read().ranges.overlapping(start, end).next().is_some()
    }

    /// Manages a fresh private anonymous mapping. As much of it as the budget allows without a thought is left
    /// to the kernel, the rest is registered. On an error it stays an ordinary mapping.
    #[doc(hidden)]
    pub fn add(&self, world: &mut World, start: usize, end: usize) -> Result<(), Errno> {
        self.forget_predecessor(world, start, end);
        let pages = ((end - start) / PAGE_SIZE) as u64;
        let budget = self.domain.budget();
        let free = budget.saturating_sub(self.domain.charged());
        let want = if pages + budget / 8 < free { pages } else { (free / 8).min(pages) };
        let mut granted_end = if want == pages {
            end
        } else {
            ((start + want as usize * PAGE_SIZE) / GRANULE * GRANULE).clamp(start, end)
        };
        if self.pressure.load(Ordering::Relaxed)
            || !self.domain.try_charge(self.me(), ((granted_end - start) / PAGE_SIZE) as u64, budget)
        {
            granted_end = start;
        }
        if !self.running.load(Ordering::Acquire) && granted_end == start {
            // Before the constructors have run nobody answers faults yet.
            granted_end = ((start + EARLY) / GRANULE * GRANULE).min(end);
            self.domain.force_charge(self.me(), ((granted_end - start) / PAGE_SIZE) as u64);
        }
        if granted_end < end
            && let Err(e) = world.uffd.register(granted_end, end - granted_end)
        {
            self.domain.uncharge(self.me(), ((granted_end - start) / PAGE_SIZE) as u64);
            return Err(e);
        }
        let range = Range::new(start, end, flag::VIRGIN);
        for found in range.iter().take_while(|f| f.start < granted_end) {
            found.granule.clear(flag::VIRGIN);
            found.granule.set(flag::GRANTED);
            self.enqueue(&found);
        }
        world.ranges.insert(range);
        Ok(())
    }

    /// The kernel gave out addresses that we believe to be in use: somebody unmapped or moved what was there behind our
    /// back, and the announcement, which comes afterwards, is still to be read. (There is none for memory that was
    /// the kernel's alone.)
    fn forget_predecessor(&self, world: &mut World, start: usize, end: usize) {
        let deadline = crate::sys::now_ms() + 100;
        while world.ranges.overlapping(start, end).next().is_some() && crate::sys::now_ms() < deadline {
            crate::sys::yield_now();
            self.faults.caught_up();
            self.apply_changes(world);
        }
        self.forget(world, start, end);
    }

    /// After `[start, end)` was unmapped or replaced: our part of it, but for the charge ([`Space::charge_of`]).
    #[doc(hidden)]
    pub fn forget(&self, world: &mut World, start: usize, end: usize) {
        if world.ranges.overlapping(start, end).next().is_none() {
            return;
        }
        self.unstage_edges(world, start, end);
        for range in world.ranges.take(start, end) {
            for found in range.iter() {
                self.drop_pages(&found, found.start, found.end);
            }
        }
    }

    /// Pages in DRAM that `[start, end)` is charged for. Call it before the kernel drops them.
    #[doc(hidden)]
    pub fn charge_of(&self, world: &World, start: usize, end: usize) -> u64 {
        let mut pages = 0;
        for (f, s, e) in world.ranges.granules(start, end) {
            if f.granule.has(flag::GRANTED) {
                pages += ((e - s) / PAGE_SIZE) as u64;
            } else if !f.granule.has(flag::VIRGIN) {
                pages += self.in_dram(world, &f, s, e);
            }
        }
        // What is mapped in place is there, but nobody is charged for it.
        let in_place = |&(s, e): &(usize, usize)| world.resident(s, e);
        pages.saturating_sub(self.in_place_of(world, start, end).iter().map(in_place).sum())
    }

    /// Pages of `[start, end)`, which lies in one granule, that are in DRAM. To the kernel the mark of a poisoned page is one,
    /// too, but nobody is charged for it.
    fn in_dram(&self, world: &World, found: &Found<'_>, start: usize, end: usize) -> u64 {
        let there = world.resident(start, end);
        if there == 0 || !self.faults.has_poisoned() || !found.granule.has(flag::ENTRIES) {
            return there;
        }
        let lost = (start..end).step_by(PAGE_SIZE).filter(|&at| self.entries.get(at) == Entry::Lost).count();
        there.saturating_sub(lost as u64)
    }

    /// `munmap` (or any call that replaces what is mapped at `[start, end)`), with the kernel's part in `call`.
    #[doc(hidden)]
    pub fn unmap<R>(
        &self,
        world: &mut World,
        start: usize,
        end: usize,
        call: impl FnOnce() -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        let charge = self.charge_of(world, start, end);
        self.leave(world, start, end);
        let result = call();
        if result.is_err() {
            self.come_back(world, start, end)?;
            self.recharge(charge, self.charge_of(world, start, end));
            return result;
        }
        self.forget(world, start, end);
        self.domain.uncharge(self.me(), charge);
        result
    }

    /// Takes the registered parts of `[start, end)` out of userfaultfd for a call that drops their pages anyway. Such a call
    /// would otherwise wait until a handler has read an event: two interrupts, where this is two short calls. (Who
    /// touches a page while another thread drops it finds it dropped a moment early.)
    pub(super) fn leave(&self, world: &World, start: usize, end: usize) {
        self.faults.expect(start, end);
        self.each_registered(world, start, end, |s, e| {
            // Should it fail the event comes, and is known to be ours.
            let _event_comes = world.uffd.unregister(s, e - s);
            Ok(())
        })
        .unwrap_or(());
    }

    /// Puts them back.
    fn enter(&self, world: &World, start: usize, end: usize) -> Result<(), Errno> {
        self.each_registered(world, start, end, |s, e| world.uffd.register(s, e - s))
    }

    /// Puts them back after a call that failed. Who touched a page that is away found nothing there, and the kernel gave him
    /// an empty page: that one goes, the page is where it was.
    pub(super) fn come_back(&self, world: &World, start: usize, end: usize) -> Result<(), Errno> {
        let with_entries = world.ranges.granules(start, end).filter(|(f, ..)| f.granule.has(flag::ENTRIES));
        for (f, s, e) in with_entries {
            let staged = f.granule.slot().map_or(0, |slot| self.slots.staged(slot));
            for at in (s..e).step_by(PAGE_SIZE) {
                if staged & window(at, at + PAGE_SIZE) != 0 || self.entries.get(at).is_away() {
                    crate::sys::drop_page(at);
                }
            }
        }
        self.enter(world, start, end)
    }

    fn each_registered(
        &self,
        world: &World,
        start: usize,
        end: usize,
        mut f: impl FnMut(usize, usize) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        // One call for each run of them that lies in one range.
        let mut run: Option<(usize, usize)> = None;
        for (g, s, e) in world.ranges.granules(start, end) {
            let granted = g.granule.has(flag::GRANTED);
            if let Some((s, e)) = run.take_if(|_| granted || s == g.range.start) {
                f(s, e)?;
            }
            if !granted {
                run = Some((run.map_or(s, |r| r.0), e));
            }
        }
        run.map_or(Ok(()), |(s, e)| f(s, e))
    }

    /// `madvise` that drops pages, with the kernel's part in `call`.
    #[doc(hidden)]
    pub fn discard<R>(
        &self,
        world: &mut World,
        start: usize,
        end: usize,
        call: impl FnOnce() -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        // A grant is charged whole, whatever of it is there.
        let charged_by_page = |w: &World| {
            let all = w.ranges.granules(start, end);
            all.filter(|(f, ..)| !f.granule.has(flag::GRANTED | flag::VIRGIN))
                .map(|(f, s, e)| self.in_dram(w, &f, s, e))
                .sum::<u64>()
        };
        let before = charged_by_page(world);
        self.leave(world, start, end);
        let result = call();
        match &result {
            Ok(_) => {
                self.enter(world, start, end)?;
                world.ranges.granules(start, end).for_each(|(f, s, e)| self.drop_pages(&f, s, e));
            }
            Err(_) => self.come_back(world, start, end)?,
        }
        self.recharge(before, charged_by_page(world));
        result
    }

    /// What was charged with `before` pages has `after` now. More than before, if another thread touched pages while they were
    /// not registered: the kernel gave it those without asking, and they may be above the budget.
    fn recharge(&self, before: u64, after: u64) {
        self.domain.uncharge(self.me(), before.saturating_sub(after));
        let given = after.saturating_sub(before);
        if given > 0 {
            self.domain.force_charge(self.me(), given);
            let over = self.domain.charged().saturating_sub(self.domain.budget());
            self.count(Counter::OverBudget, over.min(given));
            self.wake_worker();
        }
    }

    /// Gives up the copies, staged pages and entries of `[start, end)`, which lies in one granule.
    pub(crate) fn drop_pages(&self, found: &Found<'_>, start: usize, end: usize) {
        let granule = found.granule;
        self.touched(start, end);
        if let Some(slot) = granule.slot() {
            let gone = self.slots.staged(slot) & window(start, end);
            self.slots.set_staged(slot, self.slots.staged(slot) & !gone);
            // The frames stay ours, to be used again.
            self.retire(slot, gone);
            if self.slots.staged(slot) == 0 {
                granule.set_slot(None);
                if granule.clear(flag::REQUEUE) {
                    self.enqueue(found);
                }
            }
        }
        if granule.has(flag::ENTRIES) {
            self.put_entries(start, end);
        }
    }

    /// Pages of a slot that are staged no longer: their frames are used again, or, where the kernel might still hold one by a
    /// plain reference, go to the kernel, whose own count keeps them for the holder (DESIGN: "In"). The mark is looked at
    /// after the page has left the program: a call that takes a reference is marked before it takes it.
    pub(crate) fn retire(&self, slot: u32, frames: u64) {
        if frames == 0 {
            return;
        }
        self.full.store(false, Ordering::Relaxed);
        if self.domain.may_recycle(self.me()) {
            return self.slots.add_free(slot, frames);
        }
        self.forget_frames(slot, frames);
        self.domain.uncharge(self.me(), u64::from(frames.count_ones()));
    }

    /// Entries of `[start, end)` become `Kernel`; their references are put.
    pub(crate) fn put_entries(&self, start: usize, end: usize) {
        let mut puts = Puts::new(&self.domain, self.me());
        for addr in (start..end).step_by(PAGE_SIZE) {
            let e = self.entries.get(addr);
            if e != Entry::Kernel {
                puts.begin(e);
                self.entries.set(addr, Entry::Kernel);
            }
        }
    }

    /// Brings staged pages of the granules at the edges of `[start, end)` back, so that a cut goes through nothing.
    fn unstage_edges(&self, world: &World, start: usize, end: usize) {
        for at in [start, end] {
            if let Some(f) = world.ranges.granule(at).filter(|f| f.start < at && !at.is_multiple_of(GRANULE))
            {
                self.unstage(world, &f);
            }
        }
    }

    /// Moves all staged pages of a granule back to where they belong. Those that cannot go back now (their mapping
    /// is gone) become free frames. With the world held exclusively.
    pub(crate) fn unstage(&self, world: &World, found: &Found<'_>) {
        let Some(slot) = found.granule.slot() else { return };
        self.touched(found.start, found.end);
        let base = found.start / GRANULE * GRANULE;
        let staged = self.slots.staged(slot);
        for (first, len) in runs(staged) {
            let mut at = 0;
            while at < len {
                let dst = base + (first + at) * PAGE_SIZE;
                let src = self.slots.addr(slot, first + at);
                let (done, stop) = world.move_pages(&world.uffd, dst, src, (len - at) * PAGE_SIZE, false);
                at += done / PAGE_SIZE;
                match stop {
                    None => break,
                    Some(Stop::Again) => self.hear(world),
                    // This one cannot move (say, the mapping became read-only): copy it, the frame is free then.
                    Some(_) => {
                        self.copy_back(world, slot, first + at, base + (first + at) * PAGE_SIZE);
                        at += 1;
                    }
                }
            }
        }
        self.slots.set_staged(slot, 0);
        found.granule.set_slot(None);
        self.enqueue(found);
    }

    /// Copies a staged page to `dst`, unless something is there or no mapping is; its frame is free then.
    pub(super) fn copy_back(&self, world: &World, slot: u32, page: usize, dst: usize) {
        let src = self.slots.addr(slot, page);
        loop {
            match world.uffd.copy(dst, src, PAGE_SIZE).1 {
                None => break self.forget_frames(slot, mask(page, 1)),
                Some(Stop::Again) => self.hear(world),
                Some(_) => break self.retire(slot, mask(page, 1)),
            }
        }
    }

    /// Frames of a slot whose pages have been copied elsewhere go to the kernel: the charge is the copies' now.
    pub(crate) fn forget_frames(&self, slot: u32, frames: u64) {
        for (first, len) in runs(frames) {
            crate::sys::drop_pages(self.slots.addr(slot, first), len * PAGE_SIZE);
        }
    }

    /// Takes back the grant of the run of granted granules around `found`: it is registered from now on, and
    /// charged for the pages that are there.
    pub(crate) fn revoke(&self, world: &World, found: &Found<'_>) -> Result<(), Errno> {
        // Bounded, so that one call stays short; both ways from the granule.
        const REACH: usize = 16 << 20;
        let _grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if !found.granule.has(flag::GRANTED) {
            return Ok(());
        }
        let range = found.range;
        let granted = |at: usize| range.granule(at).granule.has(flag::GRANTED);
        let (mut start, mut end) = (found.start, found.end);
        while start > range.start && found.start - start < REACH && granted(start - 1) {
            start = range.granule(start - 1).start;
        }
        while end < range.end && end - found.end < REACH && granted(end) {
            end = range.granule(end).end;
        }
        world.uffd.register(start, end - start)?;
        // Counted while faults there still find the grant and wait: nothing comes in between.
        let absent = ((end - start) / PAGE_SIZE) as u64 - world.resident(start, end);
        let mut at = start;
        while at < end {
            let f = range.granule(at);
            f.granule.clear(flag::GRANTED);
            at = f.end;
        }
        self.domain.uncharge(self.me(), absent);
        Ok(())
    }

    /// Maps and registers the page that handlers are nudged with.
    pub(crate) fn ring_bell_with(&self, world: &World) -> Result<(), crate::domain::DomainError> {
        use crate::domain::sys_err;
        let mut bell = self.faults.bell();
        if bell == 0 {
            bell = crate::sys::private_page().map_err(sys_err("map a page"))?;
        }
        world.register(bell, bell + PAGE_SIZE)?;
        self.faults.set_bell(bell);
        Ok(())
    }

    /// `MADV_DONTFORK` and `MADV_WIPEONFORK` (or their opposites): whether a child gets this range from us.
    #[doc(hidden)]
    pub fn set_fork(&self, world: &mut World, start: usize, end: usize, not_for_children: bool) {
        self.unstage_edges(world, start, end);
        world.ranges.cut(start, end).for_each(|r| r.not_for_children = not_for_children);
    }
}

/// The pages `[start, end)` of one granule as a set.
pub(crate) fn window(start: usize, end: usize) -> u64 {
    mask(start % GRANULE / PAGE_SIZE, (end - start) / PAGE_SIZE)
}
