//! `farpage bench dax`: DAX files of the library beside the bare system calls, in one run on one file.

mod case;
mod memory;
mod report;
mod work;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use farpage::dax::{Access, DaxError, DaxFile, DaxOptions};

use super::side::stop_flag;
use super::stats::median;
use super::{BenchError, proc};
use crate::dax::look::huge_pages;
use case::Case;
use report::{Report, Row};
use work::{Other, Side, Work};

const MIB: u64 = 1 << 20;
/// Bytes that are read and written through mappings.
const DATA: u64 = 64 * MIB;
/// Behind them a part that is mapped, pinned and punched, and one that others map and pin.
const PART: std::ops::Range<u64> = DATA..DATA + 2 * MIB;
const ELSEWHERE: std::ops::Range<u64> = DATA + 4 * MIB..DATA + 6 * MIB;
const FILE: u64 = DATA + 8 * MIB;

/// Arguments of `farpage bench dax`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the file is made that is measured, of 72 MiB.
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Measures on a file system without DAX: everything but the kernel's own waits means the same there.
    #[arg(long)]
    page_cache: bool,
    /// Measures only acts whose name has this text.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
    /// Prints everything as JSON.
    #[arg(long)]
    json: bool,
}

/// The file that is measured; removed when dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// Runs everything and prints the report; 0 whatever the figures are.
pub fn run(args: &Args) -> Result<u8, BenchError> {
    // Before there is something to remove.
    let stop = stop_flag().map_err(BenchError::io("handle signals"))?;
    let (scratch, dax) = make(args)?;
    let plain = File::options().read(true).write(true).open(&scratch.0);
    let plain = plain.map_err(BenchError::io("open the file"))?;
    fill(&dax, &plain)?;
    // The file system decides; punching splits it.
    let huge = is_huge(&dax).map_err(|e| BenchError::Usage(e.to_string()))?;
    let mut work = Work::new(dax.clone(), plain);
    let mut rows: Vec<Row> = Vec::new();
    for case in case::all().into_iter().filter(|case| case.name.contains(&args.only)) {
        if case.needs_dax() && dax.access() == Access::PageCache {
            let why = "on the page cache the kernel waits for nobody: it needs a DAX file system";
            rows.push(Row::missing(case, why.into()));
            continue;
        }
        let other = match case.other.map(|other| Other::start(other, &scratch.0, args.page_cache)) {
            Some(Err(e)) => {
                rows.push(Row::missing(case, format!("no second process could be started: {e}")));
                continue;
            }
            other => other,
        };
        let row = measure(&mut work, case, args.rounds, &|| stop.load(Ordering::Relaxed))?;
        rows.push(row);
        drop(other);
    }
    let report = Report { machine: machine(&dax, args, huge), rows };
    let text = if args.json { report.json() } else { report.table() };
    io::stdout().write_all(text.as_bytes()).map_err(BenchError::io("print the report"))?;
    Ok(0)
}

/// All rounds of a case. In a round the sides take turns at each act: what disturbs the machine meets both. A round's time
/// is the median of its acts.
fn measure(work: &mut Work, case: Case, rounds: u32, stopped: &dyn Fn() -> bool) -> Result<Row, BenchError> {
    let mut row = Row::new(case);
    // A first round warms both sides up.
    for round in 0..=rounds {
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        for i in 0..row.case.times {
            let mut sides = [(Side::Bare, &mut bare), (Side::Farpage, &mut ours)];
            if !(round + i).is_multiple_of(2) {
                sides.reverse();
            }
            for (side, times) in sides {
                if stopped() {
                    return Err(BenchError::Stopped);
                }
                match work.time(side, &row.case) {
                    Ok(time) => times.push(time.as_secs_f64() * 1e6),
                    // Its own file system or limits: the other figures can be had all the same.
                    Err(e) => return Ok(Row::missing(row.case, e.to_string())),
                }
            }
        }
        if let (Some(bare), Some(ours), true) = (median(&bare), median(&ours), round > 0) {
            row.add(bare, ours);
        }
    }
    Ok(row)
}

fn make(args: &Args) -> Result<(Scratch, DaxFile), BenchError> {
    let dir = std::path::absolute(&args.dir).map_err(BenchError::io("find the directory"))?;
    let path = dir.join(format!("farpage-bench-dax-{}", std::process::id()));
    let options = DaxOptions::new().page_cache(args.page_cache).map_sync(false).lease(false);
    // From here on it is removed whatever comes.
    let scratch = Scratch(path.clone());
    let dax = options.create(path).map_err(|e| {
        let hint = match e {
            DaxError::NotDax { .. } | DaxError::BlockSize { .. } => {
                " with --page-cache, or name another --dir"
            }
            _ => "",
        };
        BenchError::Usage(format!("{e}{hint}"))
    })?;
    Ok((scratch, dax))
}

fn fill(dax: &DaxFile, plain: &File) -> Result<(), BenchError> {
    dax.allocate(0..FILE).map_err(|e| BenchError::Usage(e.to_string()))?;
    let piece = vec![0x5a; MIB as usize];
    for at in (0..FILE).step_by(piece.len()) {
        plain.write_all_at(&piece, at).map_err(BenchError::io("fill the file"))?;
    }
    Ok(())
}

/// Whether the kernel maps the part by a page of 2 MiB.
fn is_huge(dax: &DaxFile) -> Result<bool, DaxError> {
    let map = dax.map(PART)?;
    let huge = huge_pages(map.as_ptr() as usize, PART.start, std::slice::from_ref(&PART));
    Ok(huge.mapped > 0)
}

fn machine(dax: &DaxFile, args: &Args, huge: bool) -> report::Machine {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    report::Machine {
        kernel,
        cpu: proc::cpu_name(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        dir: dax.path().parent().unwrap_or(Path::new("/")).to_path_buf(),
        access: match dax.access() {
            Access::Direct { map_sync: true } => "direct, MAP_SYNC",
            Access::Direct { map_sync: false } => "direct",
            Access::PageCache => "page cache",
        },
        huge,
        rounds: args.rounds,
    }
}
