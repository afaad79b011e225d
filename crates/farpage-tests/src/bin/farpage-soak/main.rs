//! Random reads, writes, forks, maps, unmaps, moves and advice over checksummed pages, in several threads,
//! for a set time. Every page's contents follow from a seed that the program keeps beside; the first page
//! that is not as it must be ends the program with status 1.

mod memory;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use farpage_tests::{MIB, Rng};
use memory::{Fail, PAGE, Region};

/// Random work on checksummed memory for a set time.
#[derive(Debug, Clone, Parser)]
#[command(name = "farpage-soak")]
struct Args {
    /// How long, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// The seed of the random choices (printed, so that a run can be repeated).
    #[arg(long)]
    seed: Option<u64>,
    /// Memory in use at most, in MiB, all threads together.
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    size: u64,
    /// Threads.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    threads: u64,
    /// Leave out fork.
    #[arg(long)]
    no_fork: bool,
}

/// How often each act was done.
type Counts = [u64; ACTS.len()];

/// Acts, and how often each is drawn out of their sum.
const ACTS: &[(&str, u64)] = &[
    ("read", 300),
    ("write", 200),
    ("run of reads", 60),
    ("run of writes", 40),
    ("map", 30),
    ("unmap", 20),
    ("cut", 10),
    ("grow", 10),
    ("shrink", 8),
    ("move", 10),
    ("drop", 15),
    ("advise", 25),
    ("protect", 10),
    ("lock", 3),
    ("fork", 4),
];

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |d| d.subsec_nanos().into())
    });
    println!(
        "farpage-soak: --seconds {} --seed {seed} --size {} --threads {}",
        args.seconds, args.size, args.threads
    );
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let results: Vec<Result<Counts, Fail>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..args.threads)
            .map(|n| {
                let args = &args;
                scope.spawn(move || Worker::new(args, seed ^ (n << 32)).work(end))
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap_or(Err(Fail::Thread))).collect()
    });
    let mut total = [0; ACTS.len()];
    for result in results {
        match result {
            Ok(counts) => total.iter_mut().zip(counts).for_each(|(t, c)| *t += c),
            Err(e) => {
                eprintln!("farpage-soak: seed {seed}: {e}");
                return ExitCode::FAILURE;
            }
        }
    }
    for ((name, _), n) in ACTS.iter().zip(total) {
        eprint!("{name} {n}, ");
    }
    eprintln!("in {} seconds", args.seconds);
    println!("farpage-soak: all right");
    ExitCode::SUCCESS
}

/// One thread's memory and its choices.
struct Worker {
    rng: Rng,
    regions: Vec<Region>,
    limit_pages: usize,
    forks: bool,
    next_seed: u32,
}

impl Worker {
    fn new(args: &Args, seed: u64) -> Self {
        let limit_pages = (args.size * MIB / args.threads) as usize / PAGE;
        Self { rng: Rng::new(seed), regions: Vec::new(), limit_pages, forks: !args.no_fork, next_seed: 1 }
    }

    /// Works until `end`, then verifies everything once more.
    fn work(mut self, end: Instant) -> Result<Counts, Fail> {
        let mut counts = [0; ACTS.len()];
        let sum: u64 = ACTS.iter().map(|a| a.1).sum();
        while Instant::now() < end {
            let mut ticket = self.rng.below(sum);
            let act = ACTS.iter().position(|(_, weight)| {
                let mine = ticket < *weight;
                ticket = ticket.saturating_sub(*weight);
                mine
            });
            let act = act.unwrap_or(0);
            self.act(ACTS[act].0)?;
            counts[act] += 1;
        }
        self.regions.iter().try_for_each(Region::check_all)?;
        Ok(counts)
    }

    fn below(&mut self, end: usize) -> usize {
        self.rng.below(end as u64) as usize
    }

    fn seed(&mut self) -> u32 {
        // 0 means "never written"; a few pages share a seed modulo 3 and become same-filled or noise.
        self.next_seed = self.next_seed.checked_add(1).unwrap_or(1);
        self.next_seed
    }

    fn act(&mut self, act: &str) -> Result<(), Fail> {
        let used: usize = self.regions.iter().map(Region::pages).sum();
        if self.regions.is_empty() || (act == "map" && used < self.limit_pages) {
            let pages = (256 + self.below(1024)).min((self.limit_pages - used).max(1));
            self.regions.push(Region::map(pages)?);
            // Most of what is mapped is also filled: otherwise there would be little to page.
            let seed = self.seed();
            let last = self.regions.len() - 1;
            let filled = pages - self.below(pages / 4 + 1);
            return self.regions[last].write(0, filled, seed);
        }
        let which = self.below(self.regions.len());
        let pages = self.regions[which].pages();
        let from = self.below(pages);
        let count = (1 + self.below(pages - from)).min(pages - from);
        let seed = self.seed();
        let choice = self.below(4);
        let region = &mut self.regions[which];
        match act {
            "read" => region.check(from, 1),
            "write" => region.write(from, 1, seed),
            "run of reads" => region.check(from, count.min(128)),
            "run of writes" => region.write(from, count.min(128), seed),
            "unmap" if used > self.limit_pages / 2 => self.regions.swap_remove(which).unmap(),
            "cut" if count < pages => {
                let whole = self.regions.swap_remove(which);
                self.regions.extend(whole.cut(from, count)?);
                Ok(())
            }
            "grow" if used + count < self.limit_pages => region.grow(count),
            "shrink" if count < pages => region.shrink(pages - count),
            "move" => region.relocate(),
            "drop" => region.forget(from, count.min(64)),
            "advise" => region.advise(from, count, choice),
            "protect" => region.protect(from, count, choice.is_multiple_of(2)),
            "lock" => region.lock(from, count.min(64)),
            "fork" if self.forks => self.fork(),
            _ => Ok(()),
        }
    }

    /// The child verifies a sample of this thread's memory, writes some of it, and ends; what it wrote is not
    /// to be seen here.
    fn fork(&mut self) -> Result<(), Fail> {
        let mut rng = self.rng.clone();
        self.rng.draw();
        let regions = &mut self.regions;
        memory::in_child(|| {
            for n in 0..200u64 {
                let which = rng.below(regions.len() as u64) as usize;
                let page = rng.below(regions[which].pages() as u64) as usize;
                regions[which].check(page, 1)?;
                if n % 3 == 0 {
                    regions[which].write(page, 1, 1_000_000 + n as u32)?;
                    regions[which].check(page, 1)?;
                }
            }
            Ok(())
        })
    }
}
