//! Slots that parents prepare for the children that they are about to fork. A child makes its slot its own with its first step:
//! it exchanges the ticket in the slot's life word for its life sign. One that never does must not keep what was reserved
//! for it: the fork has failed, its parent was killed before, or it was itself killed before that step.
//!
//! Whether a fork has failed is known where the C library's `fork` was called by its name. In all other cases the slot is
//! given up only when the fork is over and there is no process that could be the child. A child may wait for a long time
//! before its first step (a debugger holds it, its control group is frozen), so time says nothing. Should it come all the same,
//! it finds that its ticket is gone.

use std::sync::atomic::Ordering;

use super::slot::{Slot, state};
use super::{Domain, DomainError, reap::Launcher};
use crate::frame::Owner;
use crate::sys::FUTEX_OWNER_DIED;

/// In a ticket: the fork is over, so the child is there or will never be.
const OVER: u32 = 0x2000_0000;
/// The bits of a ticket. In the life sign of a process the highest bit is set.
const TICKET: u32 = OVER - 1;
/// Milliseconds that a child has before anybody looks for it.
pub(super) const LATE_MS: u64 = 1000;

/// A slot that was prepared for a child.
#[derive(Debug, Clone, Copy)]
pub struct Prepared {
    pub(crate) slot: Owner,
    ticket: u32,
}

impl Prepared {
    /// What the child may find in the life word.
    pub(crate) fn tickets(self) -> [u32; 2] {
        [self.ticket, self.ticket | OVER]
    }
}

/// The ticket in a slot whose child has not come yet.
fn ticket(slot: &Slot) -> Option<u32> {
    // Acquire pairs with the Release in `prepare_child`.
    let word = slot.life.load(Ordering::Acquire);
    let waits = slot.state.load(Ordering::Acquire) == state::FORMING && word & TICKET != 0;
    (waits && word & !(TICKET | OVER) == 0).then_some(word)
}

/// Nobody has made this slot his own.
pub(super) fn is_unclaimed(slot: &Slot) -> bool {
    slot.life.load(Ordering::Acquire) == 0 || ticket(slot).is_some()
}

/// The child that this slot was prepared for is there, or never will be.
fn is_over(slot: &Slot) -> Option<u32> {
    ticket(slot).filter(|t| t & OVER != 0)
}

/// Nobody comes with this ticket: marked as the kernel marks the dead, unless he has come.
fn give_up(slot: &Slot, ticket: u32) -> bool {
    // SeqCst: against the child's exchange, after which it is the child's.
    slot.life.compare_exchange(ticket, FUTEX_OWNER_DIED, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

impl Domain {
    /// A slot for a child of `parent`.
    pub(crate) fn prepare_child(&self, parent: Owner) -> Result<Prepared, DomainError> {
        let slot = self.take_slot(0)?;
        // Not the ticket of another fork; 0 is none.
        let ticket = (self.stamp() % u64::from(TICKET)) as u32 + 1;
        self.slot(slot).parent.store(u32::from(parent), Ordering::Relaxed);
        // Release: who sees the ticket sees whose it is.
        self.slot(slot).life.store(ticket, Ordering::Release);
        Ok(Prepared { slot, ticket })
    }

    /// The fork has returned, in the parent.
    pub(crate) fn fork_is_over(&self, child: Prepared) {
        let slot = self.slot(child.slot);
        if slot.life.load(Ordering::Acquire) == child.ticket {
            over(slot, child.ticket);
        }
    }

    /// There is no child.
    pub(crate) fn fork_failed(&self, child: Prepared) {
        let slot = self.slot(child.slot);
        if child.tickets().into_iter().any(|ticket| give_up(slot, ticket)) {
            self.changed();
        }
    }

    /// A process has ended, so its forks are over: none that was under way then can still succeed, as the kernel makes no child
    /// for a thread that has a fatal signal.
    pub(super) fn parent_has_ended(&self, parent: Owner) {
        for (_, slot) in self.slots() {
            if let Some(ticket) = ticket(slot).filter(|t| t & OVER == 0)
                && slot.parent.load(Ordering::Relaxed) == u32::from(parent)
            {
                over(slot, ticket);
            }
        }
    }

    /// Children are late.
    pub(super) fn waits_for_children(&self) -> bool {
        self.slots().any(|(_, slot)| is_over(slot).is_some())
    }
}

fn over(slot: &Slot, ticket: u32) {
    // Should the slot be another's by now: this says only when somebody looks.
    slot.over_since.store(crate::sys::now_ms(), Ordering::Relaxed);
    // Release: who sees that it is over sees since when. The child may come first.
    let _came = slot.life.compare_exchange(ticket, ticket | OVER, Ordering::Release, Ordering::Relaxed);
}

impl Launcher {
    /// Gives up children that are late, if there is nobody who could be one of them.
    pub(super) fn look_for_children(&self) {
        let now = crate::sys::now_ms();
        let late = |slot: &Slot| now.saturating_sub(slot.over_since.load(Ordering::Relaxed)) >= LATE_MS;
        let slots = self.domain.slots();
        // Which, first: their children have existed since before we look.
        let waiting: Vec<_> =
            slots.filter_map(|(_, s)| Some((s, is_over(s)?))).filter(|(s, _)| late(s)).collect();
        if waiting.is_empty() || now.saturating_sub(self.looked.load(Ordering::Relaxed)) < LATE_MS {
            return;
        }
        self.looked.store(now, Ordering::Relaxed);
        if !someone_may_come(&self.domain) {
            waiting.into_iter().for_each(|(slot, ticket)| {
                give_up(slot, ticket);
            });
        }
    }
}

/// Whether a process may have the domain's segment without a slot of its own. In doubt it may.
fn someone_may_come(domain: &Domain) -> bool {
    let Ok(segment) = rustix::fs::fstat(&domain.file) else { return true };
    let Ok(proc) = std::fs::read_dir("/proc") else { return true };
    let mut known: Vec<u32> = vec![std::process::id()];
    known
        .extend(domain.slots().filter(|(_, s)| !is_unclaimed(s)).map(|(_, s)| s.pid.load(Ordering::Acquire)));
    let numbers = proc.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    for pid in numbers.filter(|pid| !known.contains(pid)) {
        let may = match std::fs::read_to_string(format!("/proc/{pid}/maps")) {
            Ok(maps) => maps.lines().any(|line| {
                line.contains("/memfd:farpage")
                    && line
                        .split_ascii_whitespace()
                        .nth(4)
                        .is_some_and(|inode| inode.parse() == Ok(segment.st_ino))
            }),
            // It is gone; or it is no business of ours, unless it is below us.
            Err(_) => is_below(pid, std::process::id()),
        };
        if may {
            return true;
        }
    }
    false
}

/// Whether a process descends from another. In doubt it does; one that has ended does not.
fn is_below(pid: u32, ancestor: u32) -> bool {
    let mut at = pid;
    while at > 1 {
        if at == ancestor {
            return true;
        }
        let Some((ended, parent)) = super::reap::state_and_parent(at) else {
            // Ended meanwhile: if it is not the one in question, its children have another parent now.
            return at != pid && std::path::Path::new(&format!("/proc/{pid}")).exists();
        };
        if ended && at == pid {
            return false;
        }
        at = parent;
    }
    false
}
