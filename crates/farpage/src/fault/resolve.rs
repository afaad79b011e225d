//! One fault: from its address to a page in place.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use super::stream;
use crate::PAGE_SIZE;
use crate::device::{DeviceError, LoadOp};
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::reclaim::{Frames, Hands};
use crate::space::bits::{mask, runs};
use crate::space::ops::window;
use crate::space::puts::Puts;
use crate::space::range::{Found, GRANULE, GRANULE_PAGES, Range, Stretch, flag};
use crate::space::{Space, World};
use crate::sys::uffd::Stop;
/// What became of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The page is there (or poisoned, or its mapping is gone): wake who waits.
    Wake,
    /// An event is pending: put aside.
    Later,
}

/// Pages that one device loads with one call.
struct Loads<'a> {
    device: u8,
    /// The first one's number among those that are filled; the others follow.
    first: usize,
    ops: ArrayVec<LoadOp<'a>, GRANULE_PAGES>,
}

/// Why pages are brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// A thread waits for the first of them.
    Fault,
    /// Somebody will probably want them.
    Ahead,
    /// They are migrated: a page that cannot be loaded stays where it is, and no copy of the others is kept.
    Migrate,
}

/// The most that is left to the kernel at once. Not less: each grant takes 4 ms, which a program that allocates waits for.
const MAX_GRANT: usize = 64 << 20;

impl Space {
    /// Resolves a fault, or puts it aside (`None`). Wakes the thread last, with no lock held: it may preempt us there.
    /// Returns how many nanoseconds that took.
    pub(crate) fn fault(&self, addr: usize, tid: u32, hands: &mut Hands) -> Option<u64> {
        let fd = {
            // Not before the changes that came before it.
            let free = if self.faults.has_changes() { None } else { self.world.try_read() };
            let Some(world) = free else {
                self.faults.defer(addr, tid);
                return None;
            };
            let outcome = if self.faults.is_manager(tid) {
                // One of us, who holds locks and wanted to make a page his own that was dropped under him.
                if world.ranges.granule(addr).is_some_and(|f| f.granule.has(flag::ENTRIES))
                    && self.entries.get(addr).is_away()
                {
                    crate::sys::fatal("a manager thread met an absent page of the program");
                }
                hands.pages[0].0.fill(0);
                let src = hands.pages.as_ptr() as usize;
                self.domain.force_charge(self.me(), 1);
                let _there_or_gone = world.uffd.copy(addr, src, PAGE_SIZE);
                Outcome::Wake
            } else {
                self.resolve(&world, addr, hands)
            };
            if outcome == Outcome::Later {
                self.faults.defer(addr, tid);
                return None;
            }
            world.uffd.raw()
        };
        let before = crate::sys::now_ns();
        crate::sys::uffd::wake(fd, addr, PAGE_SIZE);
        Some(crate::sys::now_ns() - before)
    }

    pub(super) fn resolve(&self, world: &World, addr: usize, hands: &mut Hands) -> Outcome {
        self.count(Counter::Faults, 1);
        let Some(found) = world.ranges.granule(addr) else {
            // Not ours (any more): a registered page that no range knows holds zeros.
            return self.zero_unknown(world, addr, hands);
        };
        let granule = found.granule;
        if granule.has(flag::GRANTED) {
            return Outcome::Wake; // registered no longer: the thread looks again and the kernel serves it
        }
        if granule.has(flag::VIRGIN) && self.grant(world, &found) {
            return Outcome::Wake;
        }
        let back = granule.slot().and_then(|slot| self.take_back(world, &found, slot, addr));
        if let Some(outcome) = back {
            return outcome;
        }
        if granule.clear(flag::VIRGIN) {
            self.enqueue(&found);
        }
        let entry = if granule.has(flag::ENTRIES) { self.entries.get(addr) } else { Entry::Kernel };
        let stream = || self.faults.streams().fault(addr, self.most_together() * GRANULE_PAGES);
        let window = if self.one_by_one.load(Ordering::Relaxed) { 1 } else { stream() };
        if entry == Entry::Lost {
            self.count(Counter::FaultsDevice, 1);
            return self.poison(world, addr);
        }
        if entry == Entry::Kernel {
            self.count(Counter::FaultsZero, 1);
            // What nobody has written yet is not brought in far ahead of use.
            let want = window.min((found.end - addr) / PAGE_SIZE);
            return self.bring_in(world, found.range, addr, want, Why::Fault, hands).1;
        }
        self.count(Counter::FaultsDevice, 1);
        if self.fault_huge(world, &found, addr, hands) {
            return Outcome::Wake;
        }
        let want = stream::rounded(addr, window).min((found.range.end - addr) / PAGE_SIZE);
        let (done, outcome) = self.bring_in(world, found.range, addr, want, Why::Fault, hands);
        // (If no CPU is free for the worker, it would bring them in at the expense of who reads now.)
        if window >= GRANULE_PAGES && !self.faults.follow.is_everywhere() {
            let next = addr + done * PAGE_SIZE;
            self.ask_ahead(next, (next + window * PAGE_SIZE).min(found.range.end));
        }
        outcome
    }

    /// The worker brings in what follows a stream.
    fn ask_ahead(&self, start: usize, end: usize) {
        let mut ahead = self.ahead.lock();
        if start < end && ahead.len() < 64 {
            ahead.push_back((start, end));
            drop(ahead);
            self.wake_worker();
        }
    }

    /// Memory never touched: while there is plenty, the kernel gets a piece of the range to fill by itself.
    fn grant(&self, world: &World, found: &Found<'_>) -> bool {
        if self.pressure.load(Ordering::Relaxed) {
            return false;
        }
        let _grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if !found.granule.has(flag::VIRGIN) {
            return found.granule.has(flag::GRANTED);
        }
        let free = self.domain.budget().saturating_sub(self.domain.charged()) as usize * PAGE_SIZE;
        let want = (free / 4).min(MAX_GRANT);
        if want < GRANULE {
            return false;
        }
        // From here upwards, as most programs go, and back to the last granule that was granted.
        let range = found.range;
        let mut end = found.end;
        while end < range.end && end - found.start < want && range.granule(end).granule.has(flag::VIRGIN) {
            end = range.granule(end).end;
        }
        let pages = ((end - found.start) / PAGE_SIZE) as u64;
        if !self.domain.try_charge(self.me(), pages, self.domain.budget()) {
            return false;
        }
        let mut at = found.start;
        while at < end {
            let f = range.granule(at);
            f.granule.clear(flag::VIRGIN);
            f.granule.set(flag::GRANTED);
            self.enqueue(&f);
            at = f.end;
        }
        if world.uffd.unregister(found.start, end - found.start).is_err() {
            let mut at = found.start;
            while at < end {
                let f = range.granule(at);
                f.granule.clear(flag::GRANTED);
                at = f.end;
            }
            self.domain.uncharge(self.me(), pages);
            return false;
        }
        self.count(Counter::Granted, pages);
        true
    }

    /// A fault on a granule that is being staged: if the page is there, it (and the run of pages around it) goes back:
    /// it was hot. `None`: the page is not staged.
    fn take_back(&self, world: &World, found: &Found<'_>, slot: u32, addr: usize) -> Option<Outcome> {
        let _guard = found.granule.lock();
        if found.granule.slot() != Some(slot) {
            return None;
        }
        let base = found.start / GRANULE * GRANULE;
        let i = (addr - base) / PAGE_SIZE;
        let staged = self.slots.staged(slot);
        let run = runs(staged).find(|&(f, l)| f <= i && i < f + l)?;
        let (first, len) = if self.one_by_one.load(Ordering::Relaxed) { (i, 1) } else { run };
        let src = self.slots.addr(slot, first);
        let dst = base + first * PAGE_SIZE;
        let (done, stop) = world.move_pages(&world.uffd, dst, src, len * PAGE_SIZE, false);
        let done = done / PAGE_SIZE;
        let mut back = mask(first, done);
        let mut outcome = Outcome::Wake;
        if first + done <= i {
            match stop {
                Some(Stop::Again) => outcome = Outcome::Later,
                Some(Stop::Gone) => {}
                _ => {
                    // MOVE does not take this mapping (read-only, locked, or more than one), or the page is shared since a
                    // fork.
                    let src = self.slots.addr(slot, i);
                    if world.uffd.copy(addr, src, PAGE_SIZE).0 == PAGE_SIZE {
                        self.forget_frames(slot, mask(i, 1));
                        back |= mask(i, 1);
                    }
                }
            }
        }
        self.slots.set_staged(slot, staged & !back);
        if back != 0 {
            found.granule.set(flag::REQUEUE);
            self.count(Counter::Refaults, 1);
            self.touched(dst, dst + len * PAGE_SIZE);
        }
        Some(outcome)
    }

    /// Brings up to `want` pages from `addr` (in one range) into DRAM. Returns how many came, and what to tell the thread
    /// that waits for the first.
    pub(crate) fn bring_in(
        &self,
        world: &World,
        range: &Range,
        addr: usize,
        want: usize,
        why: Why,
        hands: &mut Hands,
    ) -> (usize, Outcome) {
        let frames = self.frames(world, want, hands);
        let stretch = range.stretch(addr, addr + frames.pages() * PAGE_SIZE);
        // Put after the locks are released.
        let mut puts = Puts::new(&self.domain, self.me());
        let guards = stretch.lock();
        let first = self.entry_in(&stretch[0], addr);
        let (n, failed) = self.fill(&stretch, addr, frames, hands);
        let (done, stop) = self.install(world, frames, n, addr, hands);
        let end = addr + done * PAGE_SIZE;
        for at in (addr..end).step_by(PAGE_SIZE) {
            match self.entry_in(&stretch[at / GRANULE - addr / GRANULE], at) {
                e @ Entry::Away(..) if why == Why::Migrate || self.one_by_one.load(Ordering::Relaxed) => {
                    puts.begin(e);
                    self.entries.set(at, Entry::Kernel);
                }
                Entry::Away(dev, pfn) => self.entries.set(at, Entry::Copied(dev, pfn)),
                Entry::Same(_) => self.entries.set(at, Entry::Kernel),
                _ => {}
            }
        }
        self.touched(addr, end);
        for found in stretch.iter().filter(|f| done > 0 && f.start < end) {
            if found.granule.slot().is_some() {
                found.granule.set(flag::REQUEUE);
            } else {
                self.enqueue(found);
            }
        }
        if done > 0 && first != Entry::Kernel {
            self.count(Counter::PagesIn, done as u64);
        }
        if done > 0 && first != Entry::Kernel && self.full.load(Ordering::Relaxed) {
            // No device takes another page: what these leave behind there lets others out.
            self.put_entries(addr, end);
            // While that is enough, pages change places instead of going above the budget.
            if self.domain.charged() < self.domain.budget() + self.domain.budget() / 32 {
                self.stuck_until.store(0, Ordering::Relaxed);
            }
        }
        // A second thread's fault on the page comes when it is there already. If it is not, we have lost it. (What nobody
        // waits for may have been moved away behind our back.)
        let gone = why == Why::Fault
            && n == 0
            && !self.is_staged(&stretch[0], addr)
            && matches!(first, Entry::Copied(..))
            && world.scan.count(addr, addr + PAGE_SIZE) == Ok(0);
        if gone {
            crate::sys::say(&format!(
                "the page at {addr:#x} of process {} has vanished from DRAM and is poisoned: whoever touches it gets SIGBUS",
                std::process::id()
            ));
        }
        // Only the page that was asked for is given up; one ahead of use is tried again in its turn.
        if n == 0
            && why != Why::Migrate
            && let Some((dev, e)) = &failed
        {
            self.load_failed(*dev, addr, e);
        }
        if n == 0 && why != Why::Migrate && (failed.is_some() || gone) {
            self.give_up(addr);
            drop(guards);
            return (0, self.poison(world, addr));
        }
        drop(guards);
        self.faults.streams().served(addr, end);
        let outcome = if done == 0 && stop == Some(Stop::Again) { Outcome::Later } else { Outcome::Wake };
        (done, outcome)
    }

    /// The page's entry; no look at those of a granule that has none.
    fn entry_in(&self, found: &Found<'_>, at: usize) -> Entry {
        if found.granule.has(flag::ENTRIES) { self.entries.get(at) } else { Entry::Kernel }
    }

    fn is_staged(&self, found: &Found<'_>, at: usize) -> bool {
        let staged = found.granule.slot().map_or(0, |s| self.slots.staged(s));
        staged & window(at, at + PAGE_SIZE) != 0
    }

    /// Fills `frames` with the pages from `addr` on, as far as they are of the same kind (never touched, or away) and not in
    /// DRAM as far as we know: a run that one call installs. Under the granules' locks. Returns how many, and what
    /// made it stop if that was a device.
    fn fill(
        &self,
        stretch: &Stretch<'_>,
        addr: usize,
        frames: Frames,
        hands: &mut Hands,
    ) -> (usize, Option<(u8, DeviceError)>) {
        let fresh = self.entry_in(&stretch[0], addr) == Entry::Kernel;
        let mut buffers = hands.pages.iter_mut();
        let mut loads = Loads { device: 0, first: 0, ops: ArrayVec::new() };
        let mut n = 0;
        while n < frames.pages() {
            let at = addr + n * PAGE_SIZE;
            let Some(found) = stretch.get(at / GRANULE - addr / GRANULE) else { break };
            let entry = self.entry_in(found, at);
            let here = matches!(entry, Entry::Copied(..) | Entry::Lost) || self.is_staged(found, at);
            if here || (entry == Entry::Kernel) != fresh {
                break;
            }
            let page = match frames {
                // The frames are ours since `frames` took them.
                Frames::Slot(run) => self.slots.taken_page(run, n),
                Frames::Kernel(_) => match buffers.next() {
                    Some(page) => page,
                    None => break,
                },
            };
            let goes_on = matches!(entry, Entry::Away(dev, _) if dev == loads.device && !loads.ops.is_full());
            if !goes_on && let Err((good, e)) = self.load(&mut loads) {
                return (good, Some(e));
            }
            match entry {
                Entry::Kernel => page.0.fill(0),
                Entry::Same(v) => page.fill(v),
                Entry::Away(device, pfn) => {
                    if loads.ops.is_empty() {
                        (loads.device, loads.first) = (device, n);
                    }
                    loads.ops.push(LoadOp { pfn, page, result: Err(DeviceError::Corrupt) });
                }
                Entry::Copied(..) | Entry::Lost => {}
            }
            n += 1;
        }
        match self.load(&mut loads) {
            Ok(()) => (n, None),
            Err((good, e)) => (good, Some(e)),
        }
    }

    /// Loads what has been gathered. On an error: the number of the page that could not be loaded, and why.
    fn load(&self, loads: &mut Loads<'_>) -> Result<(), (usize, (u8, DeviceError))> {
        if loads.ops.is_empty() {
            return Ok(());
        }
        let (good, bad, result) = self.domain.pagemap(loads.device).load(&mut loads.ops);
        self.count(Counter::LoadErrors, bad);
        loads.ops.clear();
        result.map_err(|e| (loads.first + good, (loads.device, e)))
    }

    /// Prefetch: brings in what of `[start, end)` is on a device. Returns how many pages came.
    pub(crate) fn prefetch(&self, world: &World, start: usize, end: usize, hands: &mut Hands) -> usize {
        if self.faults.raw_changes() {
            return 0; // what is away may be dropped or moved behind our back just now
        }
        let mut total = 0;
        'granules: for (found, s, e) in world.ranges.granules(start, end) {
            let away = |a: usize| {
                matches!(self.entry_in(&found.range.granule(a), a), Entry::Away(..) | Entry::Same(_))
            };
            let mut at = s;
            while at < e {
                if !away(at) {
                    at += PAGE_SIZE;
                    continue;
                }
                // As far as it goes; what lies in further granules is found to be there when it is their turn.
                let most = (at + self.most_together() * GRANULE).min(end).min(found.range.end);
                let run = (at..most).step_by(PAGE_SIZE).take_while(|&a| away(a)).count();
                if run == 0 {
                    continue; // a fault was quicker
                }
                // Only out of the stock: what nobody has asked for yet must push nobody out.
                if self.slots.free_frames() < run as u64 && self.pressure.load(Ordering::Relaxed) {
                    break 'granules;
                }
                let (done, outcome) = self.bring_in(world, found.range, at, run, Why::Ahead, hands);
                total += done;
                at += done.max(1) * PAGE_SIZE;
                if outcome == Outcome::Later {
                    break 'granules;
                }
            }
        }
        self.count(Counter::Prefetched, total as u64);
        total
    }

    fn load_failed(&self, dev: u8, addr: usize, e: &DeviceError) {
        let name = self.domain.pagemap(dev).device.name();
        crate::sys::say(&format!(
            "the page at {addr:#x} of process {} could not be read back from device {name} ({e}) and is poisoned: \
             whoever touches it gets SIGBUS",
            std::process::id()
        ));
    }

    /// The page is lost: its frame is put, its entry says so. Under the granule's lock.
    fn give_up(&self, addr: usize) {
        if let Some((dev, pfn)) = self.entries.get(addr).frame() {
            let map = self.domain.pagemap(dev);
            map.frames.begin_put(pfn, self.me());
            self.entries.set(addr, Entry::Lost);
            map.put_in_transit(&[pfn], self.me());
        }
        self.faults.set_poisoned();
        self.count(Counter::Poisoned, 1);
    }

    fn poison(&self, world: &World, addr: usize) -> Outcome {
        match world.uffd.poison(addr, PAGE_SIZE) {
            Err(Stop::Again) => Outcome::Later,
            _ => Outcome::Wake,
        }
    }

    fn zero_unknown(&self, world: &World, addr: usize, hands: &mut Hands) -> Outcome {
        hands.pages[0].0.fill(0);
        match world.uffd.copy(addr, hands.pages.as_ptr() as usize, PAGE_SIZE).1 {
            Some(Stop::Again) => Outcome::Later,
            _ => Outcome::Wake,
        }
    }
}
