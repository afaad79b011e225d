//! What a program asks for its pages: out of DRAM now, or in before they are touched.

use std::sync::atomic::Ordering;

use super::range::{GRANULE, STRETCH};
use super::{Space, World};

/// Stretches that wait to be brought in, at most.
const AHEAD: usize = 512;

impl Space {
    /// `MADV_PAGEOUT` (and, without `settle`, `MADV_COLD`): these pages leave DRAM now.
    #[doc(hidden)]
    pub fn page_out(&self, start: usize, end: usize, settle: bool) {
        let granules: Vec<usize> = (start / GRANULE * GRANULE..end).step_by(GRANULE).take(1 << 16).collect();
        self.leaving.fetch_add(granules.len() as u32, Ordering::SeqCst);
        self.outgoing.lock().extend(granules.iter().map(|&g| (g.max(start), settle)));
        self.wake_worker();
        if settle {
            // The caller expects it to have happened; the worker does it, on its own stack.
            loop {
                let left = self.leaving.load(Ordering::SeqCst);
                if left == 0 {
                    break;
                }
                crate::sys::futex_wait(&self.leaving, left, None);
            }
        }
    }

    /// The worker's part of [`Space::page_out`]: one granule. False: none was asked for.
    pub(crate) fn page_out_next(&self, world: &World, hands: &mut crate::reclaim::Hands) -> bool {
        let Some((addr, settle)) = self.outgoing.lock().pop_front() else { return false };
        if let Some(found) = world.ranges.granule(addr) {
            self.push_out(world, &found, settle, hands);
        }
        self.leaving.fetch_sub(1, Ordering::SeqCst);
        crate::sys::futex_wake(&self.leaving, i32::MAX);
        true
    }

    /// `MADV_WILLNEED`: the worker brings these pages in before they are asked for, unless it is behind by far.
    #[doc(hidden)]
    pub fn will_need(&self, start: usize, end: usize) {
        let mut ahead = self.ahead.lock();
        let stretch = STRETCH * GRANULE;
        let room = AHEAD.saturating_sub(ahead.len());
        ahead.extend((start..end).step_by(stretch).take(room).map(|s| (s, (s + stretch).min(end))));
        drop(ahead);
        self.wake_worker();
    }
}
