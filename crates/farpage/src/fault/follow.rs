//! The handlers' places: on the CPUs of the threads that fault.
//!
//! A handler that sleeps on another CPU has to be woken by an interrupt, and has to wake the faulting thread by
//! another: 75-230 µs on a virtual machine. On the same CPU the kernel just switches: 9-12 µs. Three things are needed:
//!
//! * A handler is bound to each CPU where faults come from. All of them are told of every fault, but the one on the CPU of
//!   the thread that faults, which has just become free, is the first to run.
//! * The thread it wakes must not be moved to another, idle CPU, which is what the scheduler does as long as the waker
//!   keeps this one busy. A CPU that runs nothing but `SCHED_IDLE` threads counts as idle, though, so a handler of
//!   that policy lets the thread stay where it was (measured: 9.8 µs instead of 116).
//! * No more handlers listen than there are CPUs with faults: one that has nothing to do would be woken all the same.
//!
//! `SCHED_IDLE` starves where the CPU has other work, so it is on only while faults come fast and the handler is seen
//! to get its turn at once; the reclaim worker looks every few milliseconds and takes it back.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::space::Space;

/// Handlers at most.
pub(crate) const HANDLERS: usize = 4;
/// How often the worker looks, while faults come.
pub(crate) const TICK: std::time::Duration = std::time::Duration::from_millis(4);
/// Ticks without a fault until it stops looking.
const QUIET: u32 = 12;
/// Faults in a tick from which on a thread is worth a handler on its CPU, and `SCHED_IDLE`.
const FAST: u64 = 16;
/// Faults until it is looked again where a thread is. The scheduler moves it every few milliseconds, to even out the load,
/// and on the wrong CPU a fault takes five times as long; to look takes 3 µs.
const RECHECK: u64 = 12;
/// Threads whose CPU is remembered, by number.
const THREADS: usize = 64;
const NOWHERE: u32 = u32::MAX;
/// In place of its number: a handler that has been started and has not said it yet.
const STARTING: u32 = u32::MAX;

struct Handler {
    tid: AtomicU32,
    cpu: AtomicU32,
    idle_policy: AtomicBool,
    /// Nanoseconds it waited for a CPU, as of the last look.
    delay: AtomicU64,
    /// Nanoseconds that it has spent waking threads, which run in its place, on its CPU.
    waking: AtomicU64,
    /// The same, as of the last look.
    waking_seen: AtomicU64,
}

/// Where a thread was seen, until which fault (of all) that is believed, and how often it faulted, now and at the last
/// look.
struct Thread {
    tid: AtomicU32,
    cpu: AtomicU32,
    until: AtomicU64,
    faults: AtomicU64,
    seen: AtomicU64,
}

/// Where the handlers are. All of it is hints: nothing but speed depends on it, so everything is Relaxed.
pub(crate) struct Follow {
    handlers: [Handler; HANDLERS],
    threads: [Thread; THREADS],
    worker: AtomicU32,
    /// Who faulted last.
    last: AtomicU32,
    /// Handlers that listen: the first so many. The others sleep on this.
    active: AtomicU32,
    /// Ticks since the last fault; the worker stops looking after some.
    quiet: AtomicU32,
}

impl Follow {
    pub fn new() -> Self {
        let handler = || Handler {
            tid: AtomicU32::new(0),
            cpu: AtomicU32::new(NOWHERE),
            idle_policy: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            waking: AtomicU64::new(0),
            waking_seen: AtomicU64::new(0),
        };
        let thread = || Thread {
            tid: AtomicU32::new(0),
            cpu: AtomicU32::new(0),
            until: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        };
        Self {
            handlers: std::array::from_fn(|_| handler()),
            threads: std::array::from_fn(|_| thread()),
            worker: AtomicU32::new(0),
            last: AtomicU32::new(0),
            active: AtomicU32::new(1),
            quiet: AtomicU32::new(100),
        }
    }

    /// In a forked child: no handler is there yet.
    pub fn reset(&self) {
        for h in &self.handlers {
            h.tid.store(0, Ordering::Relaxed);
            h.cpu.store(NOWHERE, Ordering::Relaxed);
            h.idle_policy.store(false, Ordering::Relaxed);
        }
        self.threads.iter().for_each(|t| t.tid.store(0, Ordering::Relaxed));
        self.active.store(1, Ordering::Relaxed);
        self.worker.store(0, Ordering::Relaxed);
    }

    /// Handler `index` is the calling thread.
    pub fn started(&self, index: usize) {
        self.handlers[index].tid.store(crate::sys::gettid(), Ordering::Relaxed);
    }

    /// Handler `index` sleeps here while it is not needed. How long it may then listen before it asks again; for ever
    /// if `None`.
    pub fn turn(&self, index: usize) -> Option<std::time::Duration> {
        if index == 0 {
            return None;
        }
        loop {
            let active = self.active.load(Ordering::Relaxed);
            if index < active as usize {
                return Some(5 * TICK);
            }
            crate::sys::futex_wait(&self.active, active, None);
        }
    }

    /// A fault of thread `tid` reached handler `index`, who runs this.
    pub fn fault(&self, space: &Space, index: usize, tid: u32) {
        let n = space.faults.handled.fetch_add(1, Ordering::Relaxed);
        if self.quiet.load(Ordering::Relaxed) >= QUIET {
            self.quiet.store(0, Ordering::Relaxed);
            space.wake_worker();
        }
        let Some(cpu) = self.cpu_of(tid, n) else { return };
        // The only handler follows a thread at once; where several threads fault, the worker places the handlers.
        let alone = self.last.swap(tid, Ordering::Relaxed) == tid && self.active.load(Ordering::Relaxed) == 1;
        let here = &self.handlers[index].cpu;
        if alone && here.load(Ordering::Relaxed) != cpu {
            here.store(cpu, Ordering::Relaxed);
            crate::sys::bind(0, cpu);
            self.move_worker();
        }
    }

    /// Handler `index` has woken a thread, which took so many nanoseconds.
    pub fn woke(&self, index: usize, ns: u64) {
        self.handlers[index].waking.fetch_add(ns, Ordering::Relaxed);
    }

    /// The worker keeps off the handlers' CPUs: it would be woken just there, where nothing but a `SCHED_IDLE` thread
    /// runs, and faults would wait for milliseconds.
    fn move_worker(&self) {
        let active = (self.active.load(Ordering::Relaxed) as usize).min(HANDLERS);
        let cpus: Vec<u32> = self.handlers[..active]
            .iter()
            .map(|h| h.cpu.load(Ordering::Relaxed))
            .filter(|&c| c != NOWHERE)
            .collect();
        let worker = self.worker.load(Ordering::Relaxed);
        if worker != 0 {
            crate::sys::keep_off(worker, &cpus);
        }
    }

    /// The reclaim worker is the calling thread.
    pub fn worker_started(&self) {
        self.worker.store(crate::sys::gettid(), Ordering::Relaxed);
    }

    /// Where the thread is. To look costs a read of /proc, so that is done only now and then.
    fn cpu_of(&self, tid: u32, n: u64) -> Option<u32> {
        let t = &self.threads[tid as usize % THREADS];
        let known = t.tid.load(Ordering::Relaxed) == tid;
        t.faults.fetch_add(1, Ordering::Relaxed);
        if known && n < t.until.load(Ordering::Relaxed) {
            return Some(t.cpu.load(Ordering::Relaxed));
        }
        let cpu = crate::sys::cpu_of(tid)?;
        let stays = known && t.cpu.load(Ordering::Relaxed) == cpu;
        t.tid.store(tid, Ordering::Relaxed);
        t.cpu.store(cpu, Ordering::Relaxed);
        t.until.store(n + if stays { RECHECK } else { RECHECK / 2 }, Ordering::Relaxed);
        Some(cpu)
    }

    /// Whether the worker should look again soon.
    pub fn active(&self) -> bool {
        self.quiet.load(Ordering::Relaxed) < QUIET
    }

    /// A look, every [`TICK`] while faults come, by the worker.
    pub fn tick(&self, space: &Space) {
        let mut busy: Vec<(u64, u32)> = Vec::new();
        let mut total = 0;
        for t in &self.threads {
            let now = t.faults.load(Ordering::Relaxed);
            let new = now - t.seen.swap(now, Ordering::Relaxed);
            total += new;
            let cpu = t.cpu.load(Ordering::Relaxed);
            match busy.iter_mut().find(|b| b.1 == cpu) {
                Some(b) => b.0 += new,
                None if new >= FAST => busy.push((new, cpu)),
                None => {}
            }
        }
        if total == 0 {
            self.quiet.fetch_add(1, Ordering::Relaxed);
        } else {
            self.quiet.store(0, Ordering::Relaxed);
        }
        busy.sort_unstable_by(|a, b| b.cmp(a));
        self.place(space, &busy);
        for h in &self.handlers {
            let tid = h.tid.load(Ordering::Relaxed);
            if tid == 0 || tid == STARTING {
                continue;
            }
            let delay = crate::sys::run_delay_ns(tid).unwrap_or(0);
            let waited = delay.saturating_sub(h.delay.swap(delay, Ordering::Relaxed));
            // A thread that it wakes takes its place at once, and no fault waits meanwhile.
            let waking = h.waking.load(Ordering::Relaxed);
            let harmless = waking - h.waking_seen.swap(waking, Ordering::Relaxed);
            let waited = waited.saturating_sub(harmless);
            let served = waited < TICK.as_nanos() as u64 / 4;
            let want = total >= FAST && served;
            if h.idle_policy.swap(want, Ordering::Relaxed) != want {
                crate::sys::set_idle_policy(tid, want);
            }
        }
    }

    /// One handler for each busy CPU; one that is on such a CPU already stays.
    fn place(&self, space: &Space, busy: &[(u64, u32)]) {
        // With raw mapping changes about, one after the other: what one handler resolves must not overtake what
        // another has been told.
        let most = if space.faults.raw_changes() { 1 } else { HANDLERS };
        let mut want = busy.len().clamp(1, most);
        for index in 1..want {
            let tid = &self.handlers[index].tid;
            if tid.compare_exchange(0, STARTING, Ordering::Relaxed, Ordering::Relaxed).is_ok()
                && !space.start_handler(index)
            {
                tid.store(0, Ordering::Relaxed);
                want = index;
                break;
            }
        }
        let mut moved = false;
        if want > 1 {
            let mut cpus: Vec<u32> = busy[..want].iter().map(|b| b.1).collect();
            let mut free = Vec::new();
            for h in &self.handlers[..want] {
                match cpus.iter().position(|&c| c == h.cpu.load(Ordering::Relaxed)) {
                    Some(i) => drop(cpus.swap_remove(i)),
                    None => free.push(h),
                }
            }
            for (h, cpu) in free.into_iter().zip(cpus) {
                let tid = h.tid.load(Ordering::Relaxed);
                // One that has just been started is placed at the next look.
                if tid != STARTING {
                    h.cpu.store(cpu, Ordering::Relaxed);
                    crate::sys::bind(tid, cpu);
                    moved = true;
                }
            }
        }
        let before = self.active.swap(want as u32, Ordering::Relaxed);
        if before != want as u32 || moved {
            self.move_worker();
        }
        if before < want as u32 {
            crate::sys::futex_wake(&self.active, i32::MAX);
        }
    }
}
