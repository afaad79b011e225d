//! Timing of a phase: threads that warm up, start together and time each access.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{AccessError, Args, Pattern};
use crate::bench::histogram::Histogram;
use crate::bench::proc;

/// Accesses slower than this are taken for faults in the percentiles, in ns.
const FAULT_NS: u64 = 1000;

/// The line that it prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub pattern: Pattern,
    /// By how many threads.
    pub threads: u16,
    /// Accesses timed, all threads together.
    pub accesses: u64,
    /// From the first thread's start to the last one's end.
    pub seconds: f64,
    /// Faults that the kernel counted as major while timed; swap-ins are.
    pub major_faults: u64,
    /// Faults that it counted as minor.
    pub minor_faults: u64,
    /// Accesses that took more than 1 µs, and their percentiles in µs.
    pub slow: Slow,
    /// Anonymous memory of this process that was in DRAM at the end, in bytes.
    pub rss_anon: u64,
    /// CPU used while idle, in ms.
    pub idle_cpu_ms: f64,
}

/// Percentiles of the accesses that took longer than 1 µs; in µs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Slow {
    pub count: u64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// The time from one access's end to the next one's: one reading of the clock an access.
pub(super) struct Clock(Instant);

impl Clock {
    /// Now.
    pub fn start() -> Clock {
        Clock(Instant::now())
    }

    /// Records the time since the last call.
    pub fn lap(&mut self, hist: &mut Histogram) {
        let now = Instant::now();
        hist.record((now - self.0).as_nanos() as u64);
        self.0 = now;
    }
}

/// Runs `work` on all threads and times it.
pub(super) fn timed(
    args: &Args,
    work: impl Fn(u16, &mut Histogram) -> Result<(), AccessError> + Sync,
) -> Result<Phase, AccessError> {
    timed_after(args, |thread, hist, timed| if timed { work(thread, hist) } else { Ok(()) })
}

/// Runs `work` on all threads, first untimed and then timed.
pub(super) fn timed_after(
    args: &Args,
    work: impl Fn(u16, &mut Histogram, bool) -> Result<(), AccessError> + Sync,
) -> Result<Phase, AccessError> {
    let (barrier, work) = (&Barrier::new(usize::from(args.threads) + 1), &work);
    let (before, results) = thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads)
            .map(|thread| {
                scope.spawn(move || {
                    let warm = work(thread, &mut Histogram::new(), false);
                    barrier.wait(); // all are warm: the main thread reads the fault counts
                    barrier.wait();
                    warm?;
                    let mut hist = Histogram::new();
                    let start = Instant::now();
                    work(thread, &mut hist, true)?;
                    Ok((hist, start, Instant::now()))
                })
            })
            .collect();
        barrier.wait();
        let before = proc::faults();
        barrier.wait();
        let results: Vec<_> =
            threads.into_iter().map(|t| t.join().unwrap_or(Err(AccessError::Thread))).collect();
        (before, results)
    });
    let after = proc::faults();
    let results = results.into_iter().collect::<Result<Vec<_>, AccessError>>()?;
    let (mut all, mut slow) = (Histogram::new(), Histogram::new());
    let (mut first, mut last) = (None::<Instant>, None::<Instant>);
    for (hist, start, end) in &results {
        all.merge(hist);
        slow.merge(hist);
        first = Some(first.map_or(*start, |f| f.min(*start)));
        last = Some(last.map_or(*end, |l| l.max(*end)));
    }
    slow.drop_below(FAULT_NS);
    let us = |q| slow.quantile(q) as f64 / 1e3;
    Ok(Phase {
        pattern: args.pattern,
        threads: args.threads,
        accesses: all.count(),
        seconds: first.zip(last).map_or(0.0, |(f, l)| (l - f).as_secs_f64()),
        major_faults: after.major.saturating_sub(before.major),
        minor_faults: after.minor.saturating_sub(before.minor),
        slow: Slow { count: slow.count(), p50: us(0.5), p99: us(0.99), p999: us(0.999), max: us(1.0) },
        rss_anon: proc::rss_anon(std::process::id()).unwrap_or(0),
        idle_cpu_ms: 0.0,
    })
}
