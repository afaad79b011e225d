//! The reclaim worker: keeps room for pages that come in, so that a fault does not have to make it.
//!
//! Room is free frames plus what the budget leaves. While there is plenty the worker sleeps and nothing is
//! evicted. Below the low mark it evicts the oldest granules into staging, and settles what has been staged
//! longest, until there is room up to the high mark and a second-chance queue of the wanted length.

use std::sync::atomic::Ordering;

use super::Hands;
use super::evict::Evicted;
use super::settle::Settled;
use crate::PAGE_SIZE;
use crate::domain::state;
use crate::space::{Space, World};

/// Pages: where the worker starts and stops, how long the second-chance queue is, and how many more leave when room is made
/// for single pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marks {
    pub low: u64,
    pub high: u64,
    pub staged: u64,
    pub burst: u64,
}

impl Space {
    pub(crate) fn marks(&self) -> Marks {
        let budget = self.domain.budget();
        let high = (budget / 32).clamp(64, 2048);
        Marks {
            low: high / 2,
            high,
            staged: (budget / 16).clamp(64, 16384),
            burst: (budget / 64).clamp(64, 1024),
        }
    }

    /// Pages that can come in before anything has to leave.
    pub(crate) fn room(&self) -> u64 {
        self.slots.free_frames() + self.domain.budget().saturating_sub(self.domain.charged())
    }
}

/// Runs the worker until the space is told to stop ([`Space::stop`]). It also holds the space's life sign.
pub fn run(space: &Space) {
    let slot = space.slot();
    // Release: who sees LIVE sees the life sign.
    let live =
        || slot.state.compare_exchange(state::FORMING, state::LIVE, Ordering::Release, Ordering::Relaxed);
    if !crate::sys::take_over_life(&slot.life) || live().is_err() {
        // Killed, which will not take long to reach this thread. If it does not come: nothing here is ours any more.
        std::thread::sleep(std::time::Duration::from_secs(1));
        crate::sys::fatal("this process was taken for dead");
    }
    crate::sys::futex_wake(&slot.state, i32::MAX);
    space.domain.changed();
    space.faults.add_manager(crate::sys::gettid());
    space.faults.follow.worker_started();
    let mut hands = Hands::new();
    let mut refilling = false;
    let tick_if_due = || {
        if space.faults.follow.next_tick().is_some_and(|d| d.is_zero()) {
            space.faults.follow.tick(space);
        }
    };
    while !space.stopping() {
        let seen = slot.work.load(Ordering::SeqCst);
        let mut busy = false;
        space.answer_audit();
        while step(space, &mut hands, &mut refilling) {
            busy = true;
            tick_if_due();
            space.answer_audit();
        }
        tick_if_due();
        if busy {
            continue;
        }
        // SeqCst: pairs with `wake_worker`.
        space.asleep.store(true, Ordering::SeqCst);
        crate::sys::futex_wait(&slot.work, seen, space.faults.follow.next_tick());
        space.asleep.store(false, Ordering::SeqCst);
    }
}

/// Something useful, if there is something. False: sleep. Everything happens inside the world, so that a fork finds no lock
/// of ours held.
fn step(space: &Space, hands: &mut Hands, refilling: &mut bool) -> bool {
    let world = space.world.read();
    if space.page_out_next(&world, hands) || space.next_job(&world, hands) {
        return true;
    }
    let marks = space.marks();
    let wanted = u64::from(space.slot().wanted.swap(0, Ordering::SeqCst));
    let over = space.domain.charged().saturating_sub(space.domain.budget());
    let mine = space.slot().charge.load(Ordering::Relaxed);
    let shrink = wanted.max(over).min(mine);
    if shrink > 0 {
        let given = give_to_kernel(space, &world, hands);
        // The rest in the next steps: somebody may be waiting for the world.
        let left = wanted.saturating_sub(given.unwrap_or(wanted));
        space.slot().wanted.fetch_max(left as u32, Ordering::SeqCst);
        if given.is_some() {
            return true;
        }
    }
    if !space.pressure.load(Ordering::Relaxed) {
        return read_ahead(space, &world, hands);
    }
    let room = space.room();
    if room < marks.low && space.stock_wanted.swap(false, Ordering::Relaxed) {
        *refilling = true;
    } else if room >= marks.high {
        *refilling = false;
    }
    if space.settle_wanted.load(Ordering::Relaxed) {
        if space.slots.staged_pages() > marks.staged && settle_oldest(space, &world, hands) == Some(true) {
            return true;
        }
        space.settle_wanted.store(false, Ordering::Relaxed);
    }
    if *refilling {
        return refill(space, &world, marks, hands) || read_ahead(space, &world, hands);
    }
    if room > 4 * marks.high {
        // Others ended, or the program gave much back: the kernel may fill again.
        space.pressure.store(false, Ordering::Relaxed);
    }
    read_ahead(space, &world, hands)
}

/// Brings in one stretch of what somebody will want next. False: none.
fn read_ahead(space: &Space, world: &World, hands: &mut Hands) -> bool {
    let Some((start, end)) = space.ahead.lock().pop_front() else { return false };
    space.prefetch(world, start, end, hands);
    true
}

/// One step towards the high mark.
fn refill(space: &Space, world: &World, marks: Marks, hands: &mut Hands) -> bool {
    if space.slots.staged_pages() < marks.staged && matches!(space.evict_oldest(world), Evicted::Pages(_)) {
        return true;
    }
    settle_oldest(space, world, hands).unwrap_or(false)
}

/// Settles some of what has been staged longest. `Some(false)`: the devices are full; `None`: nothing is staged.
fn settle_oldest(space: &Space, world: &World, hands: &mut Hands) -> Option<bool> {
    Some(match space.settle_next(world, hands)? {
        Settled::Done | Settled::More => true,
        Settled::Full => {
            // Clean copies of pages in DRAM are the devices' spare room.
            let freed = space.drop_copies(world, 256);
            if freed == 0 {
                space.all_full();
            }
            freed > 0
        }
    })
}

/// One step of freeing DRAM: frames go back to the kernel. How many pages, or `None` if nothing can be freed.
fn give_to_kernel(space: &Space, world: &World, hands: &mut Hands) -> Option<u64> {
    if let Some(run) = space.slots.take(64) {
        crate::sys::drop_pages(space.slots.addr(run.slot, run.first), run.len * PAGE_SIZE);
        space.slots.used(run, run.len);
        space.domain.uncharge(space.me(), run.len as u64);
        return Some(run.len as u64);
    }
    let before = space.domain.charged();
    let done = match settle_oldest(space, world, hands) {
        Some(progress) => progress,
        None => matches!(space.evict_oldest(world), Evicted::Pages(_)),
    };
    done.then(|| before.saturating_sub(space.domain.charged()))
}
