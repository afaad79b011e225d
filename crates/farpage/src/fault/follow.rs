//! The handlers' places: on the CPUs of the threads that fault.
//!
//! A handler that sleeps on another CPU has to be woken by an interrupt, and has to wake the faulting thread by
//! another: 75-230 µs on a virtual machine. On the same CPU the kernel just switches: 9-12 µs. Four things are needed:
//!
//! * A handler is bound to each CPU where faults come from. All of them are told of every fault, but the one on the CPU of
//!   the thread that faults, which has just become free, is the first to run.
//! * The thread it wakes must not be moved to another, idle CPU, which is what the scheduler does as long as the waker
//!   keeps this one busy. A CPU that runs nothing but `SCHED_IDLE` threads counts as idle, though, so a handler of
//!   that policy lets the thread stay where it was (measured: 9.8 µs instead of 116).
//! * Threads that fault on the same CPU, all of which do little but wait for its handler, are no load that the scheduler would
//!   spread. Another handler then listens on a CPU that is free: whom it wakes comes there.
//! * No more handlers listen than there are CPUs with faults: one that has nothing to do would be woken all the same.
//!
//! `SCHED_IDLE` starves where the CPU has other work, so it is on only while faults come fast and the handler is seen
//! to get its turn at once; the reclaim worker looks from time to time and takes it back.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::space::Space;

/// Handlers at most.
pub(crate) const HANDLERS: usize = 4;
/// How often the worker looks (a *tick*), while faults come: the more seldom, the longer nothing changes. On a machine with two CPUs its
/// waking up moves the faulting thread to the other one, which costs a tenth of the speed at one tick every 4 ms.
const FIRST_TICK_MS: u64 = 4;
const LAST_TICK_MS: u64 = 64;
/// Ticks without a fault until it stops looking.
const QUIET: u32 = 8;
/// For how long a handler that starved is not `SCHED_IDLE` again: at first, and at most, for it doubles each time (and shrinks while all is well).
const FIRST_PENANCE_MS: u64 = 100;
const LAST_PENANCE_MS: u64 = 10_000;
/// Faults in 4 ms from which on a thread is worth a handler on its CPU, and `SCHED_IDLE`.
const FAST: u64 = 16;
/// Faults until it is looked again where a thread is, come what may; see [`Idler`] for what comes first.
const RECHECK: u64 = 256;
/// Nanoseconds that it takes to resolve a fault for one page, at most.
const USUAL: u64 = 20_000;
/// Nanoseconds in which a thread that was woken on our CPU has hardly run and faulted again.
const SHORT: u64 = 30_000;
/// The most times that a handler finds nothing to do and does not look where the thread is that it woke.
const MOST_SKIPPED: u32 = 12;
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
    /// It starved: when (in milliseconds) it may be `SCHED_IDLE` again, and for how long it may not the next time.
    penance_until: AtomicU64,
    penance: AtomicU64,
}

/// Where a thread was seen, until which of its faults that is believed, and how often it faulted, now and at the last tick.
struct Thread {
    tid: AtomicU32,
    cpu: AtomicU32,
    until: AtomicU64,
    faults: AtomicU64,
    seen: AtomicU64,
    /// Of these, what its faults counted for more than one each, since the last tick: they brought in much.
    long: AtomicU64,
}

/// What a handler knows when it finds nothing to do. The scheduler moves a busy thread to an idle CPU every few milliseconds,
/// and on the wrong CPU each fault takes five times as long; but to look where a thread is takes 12 µs, as long as a
/// fault. A thread that is woken on the handler's CPU runs there at once, and when the handler's turn comes again the
/// next fault is there. So a handler that comes back from waking one quickly, and has nothing to do, has woken it elsewhere.
#[derive(Default)]
pub(crate) struct Idler {
    /// Who was woken last, and whether that took a short time only.
    woken: Option<(u32, bool)>,
    /// How often not to look yet: the thread may just have gone to sleep.
    skip: u32,
    skipped: u32,
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
    /// Milliseconds until the next tick, and when the last one was.
    pace: AtomicU64,
    ticked: AtomicU64,
    /// CPUs that the program may use, as of the last tick.
    cpus: AtomicU32,
}

/// A CPU on which threads fault fast.
struct Busy {
    cpu: u32,
    /// Faults since the last tick, and what of that long ones counted for.
    faults: u64,
    long: u64,
    threads: u32,
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
            penance_until: AtomicU64::new(0),
            penance: AtomicU64::new(FIRST_PENANCE_MS),
        };
        let thread = || Thread {
            tid: AtomicU32::new(0),
            cpu: AtomicU32::new(0),
            until: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            long: AtomicU64::new(0),
        };
        Self {
            handlers: std::array::from_fn(|_| handler()),
            threads: std::array::from_fn(|_| thread()),
            worker: AtomicU32::new(0),
            last: AtomicU32::new(0),
            active: AtomicU32::new(1),
            quiet: AtomicU32::new(QUIET),
            pace: AtomicU64::new(FIRST_TICK_MS),
            ticked: AtomicU64::new(0),
            cpus: AtomicU32::new(u32::MAX),
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
    pub fn turn(&self, space: &Space, index: usize) -> Option<std::time::Duration> {
        if index == 0 {
            return None;
        }
        loop {
            if space.stopping() {
                return Some(std::time::Duration::ZERO);
            }
            let active = self.active.load(Ordering::Relaxed);
            if index < active as usize {
                return Some(std::time::Duration::from_millis(LAST_TICK_MS));
            }
            crate::sys::futex_wait(&self.active, active, None);
        }
    }

    /// A fault of thread `tid` reached handler `index`, who runs this.
    pub fn fault(&self, space: &Space, index: usize, tid: u32) {
        if self.quiet.load(Ordering::Relaxed) >= QUIET {
            // A first tick of the usual length, not one that reaches back to the last fault.
            self.ticked.store(crate::sys::now_ms(), Ordering::Relaxed);
            self.pace.store(FIRST_TICK_MS, Ordering::Relaxed);
            self.quiet.store(0, Ordering::Relaxed);
            space.wake_worker();
        }
        let t = &self.threads[tid as usize % THREADS];
        let n = t.faults.fetch_add(1, Ordering::Relaxed);
        let known = t.tid.load(Ordering::Relaxed) == tid && n < t.until.load(Ordering::Relaxed);
        if known || self.look(space, tid) {
            self.go_there(index, tid);
        }
    }

    /// Whether only one handler listens.
    pub fn is_alone(&self) -> bool {
        self.active.load(Ordering::Relaxed) == 1
    }

    /// Whether each CPU has a handler, so that the worker would take its time from them.
    pub fn is_everywhere(&self) -> bool {
        self.active.load(Ordering::Relaxed) >= self.cpus.load(Ordering::Relaxed)
    }

    /// The handler on the CPU where thread `tid` was last seen, if that is another than `index`.
    pub fn home(&self, index: usize, tid: u32) -> Option<usize> {
        let t = &self.threads[tid as usize % THREADS];
        let cpu = t.cpu.load(Ordering::Relaxed);
        let here = |h: &Handler| h.cpu.load(Ordering::Relaxed) == cpu;
        let mine = &self.handlers[index];
        if t.tid.load(Ordering::Relaxed) != tid || here(mine) || mine.cpu.load(Ordering::Relaxed) == NOWHERE {
            return None;
        }
        let active = (self.active.load(Ordering::Relaxed) as usize).min(HANDLERS);
        self.handlers[..active].iter().position(here)
    }

    /// The only handler follows a thread at once; where several threads fault, the worker places the handlers. Whether
    /// it went.
    fn go_there(&self, index: usize, tid: u32) -> bool {
        let cpu = self.threads[tid as usize % THREADS].cpu.load(Ordering::Relaxed);
        let alone = self.last.swap(tid, Ordering::Relaxed) == tid && self.active.load(Ordering::Relaxed) == 1;
        let here = &self.handlers[index].cpu;
        let go = alone && here.load(Ordering::Relaxed) != cpu;
        if go {
            here.store(cpu, Ordering::Relaxed);
            crate::sys::bind(0, cpu);
            self.move_worker();
        }
        go
    }

    /// To resolve a fault of thread `tid` took so many nanoseconds: one that brought in much counts for more than one, or a
    /// stream would not be worth a handler on its CPU.
    pub fn resolved(&self, tid: u32, ns: u64) {
        let more = ns / USUAL;
        if more > 1 {
            let t = &self.threads[tid as usize % THREADS];
            t.faults.fetch_add(more - 1, Ordering::Relaxed);
            t.long.fetch_add(more - 1, Ordering::Relaxed);
            t.until.fetch_add(more - 1, Ordering::Relaxed);
        }
    }

    /// Handler `index` has woken a thread, which took so many nanoseconds.
    pub fn woke(&self, index: usize, idler: &mut Idler, tid: u32, ns: u64) {
        self.handlers[index].waking.fetch_add(ns, Ordering::Relaxed);
        idler.woken = Some((tid, ns < SHORT));
    }

    /// Handler `index` has nothing to do: is it where the thread is that it has just woken?
    pub fn nothing_to_do(&self, space: &Space, index: usize, idler: &mut Idler) {
        let Some((tid, true)) = idler.woken.take() else { return };
        idler.skipped += 1;
        if idler.skipped <= idler.skip {
            return;
        }
        idler.skipped = 0;
        let moved = self.look(space, tid) && self.go_there(index, tid);
        idler.skip = if moved { 0 } else { (2 * idler.skip + 1).min(MOST_SKIPPED) };
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

    /// Handlers that wait for their turn look whether they are to stop.
    pub fn wake_all(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
        crate::sys::futex_wake(&self.active, i32::MAX);
    }

    /// The reclaim worker is the calling thread.
    pub fn worker_started(&self) {
        self.worker.store(crate::sys::gettid(), Ordering::Relaxed);
    }

    /// Looks where a thread is. False: it has ended.
    fn look(&self, space: &Space, tid: u32) -> bool {
        let t = &self.threads[tid as usize % THREADS];
        let Some(cpu) = crate::sys::cpu_of(tid) else { return false };
        let new = t.tid.swap(tid, Ordering::Relaxed) != tid;
        let moved = t.cpu.swap(cpu, Ordering::Relaxed) != cpu;
        // Where there are several handlers, the worker places them.
        if new || (moved && self.active.load(Ordering::Relaxed) > 1) {
            self.hurry(space);
        }
        t.until.store(t.faults.load(Ordering::Relaxed) + RECHECK, Ordering::Relaxed);
        true
    }

    /// How long until the worker should look again; `None`: no faults come.
    pub fn next_tick(&self) -> Option<std::time::Duration> {
        if self.quiet.load(Ordering::Relaxed) >= QUIET {
            return None;
        }
        let due = self.ticked.load(Ordering::Relaxed) + self.pace.load(Ordering::Relaxed);
        Some(std::time::Duration::from_millis(due.saturating_sub(crate::sys::now_ms())))
    }

    /// Something is not as it was at the last tick: the next one comes soon.
    fn hurry(&self, space: &Space) {
        if self.pace.swap(FIRST_TICK_MS, Ordering::Relaxed) != FIRST_TICK_MS {
            space.wake_worker();
        }
    }

    /// A look at all threads and handlers, by the worker.
    pub fn tick(&self, space: &Space) {
        let now = crate::sys::now_ms();
        let elapsed = now.saturating_sub(self.ticked.swap(now, Ordering::Relaxed)).clamp(1, LAST_TICK_MS);
        let fast = FAST * elapsed.div_ceil(FIRST_TICK_MS);
        let mut busy: Vec<Busy> = Vec::new();
        let mut total = 0;
        for t in &self.threads {
            let faults = t.faults.load(Ordering::Relaxed);
            let new = faults.saturating_sub(t.seen.swap(faults, Ordering::Relaxed));
            total += new;
            let cpu = t.cpu.load(Ordering::Relaxed);
            let (threads, long) = (u32::from(new >= fast), t.long.swap(0, Ordering::Relaxed));
            match busy.iter_mut().find(|b| b.cpu == cpu) {
                Some(b) => {
                    (b.faults, b.long, b.threads) = (b.faults + new, b.long + long, b.threads + threads);
                }
                None if new >= fast => busy.push(Busy { cpu, faults: new, long, threads }),
                None => {}
            }
        }
        if total == 0 {
            self.quiet.fetch_add(1, Ordering::Relaxed);
        } else {
            self.quiet.store(0, Ordering::Relaxed);
        }
        let cpus = crate::sys::cpus_allowed();
        self.cpus.store(cpus, Ordering::Relaxed);
        busy.sort_unstable_by_key(|b| std::cmp::Reverse((b.faults, b.cpu)));
        // Its handler is at work all the time, or nearly. Only with streams: threads that fault for single pages run between
        // their faults, so the scheduler spreads them, and another who is told of each fault costs more than he takes over.
        let full = |b: &Busy| b.threads > 1 && b.long * USUAL >= elapsed * 1_000_000 * 3 / 4;
        let roam = busy.iter().any(full) && busy.len() < cpus as usize;
        let mut changed = self.place(space, &busy, roam);
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
            let starved = waited.saturating_sub(harmless) >= elapsed * 1_000_000 / 4;
            let idle = h.idle_policy.load(Ordering::Relaxed);
            let penance = h.penance.load(Ordering::Relaxed);
            if idle && starved {
                h.penance_until.store(now + penance, Ordering::Relaxed);
                h.penance.store((2 * penance).min(LAST_PENANCE_MS), Ordering::Relaxed);
            } else if idle {
                h.penance.store((penance - penance / 16).max(FIRST_PENANCE_MS), Ordering::Relaxed);
            }
            let want = total >= fast && !starved && now >= h.penance_until.load(Ordering::Relaxed);
            if idle != want {
                h.idle_policy.store(want, Ordering::Relaxed);
                crate::sys::set_idle_policy(tid, want);
                changed = true;
            }
        }
        let pace = if changed { FIRST_TICK_MS } else { 2 * self.pace.load(Ordering::Relaxed) };
        self.pace.store(pace.min(LAST_TICK_MS), Ordering::Relaxed);
    }

    /// One handler for each busy CPU; one that is on such a CPU already stays. If one is to `roam`, another listens on whatever CPU
    /// is free: threads that share a CPU because all they do is wait for one handler are spread only by being
    /// woken elsewhere, for the scheduler sees no load. Whether anything changed.
    fn place(&self, space: &Space, busy: &[Busy], roam: bool) -> bool {
        // With raw mapping changes about, one after the other: what one handler resolves must not overtake what
        // another has been told.
        let most = if space.faults.raw_changes() { 1 } else { HANDLERS };
        let mut want = (busy.len() + usize::from(roam)).clamp(1, most);
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
            let mut cpus: Vec<u32> = busy.iter().take(want).map(|b| b.cpu).collect();
            let taken = cpus.clone();
            let mut free = Vec::new();
            for h in &self.handlers[..want] {
                match cpus.iter().position(|&c| c == h.cpu.load(Ordering::Relaxed)) {
                    Some(i) => drop(cpus.swap_remove(i)),
                    None => free.push(h),
                }
            }
            let mut cpus = cpus.into_iter();
            for h in free {
                let tid = h.tid.load(Ordering::Relaxed);
                let cpu = cpus.next().unwrap_or(NOWHERE);
                // One that has just been started is placed at the next look.
                if tid == STARTING {
                    continue;
                }
                moved |= h.cpu.swap(cpu, Ordering::Relaxed) != cpu;
                if cpu == NOWHERE {
                    // Each time: the others may have moved, and one that was just started is where the worker was.
                    crate::sys::keep_off(tid, &taken);
                } else {
                    crate::sys::bind(tid, cpu);
                }
            }
        }
        let before = self.active.swap(want as u32, Ordering::Relaxed);
        let changed = before != want as u32 || moved;
        if changed {
            self.move_worker();
        }
        if before < want as u32 {
            crate::sys::futex_wake(&self.active, i32::MAX);
        }
        changed
    }
}
