//! Memory that somebody else has mapped: taken under management as it is, and let go of again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::range::{Range, flag};
use super::{Space, World};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::fault::resolve::{Outcome, Why};
use crate::reclaim::Hands;
use crate::space::range::{GRANULE, STRETCH};

/// Milliseconds without any progress after which the budget is left exceeded.
const PATIENCE_MS: u64 = 1000;
/// How much is let go of under one hold of the world.
const WINDOW: usize = STRETCH * GRANULE;

impl Space {
    /// Manages `[start, end)`, private anonymous memory that may have been used before. What of it is in DRAM is charged, and
    /// leaves when it is its turn; the budget may be exceeded until that has happened
    /// (`wait_for_budget`).
    ///
    /// # Errors
    /// The kernel does not let it be registered; it stays as it was.
    #[doc(hidden)]
    pub fn adopt(&self, world: &mut World, start: usize, end: usize) -> Result<(), Errno> {
        world.uffd.register(start, end - start)?;
        // From here on nothing more comes without us: who touches an absent page waits for the world.
        self.domain.force_charge(self.me(), world.resident(start, end));
        let range = Range::new(start, end, 0);
        for found in range.iter() {
            self.enqueue(&found);
        }
        world.ranges.insert(range);
        Ok(())
    }

    /// Waits until the budget is kept, as long as that gets nearer: the worker sees to it.
    pub(crate) fn wait_for_budget(&self) {
        let over = || self.domain.charged().saturating_sub(self.domain.budget());
        let (mut least, mut patience) = (u64::MAX, 0);
        loop {
            let now = (over(), crate::sys::now_ms());
            if now.0 < least {
                (least, patience) = (now.0, now.1 + PATIENCE_MS);
            }
            if now.0 == 0 || now.1 > patience {
                return;
            }
            self.pressure.store(true, Ordering::Relaxed);
            self.wake_worker();
            self.slots.wait_for_free(Duration::from_micros(500));
        }
    }

    /// Lets go of `[start, end)`, managed or not: all of it comes back to DRAM, whatever the budget says, and is the kernel's
    /// from then on. A page that cannot be read back stays poisoned.
    #[doc(hidden)]
    pub fn release(&self, start: usize, end: usize, hands: &mut Hands) {
        for s in (start..end).step_by(WINDOW) {
            let e = (s + WINDOW).min(end);
            self.change(|world| {
                self.bring_back(world, s, e, hands);
                let charge = self.charge_of(world, s, e);
                self.leave(world, s, e);
                self.forget(world, s, e);
                self.domain.uncharge(self.me(), charge);
            });
        }
    }

    /// Every page of `[start, end)` into DRAM, and none of it leaves again as long as the world is held exclusively.
    fn bring_back(&self, world: &World, start: usize, end: usize, hands: &mut Hands) {
        // To make room for the next of them is no reason to push out one that has come.
        let _hold = self.hold(start, end);
        for (found, s, e) in world.ranges.granules(start, end) {
            self.unstage(world, &found);
            if !found.granule.has(flag::ENTRIES) {
                continue;
            }
            let away = |at: usize| matches!(self.entries.get(at), Entry::Away(..) | Entry::Same(_));
            let mut at = s;
            while at < e {
                if !away(at) {
                    at += PAGE_SIZE;
                    continue;
                }
                let n = (at..e).step_by(PAGE_SIZE).take_while(|&a| away(a)).count();
                let (done, outcome) = self.bring_in(world, found.range, at, n, Why::Fault, hands);
                if done == 0 && outcome == Outcome::Later {
                    self.hear(world);
                }
                // One that is lost now is away no longer.
                at += done * PAGE_SIZE;
            }
        }
    }
}
