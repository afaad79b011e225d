//! Mapping changes that went past us, by raw system calls. The kernel announces them: drops before they happen, the
//! others afterwards. Reading the announcement lets the caller go.
//!
//! A drop is the delicate one. Between our reading and the kernel's dropping, a page that we moved to staging would
//! escape the drop; between the dropping and our noting it, a page written since would be taken for an old one.
//! So nothing of the range is evicted from the moment that the announcement is read ([`Space::in_flux`]) until the
//! caller has surely done what he announced.

use super::bits::runs;
use super::ops::window;
use super::range::GRANULE;
use super::{Space, World};
use crate::PAGE_SIZE;
use crate::fault::Change;
use crate::sys::uffd::Stop;

/// How long a caller who was let go may take until he has dropped the pages. He is runnable all that time.
const SURELY_DROPPED_MS: u64 = 1000;

/// What others drop.
#[derive(Default)]
pub(crate) struct Flux {
    /// Ranges whose pages are about to be dropped, and until when that may be (milliseconds).
    ranges: Vec<(usize, usize, u64)>,
    /// From when on the process's charge is to be counted anew: what was counted when the announcement came had not been
    /// dropped yet.
    recount: Option<u64>,
}

impl Flux {
    /// That of a forked child: its charge is its parent's, who may be in the middle of something.
    pub fn of_child() -> Self {
        Self { ranges: Vec::new(), recount: Some(0) }
    }
}

impl Space {
    /// The kernel announces a change; called while messages are being read.
    pub(crate) fn announced(&self, change: Change) {
        if !self.faults.note(change) {
            return; // our own
        }
        if !matches!(change, Change::Forked) {
            self.faults.set_raw_changes();
        }
        if let Change::Removed(start, end) = change {
            let now = crate::sys::now_ms();
            let mut flux = self.flux.lock();
            flux.ranges.retain(|f| f.2 > now);
            flux.ranges.push((start, end, now + SURELY_DROPPED_MS));
            flux.recount = Some(now + SURELY_DROPPED_MS);
        }
    }

    /// Whether it is uncertain what `[start, end)` is: a change that went past us is still to be seen to, or pages there
    /// are about to be dropped.
    pub(crate) fn in_flux(&self, start: usize, end: usize) -> bool {
        if !self.faults.raw_changes() {
            return false;
        }
        if self.faults.has_changes() {
            return true;
        }
        let now = crate::sys::now_ms();
        self.flux.lock().ranges.iter().any(|&(s, e, until)| s < end && start < e && now < until)
    }

    /// Makes our books agree with all changes that were announced and not yet seen to.
    pub(crate) fn apply_changes(&self, world: &mut World) {
        if !self.faults.has_changes() {
            return;
        }
        while let Some(change) = self.faults.next_change() {
            match change {
                Change::Removed(start, end) => self.removed(world, start, end),
                Change::Unmapped(start, end) => self.unmapped(world, start, end),
                Change::Moved(from, to, len) => self.moved(world, from, to, len),
                Change::Forked => self.fill_orphan(world),
            }
        }
        self.recount(world);
    }

    fn removed(&self, world: &World, start: usize, end: usize) {
        world.ranges.granules(start, end).for_each(|(f, s, e)| self.drop_pages(&f, s, e));
    }

    fn unmapped(&self, world: &mut World, start: usize, end: usize) {
        // The addresses may have been given out again before the announcement reached us: what is registered is a
        // mapping of now, not the one that has gone.
        let gone: Vec<(usize, usize)> = world
            .ranges
            .granules(start, end)
            .map(|(_, s, e)| (s, e))
            .filter(|&(s, _)| !self.is_registered(world, s))
            .collect();
        for (s, e) in gone {
            self.forget(world, s, e);
        }
    }

    fn moved(&self, world: &mut World, from: usize, to: usize, len: usize) {
        let founds: Vec<usize> = world.ranges.granules(from, from + len).map(|(f, ..)| f.start).collect();
        for at in founds {
            let Some(f) = world.ranges.granule(at) else { continue };
            let Some(slot) = f.granule.slot() else { continue };
            // Their old place is gone: what was staged goes to the new one.
            let base = f.start / GRANULE * GRANULE;
            let theirs = window(f.start.max(from), f.end.min(from + len));
            let staged = self.slots.staged(slot);
            for (first, n) in runs(staged & theirs) {
                for i in first..first + n {
                    self.copy_back(world, slot, i, base + i * PAGE_SIZE - from + to);
                }
            }
            self.slots.set_staged(slot, staged & !theirs);
            self.unstage(world, &f);
        }
        // What the move replaced. (Its unmapping was announced first, but what is there now is registered.)
        self.forget(world, to, to + len);
        if self.move_entries(world, from, to, len).is_err() {
            crate::sys::fatal("cannot follow a mapping that was moved by a raw system call");
        }
    }

    /// When the process's charge is to be counted anew, in milliseconds.
    pub(super) fn recount_at(&self) -> Option<u64> {
        if self.faults.raw_changes() { self.flux.lock().recount } else { None }
    }

    /// Counts it, if it is time. With the world held exclusively.
    pub(super) fn recount_if_due(&self, world: &World) {
        if self.recount_at().is_some_and(|at| at <= crate::sys::now_ms()) {
            self.flux.lock().recount = None;
            self.recount(world);
        }
    }

    /// After changes that went past us: what this process is charged for, counted anew.
    fn recount(&self, world: &World) {
        let pages = self.counted(world);
        self.slot().charge.store(pages, std::sync::atomic::Ordering::SeqCst);
    }

    /// Whether the page at `addr` is in a mapping that is registered with our userfaultfd. Asked by moving a page that
    /// does not exist there, which changes nothing.
    fn is_registered(&self, world: &World, addr: usize) -> bool {
        loop {
            match world.move_pages(&world.uffd, addr, self.slots.hole(), PAGE_SIZE, true).1 {
                None | Some(Stop::Exists) => return true,
                Some(Stop::Again) => self.hear(world),
                Some(_) => return false,
            }
        }
    }
}
