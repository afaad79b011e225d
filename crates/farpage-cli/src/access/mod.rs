//! `farpage access` (hidden): the program whose memory accesses `farpage bench` times. It does one phase
//! and prints one line of JSON. It knows nothing of farpage: the kernel's swap and farpage run the same. With `--inline` its
//! memory is a region of the library instead.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bench::data::{Content, Random, Template, WORDS};
use crate::bench::histogram::Histogram;
use crate::bench::memory::Region;
use crate::bench::proc;
use crate::error::CliError;
use farpage::size::parse_size;
use timing::{Clock, timed, timed_after};
pub use timing::{Phase, Slow};

mod timing;

/// What one run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Writes every page of fresh memory once; `--warm` pages of it untimed.
    Fill,
    /// Reads a word of every page in order.
    Seq,
    /// Reads a word of a random page.
    RandRead,
    /// Adds to a word of a random page.
    RandWrite,
    /// Reads; 95% in a part of `--hot` bytes, the rest anywhere.
    Hot,
    /// Writes one word in every page of fresh memory.
    FirstTouch,
    /// Reads a word of a random page of memory that was just written.
    Resident,
    /// Allocates and frees small blocks.
    Malloc,
    /// Sleeps after having filled the memory, and counts the CPU that is used meanwhile.
    Idle,
}

/// Options of the access program.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[arg(long)]
    pub pattern: Pattern,
    /// Memory to work on.
    #[arg(long, default_value = "512M", value_parser = parse_size)]
    pub size: u64,
    /// How compressible: a ratio or `text`.
    #[arg(long, default_value = "2")]
    pub ratio: Content,
    /// Threads that access at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// Accesses to time, all threads together.
    #[arg(long, default_value_t = 100_000)]
    pub ops: usize,
    /// Accesses before that.
    #[arg(long, default_value_t = 20_000)]
    pub warm: usize,
    /// The part that `hot` prefers.
    #[arg(long, default_value = "64M", value_parser = parse_size)]
    pub hot: u64,
    /// Seed of data and accesses.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Check every Nth page completely at the end (0: none).
    #[arg(long, default_value_t = 16)]
    pub verify: usize,
    /// Work on an inline region of the library, in a domain of its own with `--dram` and `--device`.
    #[arg(long)]
    pub inline: bool,
    /// The budget of that domain.
    #[arg(long, default_value = "128M")]
    pub dram: String,
    /// Its device.
    #[arg(long, default_value = "ram:1G")]
    pub device: String,
    /// Where that domain's counters go at the end, as JSON.
    #[arg(long)]
    pub stats_json: Option<PathBuf>,
    /// Enter this control group first.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// `idle` counts the CPU of all processes below this one (default: its own).
    #[arg(long)]
    pub below: Option<u32>,
    /// How long `idle` sleeps, in ms.
    #[arg(long, default_value_t = 3000)]
    pub sleep_ms: u64,
}

/// Why a phase failed.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The library gives no space.
    #[error(transparent)]
    Space(#[from] farpage::BuildError),
    /// The memory does not hold what was written there.
    #[error("WRONG DATA in page {page}, word {word}: {found:#x}")]
    Wrong {
        /// Which page of the mapping.
        page: usize,
        /// Which word of it.
        word: usize,
        /// What was read.
        found: u64,
    },
    /// Pages hold too few or too many versions.
    #[error("WRONG DATA: {found} writes found, {made} made")]
    Lost {
        /// Sum of the versions.
        found: u64,
        /// Writes done.
        made: u64,
    },
    /// A worker thread ended early.
    #[error("a worker thread failed")]
    Thread,
}

/// Runs one phase and prints its line.
pub fn run(args: Args) -> Result<u8, CliError> {
    let phase = measure(&args).map_err(|e| CliError::Other(e.to_string()))?;
    let line = serde_json::to_string(&phase).map_err(io::Error::from);
    line.and_then(|l| writeln!(io::stdout(), "{l}"))
        .map_err(|e| CliError::Other(format!("cannot print the result: {e}")))?;
    Ok(0)
}

/// Where the memory comes from.
fn space(args: &Args) -> Result<Option<farpage::Running>, AccessError> {
    if !args.inline {
        return Ok(None);
    }
    let domain = farpage::Domain::builder().dram(&args.dram).device(&args.device).build();
    Ok(Some(domain.and_then(|d| Ok(d.start_inline()?))?))
}

fn measure(args: &Args) -> Result<Phase, AccessError> {
    if let Some(dir) = &args.cgroup {
        std::fs::write(dir.join("cgroup.procs"), "0")
            .map_err(|source| AccessError::Io { what: format!("enter {}", dir.display()), source })?;
    }
    let space = space(args)?;
    let space = space.as_ref();
    let phase = match args.pattern {
        Pattern::Malloc => timed(args, |thread, hist| malloc_ops(args, thread, hist)),
        Pattern::FirstTouch => first_touch(args, space),
        _ => paged(args, space),
    }?;
    if let (Some(space), Some(file)) = (space, &args.stats_json) {
        let what = || format!("write {}", file.display());
        serde_json::to_vec(&space.domain.stats())
            .map_err(io::Error::from)
            .and_then(|json| std::fs::write(file, json))
            .map_err(|source| AccessError::Io { what: what(), source })?;
    }
    Ok(phase)
}

fn map(space: Option<&farpage::Running>, bytes: u64) -> Result<Region, AccessError> {
    let region = space.map_or_else(|| Region::new(bytes), |space| Region::in_space(space, bytes));
    region.map_err(|source| AccessError::Io { what: format!("map {bytes} bytes"), source })
}

/// All phases that work on `size` bytes of checked pages.
fn paged(args: &Args, space: Option<&farpage::Running>) -> Result<Phase, AccessError> {
    let region = map(space, args.size)?;
    let work = Work { region, template: Template::new(args.ratio, args.seed), args };
    let pages = work.region.pages();
    let mut writes = 0;
    let phase = match args.pattern {
        Pattern::Fill => {
            let warm = args.warm.min(pages);
            work.fill(0..warm, &mut Histogram::new());
            timed(args, |thread, hist| {
                work.fill(share(warm..pages, args.threads, thread), hist);
                Ok(())
            })?
        }
        Pattern::Idle => {
            work.fill(0..pages, &mut Histogram::new());
            work.ops(0, 0, args.warm, &mut Histogram::new())?;
            idle(args)?
        }
        _ => {
            work.fill(0..pages, &mut Histogram::new());
            // Each thread warms up with accesses of its own; only what follows is timed.
            timed_after(args, |thread, hist, timed| {
                let count = if timed { args.ops } else { args.warm };
                let part = share(0..count, args.threads, thread).len();
                // A sequential reader goes on where it ended warming up.
                let warmed = if timed { share(0..args.warm, args.threads, thread).len() } else { 0 };
                let first = share(0..pages, args.threads, thread).start + warmed;
                work.ops(usize::from(thread) * 2 + usize::from(timed), first, part, hist)
            })
            .inspect(|_| writes = if args.pattern == Pattern::RandWrite { args.ops + args.warm } else { 0 })?
        }
    };
    if args.verify > 0 {
        work.verify(args.verify, writes as u64)?;
    }
    Ok(phase)
}

/// Thread `i`'s part of `range`.
fn share(range: std::ops::Range<usize>, threads: u16, i: u16) -> std::ops::Range<usize> {
    let (len, threads, i) = (range.len(), usize::from(threads), usize::from(i));
    range.start + len * i / threads..range.start + len * (i + 1) / threads
}

struct Work<'a> {
    region: Region,
    template: Template,
    args: &'a Args,
}

impl Work<'_> {
    fn fill(&self, pages: std::ops::Range<usize>, hist: &mut Histogram) {
        let mut clock = Clock::start();
        for page in pages {
            self.region.write(page, self.template.of(page), self.template.stamp(page, 0));
            clock.lap(hist);
        }
    }

    /// `count` accesses of the pattern; `stream` chooses the random numbers, and a sequential read
    /// begins at page `first`.
    fn ops(
        &self,
        stream: usize,
        first: usize,
        count: usize,
        hist: &mut Histogram,
    ) -> Result<(), AccessError> {
        let pages = self.region.pages();
        let hot = ((self.args.hot / 4096) as usize).clamp(1, pages);
        let mut random = Random::new(self.args.seed ^ (stream as u64 + 1) << 40);
        let mut next = first;
        let mut clock = Clock::start();
        for _ in 0..count {
            let bits = random.next_u64();
            let page = match self.args.pattern {
                Pattern::Seq => {
                    next += 1;
                    (next - 1) % pages
                }
                Pattern::Hot if bits % 100 < 95 => (pages - hot) / 2 + random.below(hot),
                _ => random.below(pages),
            };
            self.access(page, (bits >> 32) as usize)?;
            clock.lap(hist);
        }
        Ok(())
    }

    /// One access: checks the page's stamp and one other word of it; `RandWrite` counts the stamp up.
    fn access(&self, page: usize, choice: usize) -> Result<(), AccessError> {
        let words = self.region.page(page);
        let stamp = match self.args.pattern {
            Pattern::RandWrite => words[0].fetch_add(1, Ordering::Relaxed),
            _ => words[0].load(Ordering::Relaxed),
        };
        if self.template.version(page, stamp).is_none() {
            return Err(AccessError::Wrong { page, word: 0, found: stamp });
        }
        let word = 1 + choice % (WORDS - 1);
        let found = words[word].load(Ordering::Relaxed);
        if found != self.template.of(page)[word] {
            return Err(AccessError::Wrong { page, word, found });
        }
        Ok(())
    }

    /// Checks every `step`th page completely, and where it looks at all pages that no write was lost.
    fn verify(&self, step: usize, writes: u64) -> Result<(), AccessError> {
        let mut versions = 0;
        for page in (0..self.region.pages()).step_by(step) {
            let words = self.region.page(page);
            let stamp = words[0].load(Ordering::Relaxed);
            versions += u64::from(self.template.version(page, stamp).ok_or(AccessError::Wrong {
                page,
                word: 0,
                found: stamp,
            })?);
            let expected = self.template.of(page);
            for (word, (found, expected)) in words.iter().zip(expected).enumerate().skip(1) {
                let found = found.load(Ordering::Relaxed);
                if found != *expected {
                    return Err(AccessError::Wrong { page, word, found });
                }
            }
        }
        if step == 1 && versions != writes {
            return Err(AccessError::Lost { found: versions, made: writes });
        }
        Ok(())
    }
}

/// One word in every page of a fresh mapping, after the same in another one that was given back: so
/// the machine has the memory at hand, also where a hypervisor lends it.
fn first_touch(args: &Args, space: Option<&farpage::Running>) -> Result<Phase, AccessError> {
    for round in 0.. {
        let region = map(space, args.size)?;
        let touch = |thread: u16, hist: &mut Histogram| {
            let mut clock = Clock::start();
            for page in share(0..region.pages(), args.threads, thread) {
                region.page(page)[0].store(1, Ordering::Relaxed);
                clock.lap(hist);
            }
            Ok(())
        };
        let phase = timed(args, touch)?;
        if round == 1 {
            return Ok(phase);
        }
    }
    Err(AccessError::Thread)
}

/// Replaces random blocks of 16 bytes to 1 KiB, and one in 64 of up to 64 KiB, in a table of 50,000.
fn malloc_ops(args: &Args, thread: u16, hist: &mut Histogram) -> Result<(), AccessError> {
    let mut random = Random::new(args.seed + u64::from(thread));
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    blocks.resize_with(50_000, Vec::new);
    let mut clock = Clock::start();
    for _ in share(0..args.ops, args.threads, thread) {
        let most = if random.below(64) == 0 { 64 << 10 } else { 1 << 10 };
        let mut block = Vec::with_capacity(16 + random.below(most - 15));
        block.extend_from_slice(&[thread as u8; 16]);
        let slot = random.below(blocks.len());
        let old = std::mem::replace(&mut blocks[slot], block);
        if old.first().is_some_and(|b| *b != thread as u8) {
            return Err(AccessError::Wrong { page: slot, word: 0, found: u64::from(old[0]) });
        }
        drop(old);
        clock.lap(hist);
    }
    Ok(())
}

/// Sleeps, and counts the CPU that this process and those that farpage runs beside it use meanwhile.
fn idle(args: &Args) -> Result<Phase, AccessError> {
    let processes = match args.below {
        Some(root) => proc::tree(root).into_iter().filter(|pid| *pid != root).collect(),
        None => vec![std::process::id()],
    };
    // By all threads but the one that asks: what it does to find out is not farpage's.
    let used = || processes.iter().map(|pid| proc::others_cpu_ns(*pid)).sum::<u64>();
    let idle = AtomicU64::new(0);
    let mut phase = timed(args, |_, _| {
        used(); // The memory that it takes is there from now on.
        thread::sleep(Duration::from_millis(1000)); // What was under way may finish.
        let before = used();
        thread::sleep(Duration::from_millis(args.sleep_ms));
        idle.fetch_add(used().saturating_sub(before), Ordering::Relaxed);
        Ok(())
    })?;
    phase.idle_cpu_ms = idle.into_inner() as f64 / 1e6;
    phase.seconds = args.sleep_ms as f64 / 1e3;
    Ok(phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(pattern: Pattern, threads: u16) -> Args {
        Args {
            pattern,
            size: 1 << 20,
            ratio: Content::Ratio(2.0),
            threads,
            ops: 3000,
            warm: 100,
            hot: 64 << 10,
            seed: 5,
            verify: 1,
            inline: false,
            dram: "8M".into(),
            device: "ram:64M".into(),
            stats_json: None,
            cgroup: None,
            below: None,
            sleep_ms: 5,
        }
    }

    #[test]
    fn every_pattern_runs_and_verifies() {
        use Pattern::*;
        for pattern in [Fill, Seq, RandRead, RandWrite, Hot, FirstTouch, Resident, Malloc] {
            for threads in [1, 2] {
                let phase = measure(&args(pattern, threads)).unwrap();
                let expected = match pattern {
                    Fill => 156,
                    FirstTouch => 256,
                    _ => 3000,
                };
                assert_eq!((phase.accesses, phase.threads), (expected, threads), "{pattern:?}");
                assert!(phase.seconds > 0.0);
            }
        }
    }

    #[test]
    fn wrong_data_is_found() {
        let args = args(Pattern::Seq, 1);
        let region = map(None, args.size).unwrap();
        let work = Work { region, template: Template::new(args.ratio, 5), args: &args };
        work.fill(0..256, &mut Histogram::new());
        work.verify(1, 0).unwrap();
        work.region.page(77)[300].fetch_xor(1 << 40, Ordering::Relaxed);
        assert!(matches!(work.verify(1, 0), Err(AccessError::Wrong { page: 77, word: 300, .. })));
        assert!(matches!(work.access(77, 299), Err(AccessError::Wrong { page: 77, word: 300, .. })));
        work.region.page(77)[300].fetch_xor(1 << 40, Ordering::Relaxed);
        work.region.write(9, work.template.of(9), work.template.stamp(73, 0)); // the same template
        assert!(matches!(work.access(9, 5), Err(AccessError::Wrong { page: 9, word: 0, .. })));
    }

    #[test]
    fn a_lost_write_is_found() {
        let args = args(Pattern::RandWrite, 1);
        let region = map(None, args.size).unwrap();
        let work = Work { region, template: Template::new(args.ratio, 5), args: &args };
        work.fill(0..256, &mut Histogram::new());
        work.ops(0, 0, 500, &mut Histogram::new()).unwrap();
        work.verify(1, 500).unwrap();
        assert!(matches!(work.verify(1, 501), Err(AccessError::Lost { found: 500, made: 501 })));
    }

    #[test]
    fn the_hot_part_gets_its_share() {
        let phase = args(Pattern::Hot, 1);
        let mut random = Random::new(1);
        let hits = (0..10_000).filter(|_| random.next_u64() % 100 < 95).count();
        assert!((9400..9600).contains(&hits), "{hits} {}", phase.hot);
    }

    #[test]
    fn shares_cover_the_range_once() {
        let parts: Vec<_> = (0..3).flat_map(|i| share(5..15, 3, i)).collect();
        assert_eq!(parts, (5..15).collect::<Vec<_>>());
    }

    #[test]
    fn the_line_can_be_read_back() {
        let phase = measure(&args(Pattern::Seq, 1)).unwrap();
        let line = serde_json::to_string(&phase).unwrap();
        assert!(line.contains(r#""pattern":"seq""#) && !line.contains('\n'));
        assert_eq!(serde_json::from_str::<Phase>(&line).unwrap(), phase);
    }
}
