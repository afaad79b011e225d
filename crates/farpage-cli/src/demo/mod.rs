//! `farpage demo`: a program that needs four times its DRAM, seen at work and checked.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bench::proc::{self, PeakRss};
use crate::bench::side::{Running, StatsFile, counter, stop_flag};
use crate::error::CliError;
use farpage::size::parse_size;
use job::{Line, PHASES, Records};
use screen::{Screen, View};

mod job;
mod screen;

const MIB: u64 = 1 << 20;

/// Options of `farpage demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Memory that the job fills [default: 512M, less on a small machine].
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// DRAM that it gets [default: a quarter of that].
    #[arg(long, value_parser = parse_size)]
    dram: Option<u64>,
    /// Where pages go that are not in DRAM [default: compressed memory].
    #[arg(long)]
    device: Option<String>,
    /// Do the job itself: look up this many records at the end.
    #[arg(long, hide = true)]
    job: Option<u64>,
}

/// Why there was no demonstration.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("{0}")]
    Usage(String),
    #[error("interrupted")]
    Interrupted,
    #[error("the job ended without a result: {0}")]
    Failed(ExitStatus),
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> DemoError {
    move |source| DemoError::Io { what, source }
}

/// What was seen of the job.
struct Seen {
    result: job::Result,
    /// When each phase began, and the end.
    times: Vec<Duration>,
    rss_peak: u64,
    faults: u64,
    stats: Option<Value>,
}

/// Runs the demonstration: 0 if the job's result is right and it kept to its DRAM, else 1.
pub fn run(args: Args) -> Result<u8, CliError> {
    demo(&args).map_err(|e| CliError::Other(e.to_string()))
}

fn demo(args: &Args) -> Result<u8, DemoError> {
    let (size, dram) = sizes(args, proc::available_memory().unwrap_or(u64::MAX))?;
    if let Some(lookups) = args.job {
        job::run_and_print(size, lookups).map_err(io("report the result"))?;
        return Ok(0);
    }
    let records = Records::in_bytes(size);
    let lookups = (records.count() / 80).clamp(1, 100_000);
    let mut out = io::stdout();
    writeln!(
        out,
        "A program sorts {} records ({} MiB) in memory, with {} MiB of DRAM: {:.1} times what it has.\n",
        records.count(),
        size / MIB,
        dram / MIB,
        size as f64 / dram as f64
    )
    .map_err(io("print"))?;
    let seen = watch(args, size, dram, lookups)?;
    let expected = records.expected();
    let (text, good) = summary(&seen, expected, lookups, size, dram);
    out.write_all(text.as_bytes()).map_err(io("print"))?;
    Ok(u8::from(!good))
}

/// Memory and DRAM of the job, in bytes.
fn sizes(args: &Args, available: u64) -> Result<(u64, u64), DemoError> {
    // DRAM, compressed pages and the launcher together need less than half of what the job fills.
    let size = args.size.unwrap_or_else(|| (512 * MIB).min(available / 2 / MIB / 4 * 4 * MIB));
    let dram = args.dram.unwrap_or(size / 4);
    if !(16 * MIB..=1 << 40).contains(&size) {
        return Err(DemoError::Usage(format!(
            "the demonstration works with 16M to 1T, not {} MiB: say --size",
            size / MIB
        )));
    }
    if args.job.is_none() && (dram < MIB || dram >= size) {
        return Err(DemoError::Usage("--dram must be 1M or more and less than --size".into()));
    }
    Ok((size, dram))
}

/// Starts the job under `farpage run` and shows what it does until it ends.
fn watch(args: &Args, size: u64, dram: u64, lookups: u64) -> Result<Seen, DemoError> {
    let stop = stop_flag().map_err(io("handle signals"))?;
    let program = std::env::current_exe().map_err(io("find farpage's own program"))?;
    let stats = StatsFile::new();
    let mut command = Command::new(&program);
    command.args(["run", "--dram", &dram.to_string()]).arg("--stats-json").arg(&stats.0);
    command.args(["--device", args.device.as_deref().unwrap_or(&format!("ram:{size}"))]);
    command.arg("--").arg(&program).args([
        "demo",
        "--size",
        &size.to_string(),
        "--job",
        &lookups.to_string(),
    ]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(io("start the job"))?;
    let mut running = Running(child);
    let lines = running.0.stdout.take().map(read_lines).ok_or(DemoError::Interrupted)?;
    let mut rss = PeakRss::new(running.0.id());
    let mut screen = Screen::new();
    let start = Instant::now();
    let mut times = Vec::new();
    let mut view = View { phase: PHASES[0], budget: dram, ..View::default() };
    let mut result = None;
    let mut next_look = start;
    loop {
        if stop.load(Ordering::Relaxed) {
            screen.end().map_err(io("print"))?;
            return Err(DemoError::Interrupted);
        }
        match lines.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
            Ok(Line::Progress(phase, share)) => {
                while times.len() <= phase {
                    times.push(start.elapsed());
                }
                (view.phase, view.share) = (PHASES[phase], share);
                view.filled = if phase == 0 { (size as f64 * share) as u64 } else { size };
            }
            Ok(Line::Result(r)) => {
                times.push(start.elapsed());
                result = Some(r);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                next_look = Instant::now() + Duration::from_millis(100);
                rss.sample();
                view.dram = rss.now;
                view.faults = view.faults.max(rss.faults());
                view.pages = stats.read().as_ref().and_then(traffic).or(view.pages);
                view.elapsed = start.elapsed();
                screen.show(&view).map_err(io("print"))?;
            }
        }
    }
    screen.end().map_err(io("print"))?;
    let status = running.0.wait().map_err(io("wait for the job"))?;
    let result = result.filter(|_| status.success()).ok_or(DemoError::Failed(status))?;
    Ok(Seen { result, times, rss_peak: rss.peak, faults: view.faults, stats: stats.read() })
}

/// The job's lines, read by a thread that ends with the job. What is no such line is passed on to stderr.
fn read_lines(from: ChildStdout) -> Receiver<Line> {
    let (to, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let Some(line) = job::parse(&line) else {
                let _ = writeln!(io::stderr(), "{line}");
                continue;
            };
            if to.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Pages that went out and came in, by farpage's counters.
fn traffic(stats: &Value) -> Option<(u64, u64)> {
    counter(stats, "pages_out").zip(counter(stats, "pages_in"))
}

/// What to say in the end, and whether all was well.
fn summary(seen: &Seen, expected: u128, lookups: u64, size: u64, dram: u64) -> (String, bool) {
    let right = seen.result.digest == expected && seen.result.found == lookups;
    // Beside its managed memory the tree has some heap, stacks and tables.
    let within = seen.rss_peak <= dram + dram / 20 + 8 * MIB;
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let mut text = String::new();
    text += &match right {
        true => format!(
            "Verified: the sorted records have the checksum that was computed without them ({:032x}), and {lookups} of {lookups} look-ups found theirs.\n",
            seen.result.digest
        ),
        false => format!(
            "WRONG RESULT: checksum {:032x}, expected {expected:032x}; {} of {lookups} look-ups right\n",
            seen.result.digest, seen.result.found
        ),
    };
    let took = |phase: usize| {
        let span = seen.times.get(phase).zip(seen.times.get(phase + 1));
        span.map_or(0.0, |(from, to)| to.saturating_sub(*from).as_secs_f64())
    };
    text += &format!(
        "Time:     {:.1} s in all: filled in {:.1} s ({:.0} MiB/s), sorted in {:.1} s, {:.0} look-ups a second, read back at {:.0} MiB/s\n",
        seen.times.last().copied().unwrap_or_default().as_secs_f64(),
        took(0),
        mib(size) / took(0).max(0.001),
        took(1),
        lookups as f64 / took(2).max(0.001),
        mib(size) / took(3).max(0.001),
    );
    text += &format!(
        "DRAM:     at most {:.1} MiB resident for {} MiB of data ({})\n",
        mib(seen.rss_peak),
        size / MIB,
        if within {
            format!("budget {} MiB", dram / MIB)
        } else {
            format!("MORE THAN THE BUDGET of {} MiB", dram / MIB)
        },
    );
    let stats = seen.stats.as_ref();
    let faults = stats.and_then(|s| counter(s, "faults_device")).unwrap_or(seen.faults);
    text += &match stats.and_then(traffic) {
        Some((out, back)) => format!(
            "Pages:    {out} out ({:.0} MiB) and {back} in ({:.0} MiB), {faults} faults waited for one\n",
            mib(out * 4096),
            mib(back * 4096),
        ),
        None => format!("Pages:    not counted; {faults} page faults\n"),
    };
    (text, right && within)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(digest: u128, found: u64, rss_peak: u64) -> Seen {
        let times = [0, 2, 6, 7, 8].map(Duration::from_secs).to_vec();
        let stats = Some(serde_json::json!({"pages_out": 256, "pages_in": 512}));
        Seen { result: job::Result { digest, found }, times, rss_peak, faults: 9, stats }
    }

    #[test]
    fn only_a_right_result_within_the_budget_is_good() {
        let good = |s: Seen| summary(&s, 5, 100, 512 * MIB, 128 * MIB).1;
        assert!(good(seen(5, 100, 130 * MIB)));
        assert!(!good(seen(6, 100, 130 * MIB)));
        assert!(!good(seen(5, 99, 130 * MIB)));
        assert!(!good(seen(5, 100, 150 * MIB)));
    }

    #[test]
    fn the_summary_says_what_was_done() {
        let (text, _) = summary(&seen(5, 100, 129 * MIB), 5, 100, 512 * MIB, 128 * MIB);
        for part in [
            "8.0 s in all",
            "filled in 2.0 s (256 MiB/s)",
            "sorted in 4.0 s",
            "129.0 MiB",
            "256 out (1 MiB)",
            "512 in (2 MiB)",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn sizes_follow_the_machine_and_are_checked() {
        let args = |size, dram| Args { size, dram, device: None, job: None };
        assert_eq!(sizes(&args(None, None), u64::MAX).unwrap(), (512 * MIB, 128 * MIB));
        assert_eq!(sizes(&args(None, None), 300 * MIB).unwrap(), (148 * MIB, 37 * MIB));
        assert!(sizes(&args(None, None), 20 * MIB).is_err());
        assert!(sizes(&args(Some(64 * MIB), Some(64 * MIB)), u64::MAX).is_err());
        assert!(sizes(&args(Some(64 * MIB), Some(4096)), u64::MAX).is_err());
    }
}
