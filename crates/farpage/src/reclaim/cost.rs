//! What it costs to move one page, measured as it happens.
//!
//! A page that is moved is unmapped from its slot, so the CPUs on which the program runs flush their TLBs. If that is this
//! CPU alone it takes nothing; others are interrupted and waited for, which on a virtual machine takes 6 to 25 µs, on
//! bare metal one or two. To copy a page instead takes a microsecond more and flushes nothing.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Nanoseconds from which on a page is rather copied than moved.
const DEAR: u64 = 5000;
/// Every so many single pages one is moved although that is dear, to see whether it still is.
const PROBE: u32 = 128;
/// Of so many moves one is measured.
const SAMPLE: u32 = 8;

/// The recent cost of moving one page. Only for speed, so everything is Relaxed.
#[derive(Default)]
pub(crate) struct MoveCost {
    /// Nanoseconds, a moving average.
    ns: AtomicU64,
    turn: AtomicU32,
}

impl MoveCost {
    /// Whether the next single page should be moved rather than copied.
    pub fn is_low(&self) -> bool {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.ns.load(Ordering::Relaxed) < DEAR || turn.is_multiple_of(PROBE)
    }

    /// Runs `f`, which moves one page, and from time to time measures it.
    pub fn of<R>(&self, f: impl FnOnce() -> R) -> R {
        let ns = self.ns.load(Ordering::Relaxed);
        if ns < DEAR && !self.turn.load(Ordering::Relaxed).is_multiple_of(SAMPLE) {
            return f();
        }
        let before = crate::sys::now_ns();
        let result = f();
        // One that was interrupted by something else counts as dear, not as many of them.
        let took = (crate::sys::now_ns() - before).min(4 * DEAR);
        self.ns.store((7 * ns + took) / 8, Ordering::Relaxed);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dear_is_avoided_and_tried_again() {
        let cost = MoveCost::default();
        assert!((0..1000).all(|_| cost.is_low()));
        cost.ns.store(20 * DEAR, Ordering::Relaxed);
        let tries = (0..1000).filter(|_| cost.is_low()).count() as u32;
        assert!((1000 / PROBE..=1000 / PROBE + 1).contains(&tries));
        // Each try is measured then, and a few cheap ones are believed.
        for _ in 0..40 {
            cost.of(|| ());
        }
        assert!((0..100).all(|_| cost.is_low()));
    }
}
