//! Where the DRAM for a page that comes in is found.

use std::sync::atomic::Ordering;

use crate::PAGE_SIZE;
use crate::domain::{Counter, Slot, state};
use crate::space::range::{GRANULE, GRANULE_PAGES};
use crate::space::slots::Run;
use crate::space::{Space, World};
use crate::sys::uffd::Stop;

use super::Hands;
use super::evict::Evicted;
use super::settle::Settled;

/// Milliseconds that a fault waits for DRAM that is on its way (a device is storing it, another process gives it up)
/// before the program goes on above its budget.
const PATIENCE_MS: u64 = 5000;
/// Milliseconds that a fault waits where it can only hope for other processes.
const HOPE_MS: u64 = 1000;
/// Milliseconds that a fault waits where nothing can leave: what was on its way may just have been put back.
const A_LOOK_MS: u64 = 5;
/// Milliseconds for which it is believed that nothing can leave, once a look has shown so.
const STUCK_MS: u64 = 20;

/// How long who makes room waits for those who settle, who may be waiting for a device.
const HOLD_STILL: std::time::Duration = std::time::Duration::from_micros(200);

/// Milliseconds for which somebody else is left to make room.
const OTHERS_ROOM_MS: u64 = 20;

/// Steps in which a stream makes free the frames for what it brings in, at most; then it takes what there is.
const GATHER: u32 = 32;

/// What an attempt to make frames free came to.
enum Reclaimed {
    /// Something has left.
    Some,
    /// All that could leave is in other threads' hands.
    Others,
    /// Nothing can leave.
    Nothing,
}

/// DRAM for pages that come in, already charged.
#[derive(Debug, Clone, Copy)]
pub enum Frames {
    /// Free frames of a staging slot: filled in place and moved.
    Slot(Run),
    /// This many pages (at most a granule's worth) that the kernel will allocate: filled in the caller's buffer and copied.
    Kernel(usize),
}

impl Frames {
    /// How many pages.
    pub fn pages(&self) -> usize {
        match self {
            Frames::Slot(run) => run.len,
            Frames::Kernel(n) => *n,
        }
    }
}

impl Space {
    /// DRAM for up to `want` pages (at least one). Must be called without a granule's lock.
    pub(crate) fn frames(&self, world: &World, want: usize, hands: &mut Hands) -> Frames {
        let mut waiting_since = None;
        let by_move = want > 1 || self.move_cost.is_low();
        // Where no CPU is free for the worker, a stream does itself what the worker would do for it.
        let alone = want >= GRANULE_PAGES && self.faults.follow.is_everywhere();
        let asks = want > 1 && !alone;
        if alone && self.pressure.load(Ordering::Relaxed) {
            // Frames that lie side by side: for each piece, other CPUs would be interrupted to flush their TLBs.
            for _ in 0..GATHER {
                if let Some(run) = self.slots.take_all(want) {
                    return Frames::Slot(run);
                }
                if !matches!(self.reclaim_here(world, hands), Reclaimed::Some) {
                    break;
                }
            }
        }
        loop {
            if by_move && let Some(run) = self.slots.take(want) {
                if asks && self.slots.free_frames() < self.marks().low {
                    self.ask_for_stock();
                }
                return Frames::Slot(run);
            }
            let budget = self.domain.budget();
            let me = self.me();
            let some = want.min(GRANULE_PAGES);
            if self.domain.try_charge(me, some as u64, budget) {
                return Frames::Kernel(some);
            }
            self.pressure.store(true, Ordering::Relaxed);
            if asks {
                self.ask_for_stock();
            }
            if want > 1 && self.domain.try_charge(me, 1, budget) {
                return Frames::Kernel(1);
            }
            if !by_move {
                if self.make_room(world) {
                    continue;
                }
                if let Some(run) = self.slots.take(1) {
                    return Frames::Slot(run);
                }
            }
            let now = crate::sys::now_ms();
            if now < self.stuck_until.load(Ordering::Relaxed) {
                break;
            }
            let patience = match self.reclaim_here(world, hands) {
                Reclaimed::Some => {
                    waiting_since = None;
                    continue;
                }
                Reclaimed::Others => PATIENCE_MS,
                Reclaimed::Nothing if self.ask_others(64, waiting_since.is_some_and(|t| now > t + 10)) => {
                    HOPE_MS
                }
                Reclaimed::Nothing => A_LOOK_MS,
            };
            if now - *waiting_since.get_or_insert(now) >= patience {
                self.stuck_until.store(now + STUCK_MS, Ordering::Relaxed);
                break;
            }
            self.slots.wait_for_free(std::time::Duration::from_micros(200));
        }
        // There is nothing to be had now: the program goes on, above the budget, and the worker makes up for it.
        self.domain.force_charge(self.me(), 1);
        self.count(Counter::OverBudget, 1);
        self.wake_worker();
        Frames::Kernel(1)
    }

    /// Streams and fills use up frames faster than one thread can make them free: the worker builds up a stock. Single
    /// pages are better made room for by the handler itself: on another CPU the worker would make every page that is
    /// moved meanwhile cost an interrupt there, to flush its TLB (15-30 µs on a virtual machine).
    fn ask_for_stock(&self) {
        self.stock_wanted.store(true, Ordering::Relaxed);
        self.wake_worker();
    }

    /// Makes room for the next few hundred single pages. Those are copied in: a copy flushes no TLB, where each page that is
    /// moved has the other CPUs of the program interrupted, and waits for them. To move pages out costs that for every
    /// run of pages, so it is done for many granules at a time, and in a moment in which, if possible, nobody else of
    /// the program runs: the threads that fault wait for this, and the worker holds still; a CPU that idles needs no flush.
    /// What is settled meanwhile goes to the kernel the next time. False: there was nothing to give to the kernel.
    fn make_room(&self, world: &World) -> bool {
        let began = crate::sys::now_ms();
        let alone = loop {
            // As a lock that one tries; nobody takes it shared.
            let alone = self.making_room.try_write_for(std::time::Duration::ZERO);
            if self.domain.charged() < self.domain.budget() {
                return true;
            }
            if let Some(alone) = alone {
                break alone;
            }
            // Not for ever: who makes room may be waiting for a fault of his own, which is then ours to resolve.
            if crate::sys::now_ms() > began + OTHERS_ROOM_MS {
                return false;
            }
            self.slots.wait_for_free(std::time::Duration::from_millis(OTHERS_ROOM_MS / 4));
        };
        let quiet = self.quiet.try_write_for(HOLD_STILL);
        let given = self.slots.give_up();
        self.domain.uncharge(self.me(), given);
        let marks = self.marks();
        while self.slots.staged_pages() < marks.staged + marks.burst {
            match self.evict_oldest(world) {
                Evicted::Pages(_) => {}
                Evicted::Later | Evicted::Nothing => break,
            }
        }
        drop(quiet);
        drop(alone);
        self.slots.say_freed();
        self.settle_wanted.store(true, Ordering::Relaxed);
        self.wake_worker();
        given > 0
    }

    /// Makes some frames free at once.
    fn reclaim_here(&self, world: &World, hands: &mut Hands) -> Reclaimed {
        // What has just been evicted gets its second chance.
        if self.slots.staged_pages() < self.marks().staged
            && matches!(self.evict_oldest(world), Evicted::Pages(_))
        {
            return Reclaimed::Some;
        }
        if let Some(settled) = self.settle_next(world, hands) {
            if settled != Settled::Full || self.slots.free_frames() > 0 {
                return Reclaimed::Some;
            }
            if self.drop_copies(world, 64) > 0 {
                return Reclaimed::Some;
            }
            self.all_full();
            return Reclaimed::Nothing;
        }
        match self.evict_oldest(world) {
            Evicted::Pages(_) => Reclaimed::Some,
            Evicted::Nothing if self.slots.settling() == 0 => Reclaimed::Nothing,
            Evicted::Nothing | Evicted::Later => Reclaimed::Others,
        }
    }

    /// No device takes a page any more. Said once: it may come and go thousands of times.
    pub(crate) fn all_full(&self) {
        self.full.store(true, Ordering::Relaxed);
        if !self.said_full.swap(true, Ordering::Relaxed) {
            crate::sys::say(
                "all devices are full: the program goes on above its DRAM budget (give it a larger --device or more --dram)",
            );
        }
    }

    /// Asks others of the tree for `pages`: the one whose memory has lain longest, or, if `all` (it had nothing to give),
    /// everyone. False: nobody else has anything. (Who has died and was not seen to yet has something.)
    pub(crate) fn ask_others(&self, pages: u32, all: bool) -> bool {
        let me = self.me();
        let others =
            || self.domain.slots().filter(move |(o, s)| *o != me && s.charge.load(Ordering::Relaxed) > 0);
        let alive = |s: &Slot| s.state.load(Ordering::Acquire) == state::LIVE && !s.is_dead();
        let oldest = others()
            .filter(|(_, s)| alive(s))
            .min_by_key(|(_, s)| s.oldest.load(Ordering::Relaxed))
            .map(|(o, _)| o);
        for (_, slot) in others().filter(|&(o, s)| (all && alive(s)) || Some(o) == oldest) {
            slot.wanted.fetch_max(pages, Ordering::SeqCst);
            slot.work.fetch_add(1, Ordering::SeqCst);
            crate::sys::futex_wake(&slot.work, 1);
        }
        others().next().is_some()
    }

    /// Puts pages in place at `dst`: the first `n` of `frames`, filled (in the slot, or in `hands`). The rest is
    /// returned to where it came from. Under the granule's lock. Returns how many are in place now, and why not all.
    pub(crate) fn install(
        &self,
        world: &World,
        frames: Frames,
        n: usize,
        dst: usize,
        hands: &Hands,
    ) -> (usize, Option<Stop>) {
        match frames {
            Frames::Kernel(charged) => {
                let src = hands.pages.as_ptr() as usize;
                let (done, stop) = if n == 0 { (0, None) } else { world.uffd.copy(dst, src, n * PAGE_SIZE) };
                let done = done / PAGE_SIZE;
                self.domain.uncharge(self.me(), (charged - done) as u64);
                (done, stop)
            }
            Frames::Slot(run) => {
                let src = self.slots.addr(run.slot, run.first);
                let (mut done, mut stop) = self.install_run(world, dst, src, n);
                if stop == Some(Stop::Gone) && n - done > 1 {
                    // A boundary of mappings lies in between, most probably where a granule ends: what comes before it, or
                    // else one page. The rest is the next call's.
                    let (at, src) = (dst + done * PAGE_SIZE, src + done * PAGE_SIZE);
                    let before = (GRANULE - at % GRANULE) / PAGE_SIZE;
                    let mut some = self.install_run(world, at, src, before.min(n - done));
                    if some == (0, Some(Stop::Gone)) {
                        some = self.install_run(world, at, src, 1);
                    }
                    done += some.0;
                    stop = some.1.or(stop);
                }
                self.slots.used(run, done);
                (done, stop)
            }
        }
    }

    /// Moves filled frames from `src` to `dst`, within one mapping each.
    fn install_run(&self, world: &World, dst: usize, src: usize, n: usize) -> (usize, Option<Stop>) {
        if n == 0 {
            return (0, None);
        }
        let go = || world.move_pages(&world.uffd, dst, src, n * PAGE_SIZE, false);
        let (done, stop) = if n == 1 { self.move_cost.of(go) } else { go() };
        if done == n * PAGE_SIZE || !matches!(stop, Some(Stop::Invalid | Stop::Busy)) {
            return (done / PAGE_SIZE, stop);
        }
        // A mapping that MOVE does not take (read-only, locked, executable): COPY does.
        let (copied, stop) = world.uffd.copy(dst + done, src + done, n * PAGE_SIZE - done);
        if copied > 0 {
            crate::sys::drop_pages(src + done, copied);
        }
        ((done + copied) / PAGE_SIZE, stop)
    }
}
