//! A process's part of an audit: what it is charged for, against what is there.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Space, World};
use crate::domain::UNCERTAIN;

/// How long the worker waits for those in the world to leave it. Not longer: they may be waiting for the worker.
const QUIET: Duration = Duration::from_millis(5);

impl Space {
    /// Pages of DRAM that this process has: its managed ranges, what is granted in full, and the staging slots. With the
    /// world held exclusively nothing moves, and this is what the process is charged for.
    pub(crate) fn counted(&self, world: &World) -> u64 {
        let ranges: u64 = world.ranges.iter().map(|r| self.charge_of(world, r.start, r.end)).sum();
        let (start, len) = self.slots.area();
        ranges + world.resident(start, start + len)
    }

    /// If an audit has asked ([`crate::domain::Domain::audit`]): answers it, when nothing moves. Counts the charge anew, too, if
    /// it is time for that. The worker does it, with no lock held. Whoever asked asks again if there was no such moment.
    pub(crate) fn answer_audit(&self) {
        let slot = self.slot();
        // SeqCst with the question, which is followed by a wake: no question is slept over.
        let asked = slot.audit_asked.load(Ordering::SeqCst);
        let is_asked = asked != slot.audit_answered.load(Ordering::Relaxed);
        if !is_asked && self.recount_at().is_none_or(|at| at > crate::sys::now_ms()) {
            return;
        }
        let Some(mut world) = self.world.try_write_for(QUIET) else {
            return self.faults.nudge(); // for those that were put aside meanwhile
        };
        self.faults.caught_up();
        self.apply_changes(&mut world);
        self.recount_if_due(&world);
        let answer = match self.recount_at() {
            _ if !is_asked => None,
            // Pages may be dropped behind our back at any moment, or have been a moment ago.
            Some(_) => Some(UNCERTAIN),
            None => {
                let half = |pages: u64| pages.min(u64::from(u32::MAX));
                Some(half(slot.charge.load(Ordering::SeqCst)) << 32 | half(self.counted(&world)))
            }
        };
        drop(world);
        self.faults.nudge();
        if let Some(answer) = answer {
            slot.audit_answer.store(answer, Ordering::Relaxed);
            // Release: who sees the number sees the answer.
            slot.audit_answered.store(asked, Ordering::Release);
            crate::sys::futex_wake(&slot.audit_answered, i32::MAX);
        }
    }
}
