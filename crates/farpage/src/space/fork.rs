//! Fork: the child's page entries are written before the child exists, each with its own reference.
//!
//! Pages in DRAM are the kernel's to share and to copy on write; staging slots are private memory of the process
//! and come along by the same means. What is away is shared by count: frames are never changed in place, so whoever
//! writes gets his own copy when he evicts it.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use super::range::{Ranges, flag};
use super::{Space, World};
use crate::PAGE_SIZE;
pub use crate::domain::child::Prepared;
use crate::domain::entry::Entries;
use crate::domain::{Counter, DomainError, state};
use crate::fault::Change;
use crate::frame::Owner;
use crate::sys::uffd::Uffd;
use crate::sys::{BlockedSignals, LentLife, SharedMap, Write};

/// Milliseconds that a fork waits for room for the child, while none is gained.
const ROOM_MS: u64 = 2000;
/// Milliseconds within which a new process's worker has run, or the process goes on without.
const LIVE_MS: u64 = 10_000;

/// A fork in progress, with the world held.
pub struct Forking {
    world: Write<'static, World>,
    child: Prepared,
    window: SharedMap,
    _signals: BlockedSignals,
}

impl Space {
    /// Before the fork, in the thread that forks: stops all motion and prepares the child.
    ///
    /// # Errors
    /// No process slot or no memory for the child's entries; the fork must not happen then.
    #[doc(hidden)]
    pub fn before_fork(&'static self) -> Result<Forking, DomainError> {
        let signals = BlockedSignals::new();
        let prepared = self.domain.prepare_child(self.me())?;
        let child = prepared.slot;
        let window = self.domain.map_window(child).inspect_err(|_| self.domain.fork_failed(prepared))?;
        let world = self.with_room_for(child);
        if world.announces_forks {
            self.forks.store(1, Ordering::SeqCst);
        }
        self.end_exclusives(&world);
        let theirs = Entries::new(&window);
        let slot = self.domain.slot(child);
        // Where no room could be made, this is above the budget, and is counted so.
        self.domain.force_charge(child, 0);
        // Not a store: the launcher may have marked the child already.
        slot.plain_refs.fetch_max(self.slot().plain_refs.load(Ordering::SeqCst), Ordering::SeqCst);
        for range in world.ranges.iter().filter(|r| !r.not_for_children) {
            for found in range.iter().filter(|f| f.granule.has(flag::ENTRIES)) {
                for at in (found.start..found.end).step_by(PAGE_SIZE) {
                    let e = self.entries.get(at);
                    match e.frame() {
                        Some((dev, pfn)) => {
                            let map = self.domain.pagemap(dev);
                            if let Err(e) = map.get_in_transit(pfn, child) {
                                crate::sys::fatal(&format!("cannot share frame {pfn} with a child: {e}"));
                            }
                            theirs.set(at, e);
                            map.frames.settle(pfn);
                        }
                        None if e.is_away() => theirs.set(at, e),
                        None => {}
                    }
                }
            }
        }
        Ok(Forking { world, child: prepared, window, _signals: signals })
    }

    /// Charges the child with all that this process has in DRAM, but for the frames in stock, which the child gives up
    /// at once. Pages that the two share for the time being count twice: either may make them his own at any moment,
    /// without our being told.
    fn reserve_for(&self, child: Owner) -> u64 {
        let mine = self.slot().charge.load(Ordering::SeqCst).saturating_sub(self.slots.free_frames());
        self.domain.slot(child).charge.store(mine, Ordering::SeqCst);
        self.domain.charged().saturating_sub(self.domain.budget())
    }

    /// The world, held, when the budget has room for the child, or none can be made. What is reserved is nobody else's
    /// meanwhile; the workers of the tree make room as they do whenever more is charged than the budget allows.
    fn with_room_for(&'static self, child: Owner) -> Write<'static, World> {
        let mut least = u64::MAX;
        let mut patience = crate::sys::now_ms() + ROOM_MS;
        loop {
            let excess = self.reserve_for(child);
            if excess < least {
                least = excess;
                patience = crate::sys::now_ms() + ROOM_MS;
            }
            let hopeless = self.full.load(Ordering::Relaxed) || crate::sys::now_ms() > patience;
            if excess == 0 || hopeless {
                let world = self.enter_world();
                let excess = self.reserve_for(child);
                if excess == 0 || hopeless {
                    self.count(Counter::OverBudget, excess);
                    return world;
                }
                drop(world);
                self.faults.nudge();
                continue;
            }
            self.pressure.store(true, Ordering::Relaxed);
            self.wake_worker();
            self.ask_others(excess.min(4096) as u32, true);
            self.slots.wait_for_free(std::time::Duration::from_micros(500));
        }
    }

    /// After the fork, in the parent, also when it failed: for [`Space::fork_failed`], should that come out later.
    #[doc(hidden)]
    pub fn after_fork_in_parent(&self, forking: Forking) -> Prepared {
        let Forking { world, window, child, _signals } = forking;
        window.unmap();
        self.pins.forked();
        // The announcement has been read and noted, or there would be no child. There may be none in spite of it: much can
        // still go wrong afterwards.
        self.faults.caught_up();
        if self.forks.swap(0, Ordering::SeqCst) != 0 {
            self.fork_failed(child);
        }
        self.domain.fork_is_over(child);
        drop(world);
        self.faults.nudge();
        child
    }

    /// After the fork, in the child, whose only thread this is. The manager's threads must be started next; the result, this
    /// thread's life sign, is for the time until they live ([`Space::wait_until_live`]).
    ///
    /// # Errors
    /// The child cannot be managed: it must not go on, its absent pages would read as zeros.
    #[doc(hidden)]
    pub fn after_fork_in_child(&'static self, forking: Forking) -> Result<LentLife, DomainError> {
        use crate::domain::sys_err;
        let Forking { mut world, child, window, _signals } = forking;
        self.me.store(u32::from(child.slot), Ordering::SeqCst);
        // First of all: whatever happens to the child from now on, the launcher gets to know.
        let Some(life) = crate::sys::lend_life(&self.slot().life, &child.tickets()) else {
            crate::sys::fatal("a forked child has been given up before it came");
        };
        self.slot().pid.store(crate::sys::number_in_proc(), Ordering::Release);
        self.domain.changed();
        // SAFETY: the window at this address is our page entries; from now on they are the child's, in whose window
        // the parent has written them.
        unsafe { window.move_over(self.window.addr()) }.map_err(sys_err("take over the page entries"))?;
        self.running.store(false, Ordering::Relaxed);
        // SAFETY: this is the only thread; other threads of the parent may have held these.
        unsafe {
            self.faults.renew();
            self.holds.reset();
            self.jobs.renew();
            self.ahead.renew(VecDeque::new());
            self.outgoing.renew(VecDeque::new());
            self.flux.renew(super::behind::Flux::of_child());
            self.exclusives.renew();
            self.domain.pagemaps.iter().for_each(|map| map.after_fork_in_child());
        }
        self.mark.set();
        self.leaving.store(0, Ordering::SeqCst);
        self.slots.reset_settling();
        self.asleep.store(false, Ordering::SeqCst);
        let mut ranges = std::mem::take(&mut world.ranges);
        let gone: Vec<(usize, usize)> =
            ranges.iter().filter(|r| r.not_for_children).map(|r| (r.start, r.end)).collect();
        for &(start, end) in &gone {
            // What is staged of them came along in the slots, where nobody would look for it: a slot that is thought empty
            // would hold it still.
            for range in ranges.take(start, end) {
                for slot in range.iter().filter_map(|f| f.granule.slot()) {
                    let staged = self.slots.staged(slot);
                    self.slots.set_staged(slot, 0);
                    self.retire(slot, staged);
                }
            }
        }
        // The parent's descriptors go, ours come.
        *world = World::open(Ranges::default(), &self.slots, self.mode)?;
        world.ranges = ranges;
        self.pins.reset(&world.ranges);
        register_all(&world)?;
        self.note_descriptors(&world);
        self.ring_bell_with(&world)?;
        self.forks.store(0, Ordering::SeqCst);
        drop(world);
        // The frames in stock are the parent's, shared: the child begins without, and was not charged for them.
        while let Some(run) = self.slots.take(super::range::GRANULE_PAGES) {
            crate::sys::drop_pages(self.slots.addr(run.slot, run.first), run.len * PAGE_SIZE);
            self.slots.used(run, run.len);
        }
        if !gone.is_empty() {
            // Charged were its parent's pages, also those that it has not got.
            self.slot().charge.store(self.counted(&self.world.read()), Ordering::SeqCst);
        }
        Ok(life)
    }

    /// Waits until the worker holds the life sign, for as long as that can take: a process that goes on before and begins
    /// another program has a number that still exists, and nobody would know that what it held is nobody's.
    ///
    /// The worker needs nothing for it that the caller could hold: see [`crate::reclaim::worker::run`].
    #[doc(hidden)]
    pub fn wait_until_live(&self) {
        let state = &self.slot().state;
        let deadline = crate::sys::now_ms() + LIVE_MS;
        // Acquire pairs with the worker's Release.
        while state.load(Ordering::Acquire) == state::FORMING && crate::sys::now_ms() < deadline {
            crate::sys::futex_wait(state, state::FORMING, Some(std::time::Duration::from_millis(LIVE_MS)));
        }
    }

    /// The fork did not happen: the launcher gives the child's slot back.
    #[doc(hidden)]
    pub fn fork_failed(&self, child: Prepared) {
        self.domain.fork_failed(child);
    }

    /// The kernel announces a forked child and hands us its userfaultfd. One that was prepared for registers its ranges
    /// itself, so this one goes; for another see [`super::orphan`].
    pub(crate) fn forked_event(&self, child: RawFd) {
        let child = Uffd::from_raw(child);
        if self.forks.swap(0, Ordering::SeqCst) != 0 {
            return;
        }
        // Manager threads have descriptor tables of their own, and who sees to the change may be another one than who was
        // told. Messages are read by one thread at a time, so that the descriptors come in the order of the changes.
        let [.., to, _] = self.descriptors();
        if let Err(e) = crate::sys::relay(to, child.into()) {
            crate::sys::fatal(&format!("cannot pass on the userfaultfd of a child: {e}"));
        }
        self.announced(Change::Forked);
    }
}

/// Registers all that is not granted.
fn register_all(world: &World) -> Result<(), DomainError> {
    for range in world.ranges.iter() {
        let mut start = None;
        for f in range.iter() {
            let granted = f.granule.has(flag::GRANTED);
            match (granted, start) {
                (false, None) => start = Some(f.start),
                (true, Some(s)) => {
                    world.register(s, f.start)?;
                    start = None;
                }
                _ => {}
            }
        }
        if let Some(s) = start {
            world.register(s, range.end)?;
        }
    }
    Ok(())
}
