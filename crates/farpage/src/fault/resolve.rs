//! One fault: from its address to a page in place.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::device::DeviceError;
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::reclaim::{Frames, Hands};
use crate::space::ops::window;
use crate::space::range::{Found, GRANULE, GRANULE_PAGES, flag};
use crate::space::{Space, World, slots};
use crate::sys::uffd::Stop;
use crate::{PAGE_SIZE, Page};

/// What became of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The page is there (or poisoned, or its mapping is gone): wake who waits.
    Wake,
    /// An event is pending: put aside.
    Later,
}

/// Why pages are brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// A thread waits for the first of them.
    Fault,
    /// Somebody will probably want them.
    Ahead,
}

/// The most that is left to the kernel at once.
const MAX_GRANT: usize = 16 << 20;

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

    fn resolve(&self, world: &World, addr: usize, hands: &mut Hands) -> Outcome {
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
        let window = self.faults.streams().fault(addr);
        let mut want = window.min((found.end - addr) / PAGE_SIZE);
        if entry == Entry::Kernel && window > 1 {
            self.count(Counter::FaultsZero, 1);
        } else if entry == Entry::Kernel {
            self.count(Counter::FaultsZero, 1);
            want = 1;
        } else {
            self.count(Counter::FaultsDevice, 1);
        }
        if entry == Entry::Lost {
            return self.poison(world, addr);
        }
        let outcome = self.bring_in(world, &found, addr, want, Why::Fault, hands).1;
        if window >= GRANULE_PAGES && found.end < found.range.end {
            self.ask_ahead(&found, window);
        }
        outcome
    }

    /// The worker brings in what follows a stream.
    fn ask_ahead(&self, found: &Found<'_>, window: usize) {
        let mut ahead = self.ahead.lock();
        if ahead.len() < 64 {
            let granules = window / GRANULE_PAGES;
            ahead.extend((0..granules).map(|i| found.end + i * GRANULE).filter(|&a| a < found.range.end));
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
        let want = (free / 16).min(MAX_GRANT);
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
        let (first, len) = slots::runs(staged).find(|&(f, l)| f <= i && i < f + l)?;
        let src = self.slots.addr(slot, first);
        let dst = base + first * PAGE_SIZE;
        let (done, stop) = world.move_pages(&world.uffd, dst, src, len * PAGE_SIZE, false);
        let done = done / PAGE_SIZE;
        let mut back = slots::mask(first, done);
        let mut outcome = Outcome::Wake;
        if first + done <= i {
            match stop {
                Some(Stop::Again) => outcome = Outcome::Later,
                Some(Stop::Gone) => {}
                _ => {
                    // MOVE does not take this mapping (read-only, locked), or the page is shared since a fork.
                    let src = self.slots.addr(slot, i);
                    if world.uffd.copy(addr, src, PAGE_SIZE).0 == PAGE_SIZE {
                        self.forget_frames(slot, slots::mask(i, 1));
                        back |= slots::mask(i, 1);
                    }
                }
            }
        }
        self.slots.set_staged(slot, staged & !back);
        if back != 0 {
            found.granule.set(flag::REQUEUE);
            self.count(Counter::Refaults, 1);
        }
        Some(outcome)
    }

    /// Brings up to `want` pages from `addr` (in one granule) into DRAM. Returns how many came, and what to tell
    /// the thread that waits for the first.
    fn bring_in(
        &self,
        world: &World,
        found: &Found<'_>,
        addr: usize,
        want: usize,
        why: Why,
        hands: &mut Hands,
    ) -> (usize, Outcome) {
        let frames = self.frames(world, want, hands);
        let granule = found.granule;
        let guard = granule.lock();
        let staged = granule.slot().map_or(0, |s| self.slots.staged(s));
        let has_entries = granule.has(flag::ENTRIES);
        let base = found.start / GRANULE * GRANULE;
        let entry_of = |at: usize| if has_entries { self.entries.get(at) } else { Entry::Kernel };
        let kind = |e: Entry| matches!(e, Entry::Kernel);
        let first = entry_of(addr);
        // Of the same kind, and not in DRAM as far as we know: a run that one call installs.
        let mut n = 0;
        let mut failed = None;
        while n < frames.pages() {
            let at = addr + n * PAGE_SIZE;
            let e = entry_of(at);
            let is_staged = staged & slots::mask((at - base) / PAGE_SIZE, 1) != 0;
            if is_staged || matches!(e, Entry::Copied(..) | Entry::Lost) || kind(e) != kind(first) {
                break;
            }
            let page: &mut Page = match frames {
                // The frame is ours since `frames` took it.
                Frames::Slot(run) => self.slots.taken_page(run.slot, run.first + n),
                Frames::Kernel(_) => &mut hands.pages[n],
            };
            match e {
                Entry::Kernel => page.0.fill(0),
                Entry::Same(v) => page.fill(v),
                Entry::Away(dev, pfn) => {
                    let (result, bad) = self.domain.pagemap(dev).load(pfn, page);
                    self.count(Counter::LoadErrors, bad);
                    if let Err(e) = result {
                        // Only the page that was asked for is given up; one ahead of use is tried again in its turn.
                        if n == 0 {
                            self.load_failed(dev, at, &e);
                            failed = Some(e);
                        }
                        break;
                    }
                }
                Entry::Copied(..) | Entry::Lost => {}
            }
            n += 1;
        }
        let (done, stop) = self.install(world, frames, n, addr, hands);
        for k in 0..done {
            let at = addr + k * PAGE_SIZE;
            match entry_of(at) {
                Entry::Away(dev, pfn) => self.entries.set(at, Entry::Copied(dev, pfn)),
                Entry::Same(_) => self.entries.set(at, Entry::Kernel),
                _ => {}
            }
        }
        if done > 0 {
            if granule.slot().is_some() {
                granule.set(flag::REQUEUE);
            } else {
                self.enqueue(found);
            }
            if first != Entry::Kernel {
                self.count(Counter::PagesIn, done as u64);
            }
        }
        // A second thread's fault on the page comes when it is there already. If it is not, we have lost it. (What nobody
        // waits for may have been moved away behind our back.)
        let gone = why == Why::Fault
            && n == 0
            && staged & window(addr, addr + PAGE_SIZE) == 0
            && matches!(first, Entry::Copied(..))
            && world.scan.count(addr, addr + PAGE_SIZE) == Ok(0);
        if gone {
            crate::sys::say(&format!(
                "the page at {addr:#x} of process {} has vanished from DRAM and is poisoned: whoever touches it gets SIGBUS",
                std::process::id()
            ));
        }
        if failed.is_some() || gone {
            self.give_up(addr);
            drop(guard);
            return (0, self.poison(world, addr));
        }
        let outcome = if done == 0 && stop == Some(Stop::Again) { Outcome::Later } else { Outcome::Wake };
        (done, outcome)
    }

    /// Prefetch: brings in what of the granule at `addr` is on a device. Returns how many pages came.
    pub(crate) fn prefetch(&self, world: &World, addr: usize, hands: &mut Hands) -> usize {
        let Some(found) = world.ranges.granule(addr).filter(|f| f.granule.has(flag::ENTRIES)) else {
            return 0;
        };
        if self.faults.raw_changes() {
            return 0; // what is away may be dropped or moved behind our back just now
        }
        let mut total = 0;
        let mut at = found.start;
        while at < found.end {
            let away = |a: usize| matches!(self.entries.get(a), Entry::Away(..) | Entry::Same(_));
            if !away(at) {
                at += PAGE_SIZE;
                continue;
            }
            let run = (at..found.end).step_by(PAGE_SIZE).take_while(|&a| away(a)).count();
            // Only out of the stock: what nobody has asked for yet must push nobody out.
            if self.slots.free_frames() < run as u64 && self.pressure.load(Ordering::Relaxed) {
                break;
            }
            let (done, outcome) = self.bring_in(world, &found, at, run, Why::Ahead, hands);
            total += done;
            at += done.max(1) * PAGE_SIZE;
            if outcome == Outcome::Later {
                break;
            }
        }
        if total > 0 {
            self.faults.streams().served(found.start, found.end);
            self.count(Counter::Prefetched, total as u64);
        }
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
