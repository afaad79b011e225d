//! Buffers that stay where they are while a system call writes into them.
//!
//! O_DIRECT reads on file systems that do not pin (NFS, 9p, CIFS, Ceph) write to the pages of the buffer by plain references,
//! which `UFFDIO_MOVE` does not see: a page that left the program in the middle would be stored without what is written to
//! it later. So the buffer is held for the call, and nothing of it is evicted.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use super::Space;
use crate::PAGE_SIZE;
use crate::domain::Counter;
use crate::sys::point::point;

/// Calls that hold a buffer each; with more at once everything is held.
const HOLDS: usize = 32;
/// An eviction takes about as long.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_micros(100);
/// In place of an address: taken, the address is still to come.
const TAKEN: usize = 1;

/// What is held. Nothing here is a lock: a program's thread must not own anything that a handler waits for, because
/// its stack may be managed memory.
pub(crate) struct Holds {
    /// First byte and end; 0 = free.
    held: [(AtomicUsize, AtomicUsize); HOLDS],
    /// Calls beyond these.
    more: AtomicU32,
    /// Evictions that are under way.
    moving: AtomicU32,
}

impl Holds {
    pub fn new() -> Self {
        Self {
            held: [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; HOLDS],
            more: AtomicU32::new(0),
            moving: AtomicU32::new(0),
        }
    }

    /// In a forked child: the calls are its parent's, and so are the evictions.
    pub fn reset(&self) {
        self.held.iter().for_each(|h| h.0.store(0, Ordering::SeqCst));
        self.more.store(0, Ordering::SeqCst);
        self.moving.store(0, Ordering::SeqCst);
    }

    fn take(&self, start: usize, end: usize) -> Option<usize> {
        for (i, (s, e)) in self.held.iter().enumerate() {
            if s.compare_exchange(0, TAKEN, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                e.store(end, Ordering::SeqCst);
                s.store(start.max(TAKEN + 1), Ordering::SeqCst);
                return Some(i);
            }
        }
        self.more.fetch_add(1, Ordering::SeqCst);
        None
    }

    fn give_back(&self, index: Option<usize>) {
        match index {
            Some(i) => self.held[i].0.store(0, Ordering::SeqCst),
            None => drop(self.more.fetch_sub(1, Ordering::SeqCst)),
        }
    }

    /// Whether any of `[start, end)` is held. For who has said that he evicts.
    fn covers(&self, start: usize, end: usize) -> bool {
        self.more.load(Ordering::SeqCst) != 0
            || self.held.iter().any(|(s, e)| {
                let first = s.load(Ordering::SeqCst);
                first > TAKEN && first < end && start < e.load(Ordering::SeqCst)
            })
    }
}

/// A buffer is held while this lives.
pub struct Hold<'a> {
    space: &'a Space,
    index: Option<usize>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.space.holds.give_back(self.index);
    }
}

/// An eviction is under way while this lives.
pub(crate) struct Moving<'a>(&'a Holds);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        // Release (of SeqCst): whoever waits in `hold` sees what has moved.
        self.0.moving.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Space {
    /// Whether calls may be under way that write to this process's pages by plain references: then O_DIRECT buffers
    /// have to be held.
    #[doc(hidden)]
    pub fn must_hold(&self) -> bool {
        !self.domain.may_recycle(self.me())
    }

    /// From now on nothing of `[start, end)` leaves DRAM; what is away may come back.
    #[doc(hidden)]
    pub fn hold(&self, start: usize, end: usize) -> Hold<'_> {
        let hold = Hold { space: self, index: self.holds.take(start, end) };
        self.wait_for_moves();
        hold
    }

    /// Returns when no page is being moved out by anyone who has not seen what the caller holds or has pinned.
    pub(crate) fn wait_for_moves(&self) {
        // With the fence in `begin_move`: either an eviction sees the hold, or we see the eviction.
        fence(Ordering::SeqCst);
        loop {
            point();
            let moving = self.holds.moving.load(Ordering::SeqCst);
            if moving == 0 {
                break;
            }
            // Asleep, not spinning: who evicts may be of a lower priority than we are, on this CPU.
            crate::sys::futex_wait(&self.holds.moving, moving, Some(LOOK_AGAIN));
        }
    }

    /// Says that pages are about to be moved out.
    pub(crate) fn begin_move(&self) -> Moving<'_> {
        point();
        self.holds.moving.fetch_add(1, Ordering::SeqCst);
        point();
        fence(Ordering::SeqCst);
        Moving(&self.holds)
    }

    /// Whether any of `[start, end)` is held, for a look.
    pub(crate) fn holds_any(&self, start: usize, end: usize) -> bool {
        self.holds.covers(start, end)
    }

    /// Whether any of `[start, end)` must stay, and counts it. Between [`Space::begin_move`] and the move.
    pub(crate) fn is_held(&self, start: usize, end: usize) -> bool {
        let held = self.holds.covers(start, end);
        if held {
            self.count(Counter::HeldSkips, ((end - start) / PAGE_SIZE) as u64);
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_covered_until_it_is_given_back() {
        let holds = Holds::new();
        let (a, b) = (0x1000_0000, 0x1000_4000);
        assert!(!holds.covers(0, usize::MAX));
        let one = holds.take(a, b);
        assert!(holds.covers(a - 0x1000, a + 1) && holds.covers(b - 1, b + 0x1000));
        assert!(!holds.covers(a - 0x1000, a) && !holds.covers(b, b + 0x1000));
        let all: Vec<_> = (0..HOLDS).map(|_| holds.take(a, b)).collect();
        assert!(all[HOLDS - 1].is_none() && holds.covers(0, 1), "one too many holds everything");
        all.into_iter().for_each(|h| holds.give_back(h));
        assert!(!holds.covers(0, 1) && holds.covers(a, a + 1));
        holds.give_back(one);
        assert!(!holds.covers(0, usize::MAX));
    }
}
