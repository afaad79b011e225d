//! `farpage bench swap`: the rounds, with the kernel's swap set up around them.

use std::io::{self, IsTerminal, Write};

use super::cgroup::{Cgroup, CgroupError};
use super::plan::{Args, Case};
use super::report::{Machine, Report, Row};
use super::side::{Runner, Side, Spec, counter};
use super::stats::median;
use super::zram::{ZramError, ZramSwap};
use super::{BenchError, proc};
use crate::access::Pattern;

/// What the control group may hold beyond the DRAM that farpage gets, in bytes: the program's page
/// tables, stacks and heap, which for farpage do not count as managed memory either.
const SLACK: u64 = 4 << 20;

/// The kernel's side, undone when dropped: the group first, so that no swap is in use any more.
struct Kernel {
    group: Cgroup,
    zram: ZramSwap,
}

#[derive(Debug, thiserror::Error)]
enum NoKernelSide {
    #[error("this needs root")]
    NotRoot,
    #[error(transparent)]
    Zram(#[from] ZramError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Kernel {
    fn new(args: &Args) -> Result<Kernel, NoKernelSide> {
        if !rustix::process::geteuid().is_root() {
            return Err(NoKernelSide::NotRoot);
        }
        let group = Cgroup::new(args.dram + SLACK)?;
        Ok(Kernel { group, zram: ZramSwap::new(args.size * 2)? })
    }
}

/// Runs everything and prints the report.
pub fn run(args: &Args) -> Result<u8, BenchError> {
    let cases = args.cases()?;
    let available = proc::available_memory().unwrap_or(u64::MAX);
    // The most that is there at once: a resident half, or DRAM and pages that do not compress.
    if args.size + args.dram > available {
        return Err(BenchError::Usage(format!(
            "{} MiB of memory are available, too few for --size {} MiB: choose smaller sizes",
            available >> 20,
            args.size >> 20
        )));
    }
    let device = args.device.clone().unwrap_or_else(|| format!("ram:{}", args.size * 2));
    // The runner catches signals, so it comes before what a signal must not leave behind.
    let mut runner = Runner::new(device)?;
    let needs_kernel = cases.iter().any(|c| !c.within_budget && c.spec.pattern != Pattern::Idle);
    let kernel = if needs_kernel { Kernel::new(args).map(Some) } else { Ok(None) };
    let (kernel, missing) = match kernel {
        Ok(kernel) => (kernel, None),
        Err(why) => (None, Some(why.to_string())),
    };
    if let Some(why) = &missing {
        note(&format!("no comparison with the kernel's swap, only farpage is measured: {why}"));
    }
    runner.cgroup = kernel.as_ref().map(|k| k.group.dir().to_path_buf());
    let mut machine = Machine::here(args);
    machine.kernel_side = kernel.as_ref().map(|k| format!("{} on {}", k.zram.describe(), k.group.describe()));
    machine.kernel_side_missing = missing;

    let mut rows: Vec<Row> = cases.into_iter().map(Row::new).collect();
    let mut bare: Vec<f64> = Vec::new();
    let total = args.rounds() as usize * rows.len();
    let random = |row: &Row| matches!(row.case.spec.pattern, Pattern::RandRead | Pattern::RandWrite);
    let wants_bare = rows.iter().any(random);
    for round in 0..args.rounds() {
        if wants_bare {
            // Without permission there is no farpage side either, which says so.
            let bare_fault = if args.inline { super::bare::inline } else { super::bare::by_a_thread };
            bare.extend(bare_fault().ok());
        }
        for i in 0..rows.len() {
            progress(round as usize * rows.len() + i, total, &rows[i].case);
            measure(&runner, &mut rows[i], round)?;
        }
    }
    progress_end();
    drop(kernel);
    machine.bare_fault_us = median(&bare);
    machine.inline = args.inline;
    let report = Report { machine, rows };
    let text = if args.json { report.json() } else { report.table() };
    io::stdout().write_all(text.as_bytes()).map_err(BenchError::io("print the report"))?;
    Ok(0)
}

/// One round of one case: the other side first, in every second round farpage.
fn measure(runner: &Runner, row: &mut Row, round: u32) -> Result<(), BenchError> {
    let spec = row.case.spec.clone();
    let other = if row.case.within_budget {
        Some(Side::Plain)
    } else {
        runner.cgroup.as_ref().filter(|_| spec.pattern != Pattern::Idle).map(|_| Side::Swap)
    };
    let mut sides = [other, Some(Side::Farpage)];
    if !round.is_multiple_of(2) {
        sides.reverse();
    }
    for side in sides.into_iter().flatten() {
        let outcome = runner.run(side, &spec)?;
        if side == Side::Farpage { &mut row.ours } else { &mut row.theirs }.push(outcome);
    }
    if spec.pattern == Pattern::Hot && round == 0 {
        row.miss = misses(runner, &spec)?;
    }
    Ok(())
}

/// Our misses by farpage's own counters. They cover a whole run, so the misses of the timed part are
/// those of a run with it less those of a run without it.
fn misses(runner: &Runner, spec: &Spec) -> Result<Option<f64>, BenchError> {
    let faults = |ops| -> Result<Option<u64>, BenchError> {
        let outcome = runner.run(Side::Farpage, &Spec { ops, verify: 0, ..spec.clone() })?;
        Ok(outcome.stats.as_ref().and_then(|s| counter(s, "faults_device")))
    };
    let (without, with) = (faults(0)?, faults(spec.ops)?);
    Ok(without.zip(with).map(|(without, with)| with.saturating_sub(without) as f64 / spec.ops as f64))
}

fn note(text: &str) {
    // A closed stderr must not end the benchmark before it has tidied up.
    let _ = writeln!(io::stderr(), "farpage: {text}");
}

fn progress(done: usize, total: usize, case: &Case) {
    let line = format!("{}/{total} {}, {} thread(s)", done + 1, case.name, case.spec.threads);
    let mut stderr = io::stderr();
    let _ = match stderr.is_terminal() {
        true => write!(stderr, "\r\x1b[K{line}"),
        false => writeln!(stderr, "{line}"),
    };
}

fn progress_end() {
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
}
