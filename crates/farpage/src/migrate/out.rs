//! To a device: collect, copy, finalize.

use super::{Outcome, Refusal};
use crate::device::{DeviceError, LoadOp, StoreOp, Sum};
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::reclaim::Hands;
use crate::reclaim::settle::{Settled, Settling};
use crate::space::bits::{mask, runs};
use crate::space::ops::window;
use crate::space::puts::Puts;
use crate::space::range::{Found, GRANULE, GRANULE_PAGES, Range, STRETCH, flag};
use crate::space::{Space, World};
use crate::sys::uffd::Stop;
use crate::{PAGE_SIZE, Page};

/// How long somebody who has a granule's slot in hand is waited for.
const PATIENCE_MS: u64 = 50;

static ZEROS: Page = Page([0; PAGE_SIZE]);

/// A granule on its way: sets of its pages.
struct Leaving<'a> {
    found: Found<'a>,
    /// Asked for, and neither moved nor refused yet.
    rest: u64,
    slot: Option<u32>,
    staged: u64,
}

impl Space {
    /// Moves `[s, e)`, which lies in `range` and in one window, to device `dev`.
    pub(super) fn migrate_out(
        &self,
        world: &World,
        range: &Range,
        (s, e): (usize, usize),
        dev: u8,
        pages: &mut [Outcome],
        hands: &mut Hands,
    ) {
        let stretch = range.stretch(s, e);
        let base = stretch.base();
        let mut set = |g: usize, which: u64, outcome: Outcome| {
            for i in runs(which).flat_map(|(first, n)| first..first + n) {
                pages[(base + g * GRANULE + i * PAGE_SIZE - s) / PAGE_SIZE] = outcome;
            }
        };
        let mut leaving: Vec<Leaving<'_>> = Vec::with_capacity(STRETCH);
        for (g, &found) in stretch.iter().enumerate() {
            let rest = window(found.start.max(s), found.end.min(e));
            let ready = !self.in_flux(found.start, found.end)
                && self.claim(world, &found)
                && self.clear_slot(world, &found);
            if !ready {
                set(g, rest, Outcome::Refused(Refusal::Busy));
            }
            leaving.push(Leaving { found, rest: if ready { rest } else { 0 }, slot: None, staged: 0 });
        }
        let stays = self.collect(world, range, &mut leaving);
        for (g, l) in leaving.iter_mut().enumerate() {
            let (moved, refused) = self.copy_staged(world, l, dev, hands);
            set(g, moved, Outcome::Moved);
            set(g, refused.0, Outcome::Refused(Refusal::NoMemory));
            set(g, refused.1, Outcome::Refused(Refusal::Device));
            set(g, l.staged & !moved & !refused.0 & !refused.1, Outcome::Refused(Refusal::Busy));
            l.rest &= !l.staged;
        }
        let mut protections = None;
        for (g, l) in leaving.iter().enumerate().filter(|(_, l)| l.rest != 0) {
            self.convert(world, l, dev, hands, &mut |which, outcome| set(g, which, outcome));
            // What is still in DRAM says why.
            let pinned = l.found.granule.pinned();
            for i in runs(self.present_in(world, &l.found) & l.rest).flat_map(|(first, n)| first..first + n) {
                let at = base + g * GRANULE + i * PAGE_SIZE;
                let why = stays.iter().find(|(stayed, _)| *stayed == at).map(|(_, why)| *why);
                let refusal = match why {
                    _ if pinned & mask(i, 1) != 0 => Refusal::Pinned,
                    None if self.holds_any(at, at + PAGE_SIZE) => Refusal::Pinned,
                    Some(Stop::Invalid | Stop::Busy) => {
                        let mappings = protections.get_or_insert_with(crate::sys::Mappings::open);
                        let writable = mappings.as_ref().ok().and_then(|m| m.at(at)).map(|m| m.write);
                        match (writable, why) {
                            (Some(false), _) => Refusal::ReadOnly,
                            (_, Some(Stop::Busy)) => Refusal::Pinned,
                            _ => Refusal::Locked,
                        }
                    }
                    Some(Stop::NoMemory) => Refusal::NoMemory,
                    _ => Refusal::Busy,
                };
                set(g, mask(i, 1), Outcome::Refused(refusal));
            }
        }
    }

    /// From here on the granule is registered, and what is absent of it is absent by its page entries: nobody but who holds its
    /// lock puts anything there.
    fn claim(&self, world: &World, found: &Found<'_>) -> bool {
        for _ in 0..100 {
            if found.granule.has(flag::GRANTED) && self.revoke(world, found).is_err() {
                return false;
            }
            let _grants = self.grants.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !found.granule.has(flag::GRANTED) {
                found.granule.clear(flag::VIRGIN);
                found.granule.set(flag::ENTRIES);
                return true;
            }
        }
        false
    }

    /// What of the granule is staged goes back, and its slot is given up; if somebody settles it, that is waited for.
    /// False: not in time.
    pub(super) fn clear_slot(&self, world: &World, found: &Found<'_>) -> bool {
        let until = crate::sys::now_ms() + PATIENCE_MS;
        loop {
            {
                let _guard = found.granule.lock();
                let Some(slot) = found.granule.slot() else { return true };
                // Taken out of the queue it is ours; else whoever has it sees under the lock that nothing is staged.
                let ours = self.slots.pick(slot);
                self.put_back(world, found, slot, u64::MAX);
                if ours && self.slots.staged(slot) == 0 {
                    found.granule.set_slot(None);
                    self.slots.detach(slot);
                    found.granule.clear(flag::REQUEUE);
                    self.enqueue(found);
                    return true;
                }
                if ours {
                    self.slots.unsettled(slot, false);
                }
            }
            if crate::sys::now_ms() > until {
                return false;
            }
            crate::sys::yield_now();
        }
    }

    /// Moves these staged pages of a granule back to where they belong; under its lock. Those that cannot go back now stay staged.
    pub(super) fn put_back(&self, world: &World, found: &Found<'_>, slot: u32, which: u64) {
        let base = found.start / GRANULE * GRANULE;
        let staged = self.slots.staged(slot);
        let mut back = 0u64;
        for (first, n) in runs(staged & which) {
            let mut i = first;
            while i < first + n {
                let (dst, src) = (base + i * PAGE_SIZE, self.slots.addr(slot, i));
                let (done, stop) =
                    world.move_pages(&world.uffd, dst, src, (first + n - i) * PAGE_SIZE, false);
                back |= mask(i, done / PAGE_SIZE);
                i += done / PAGE_SIZE;
                match stop {
                    None => {}
                    Some(Stop::Again) => break,
                    // MOVE does not take this one (its mapping has become read-only or locked): COPY does.
                    Some(_) => {
                        if world.uffd.copy(base + i * PAGE_SIZE, self.slots.addr(slot, i), PAGE_SIZE).0
                            == PAGE_SIZE
                        {
                            self.forget_frames(slot, mask(i, 1));
                            back |= mask(i, 1);
                        }
                        i += 1;
                    }
                }
            }
        }
        self.slots.set_staged(slot, staged & !back);
        if back != 0 {
            found.granule.set(flag::REQUEUE);
            self.touched(found.start, found.end);
        }
    }

    /// Step 1: takes what is in DRAM, and can leave it, out of the program. Returns why the rest stayed.
    fn collect(&self, world: &World, range: &Range, leaving: &mut [Leaving<'_>]) -> Vec<(usize, Stop)> {
        let mut stays = Vec::new();
        let mut first = 0;
        while first < leaving.len() {
            if leaving[first].rest == 0 {
                first += 1;
                continue;
            }
            let want = leaving[first..].iter().take_while(|l| l.rest != 0).count();
            let Some((slot, n)) = self.empty_slots(world, want) else {
                stays.extend(leaving[first..].iter().map(|l| (l.found.start, Stop::Again)));
                break;
            };
            let these = &mut leaving[first..first + n];
            let stretch = range.stretch(these[0].found.start, these[n - 1].found.end);
            let mut unused = mask(0, n);
            {
                let _guards = stretch.lock();
                let _moving = self.begin_move();
                let mut wanted = [0u64; STRETCH];
                for (l, wanted) in these.iter().zip(&mut wanted) {
                    let busy = l.found.granule.slot().is_some() || self.in_flux(l.found.start, l.found.end);
                    let kept = l.found.granule.pinned() | self.held_in(&l.found);
                    *wanted = if busy { 0 } else { l.rest & !kept };
                }
                let (staged, _) =
                    self.take_out(world, &stretch, slot, &wanted, &mut |at, why| stays.push((at, why)));
                for (i, l) in these.iter_mut().enumerate().filter(|(i, _)| staged[*i] != 0) {
                    let slot = slot + i as u32;
                    unused &= !mask(i, 1);
                    l.found.granule.set_slot(Some(slot));
                    self.slots.attach_taken(slot, l.found.start, staged[i]);
                    (l.slot, l.staged) = (Some(slot), staged[i]);
                    self.count(Counter::PagesOut, u64::from(staged[i].count_ones()));
                }
            }
            for i in runs(unused).flat_map(|(first, n)| first..first + n) {
                self.slots.give_back(slot + i as u32);
            }
            first += n;
        }
        stays
    }

    /// Empty slots side by side: at least one, unless all hold what cannot settle.
    fn empty_slots(&self, world: &World, want: usize) -> Option<(u32, usize)> {
        if let Some(found) = self.slots.take_empty_huge(want) {
            return Some(found);
        }
        // Frames in stock are worth less than a migration that goes on.
        let given = self.slots.give_up();
        self.domain.uncharge(self.me(), given);
        if let Some(found) = self.slots.take_empty(want) {
            return Some(found);
        }
        let mut hands = Hands::new();
        let slot = self.slots.oldest()?;
        let settled = self.settle(world, slot, &mut hands);
        if settled != Settled::Done {
            self.slots.unsettled(slot, settled == Settled::More);
        }
        let given = self.slots.give_up();
        self.domain.uncharge(self.me(), given);
        self.slots.take_empty(want)
    }

    /// Steps 2 and 3 for what is staged: each page is on the device, or back. Returns the set that moved, and those that
    /// found no room or met an error.
    fn copy_staged(&self, world: &World, l: &Leaving<'_>, dev: u8, hands: &mut Hands) -> (u64, (u64, u64)) {
        let Some(slot) = l.slot else { return (0, (0, 0)) };
        let mut job = Settling { on: Some(dev), ..Settling::default() };
        let done = loop {
            match self.settle_on(world, slot, hands, &mut job) {
                Settled::Done => break true,
                Settled::More => {}
                Settled::Full => break false,
            }
        };
        if !done {
            let _guard = l.found.granule.lock();
            self.put_back(world, &l.found, slot, u64::MAX);
            if l.found.granule.slot() == Some(slot) && self.slots.staged(slot) == 0 {
                l.found.granule.set_slot(None);
                self.slots.detach(slot);
                l.found.granule.clear(flag::REQUEUE);
                self.enqueue(&l.found);
            } else {
                // An announcement is pending: they go back, or out, in their turn.
                self.slots.unsettled(slot, false);
            }
        }
        (job.moved, (job.refused & !job.failed, job.failed))
    }

    /// What is not in DRAM: holes become zeros on the device, pages on other devices are copied over.
    fn convert(
        &self,
        world: &World,
        l: &Leaving<'_>,
        dev: u8,
        hands: &mut Hands,
        set: &mut dyn FnMut(u64, Outcome),
    ) {
        let base = l.found.start / GRANULE * GRANULE;
        let map = self.domain.pagemap(dev);
        let mut puts = Puts::new(&self.domain, self.me());
        let _guard = l.found.granule.lock();
        if self.in_flux(l.found.start, l.found.end) || l.found.granule.slot().is_some() {
            return set(l.rest, Outcome::Refused(Refusal::Busy));
        }
        let present = self.present_in(world, &l.found);
        // Where each page's bytes are: in a buffer, or zeros.
        let mut stores: Vec<(usize, Option<usize>)> = Vec::with_capacity(GRANULE_PAGES);
        let mut next = 0;
        for i in runs(l.rest & !present).flat_map(|(first, n)| first..first + n) {
            let at = base + i * PAGE_SIZE;
            let one = mask(i, 1);
            match self.entries.get(at) {
                Entry::Away(on, _) if on == dev => set(one, Outcome::There),
                Entry::Lost => set(one, Outcome::Refused(Refusal::Lost)),
                // It should be in DRAM and is not: dropped behind our back just now.
                Entry::Copied(..) => set(one, Outcome::Refused(Refusal::Busy)),
                Entry::Kernel | Entry::Same(0) => stores.push((i, None)),
                Entry::Same(value) => {
                    hands.pages[next].fill(value);
                    stores.push((i, Some(next)));
                    next += 1;
                }
                Entry::Away(from, pfn) => {
                    let op = LoadOp { pfn, page: &mut hands.pages[next], result: Err(DeviceError::Corrupt) };
                    let (_, bad, result) = self.domain.pagemap(from).load(&mut [op]);
                    self.count(Counter::LoadErrors, bad);
                    match result {
                        Ok(()) => {
                            stores.push((i, Some(next)));
                            next += 1;
                        }
                        Err(_) => set(one, Outcome::Refused(Refusal::Device)),
                    }
                }
            }
        }
        let mut ops: Vec<StoreOp<'_>> = Vec::with_capacity(stores.len());
        let in_memory = map.device.is_memory();
        // Where there is no frame for one page, there is none for those that follow.
        for (_, buffer) in &stores {
            let Some(pfn) = map.alloc(self.me()) else { break };
            let page = buffer.map_or(&ZEROS, |b| &hands.pages[b]);
            let sum = if in_memory { Sum::default() } else { Sum::of(page) };
            ops.push(StoreOp { pfn, page, sum, result: Err(DeviceError::Full) });
        }
        for (i, _) in &stores[ops.len()..] {
            set(mask(*i, 1), Outcome::Refused(Refusal::NoMemory));
        }
        map.device.store(&mut ops, self.me());
        let mut undone: Vec<Pfn> = Vec::new();
        for (op, (i, _)) in ops.iter().zip(&stores) {
            let at = base + i * PAGE_SIZE;
            let outcome = match &op.result {
                Ok(()) => {
                    puts.begin(self.entries.get(at));
                    self.entries.set(at, Entry::Away(dev, op.pfn));
                    map.frames.settle(op.pfn);
                    Outcome::Moved
                }
                Err(e) => {
                    undone.push(op.pfn);
                    if *e == DeviceError::Full {
                        Outcome::Refused(Refusal::NoMemory)
                    } else {
                        self.store_failed(map.device.name(), e);
                        Outcome::Refused(Refusal::Device)
                    }
                }
            };
            set(mask(*i, 1), outcome);
        }
        map.put_in_transit(&undone, self.me());
    }

    /// The pages of a granule that are held for a call; after [`Space::begin_move`].
    fn held_in(&self, found: &Found<'_>) -> u64 {
        if !self.holds_any(found.start, found.end) {
            return 0;
        }
        let pages = (found.start..found.end).step_by(PAGE_SIZE);
        let held = pages.filter(|&at| self.is_held(at, at + PAGE_SIZE));
        held.fold(0, |all, at| all | window(at, at + PAGE_SIZE))
    }

    /// Where the window that holds `at` ends.
    pub(crate) fn next_window(&self, at: usize) -> usize {
        at / super::WINDOW * super::WINDOW + super::WINDOW
    }

    /// Takes what is in DRAM of `[start, end)`, which lies in one window, out of the program, and leaves it staged.
    pub(crate) fn stage_window(&self, world: &World, start: usize, end: usize) {
        for range in world.ranges.overlapping(start, end) {
            let (s, e) = (range.start.max(start), range.end.min(end));
            let mut leaving: Vec<Leaving<'_>> = Vec::with_capacity(STRETCH);
            for &found in range.stretch(s, e).iter() {
                let ready = !self.in_flux(found.start, found.end)
                    && self.claim(world, &found)
                    && self.clear_slot(world, &found);
                let rest = if ready { window(found.start.max(s), found.end.min(e)) } else { 0 };
                leaving.push(Leaving { found, rest, slot: None, staged: 0 });
            }
            self.collect(world, range, &mut leaving);
            leaving.iter().filter_map(|l| l.slot).for_each(|slot| self.slots.unsettled(slot, false));
        }
    }

    /// Whether a page is out of the program.
    pub(crate) fn is_out(&self, found: &Found<'_>, at: usize) -> bool {
        let _guard = found.granule.lock();
        let staged = found.granule.slot().map_or(0, |slot| self.slots.staged(slot));
        let entry = if found.granule.has(flag::ENTRIES) { self.entries.get(at) } else { Entry::Kernel };
        staged & window(at, at + PAGE_SIZE) != 0 || entry.is_away()
    }

    /// The pages of a granule that are in DRAM, in the program; all of them if that cannot be found out.
    pub(super) fn present_in(&self, world: &World, found: &Found<'_>) -> u64 {
        let mut present = 0;
        let seen = world.scan.present(found.start, found.end, |s, e| present |= window(s, e));
        if seen.is_ok() { present } else { window(found.start, found.end) }
    }
}
