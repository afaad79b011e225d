//! Records that were said to be durable are there when the power comes back.
//!
//! `write` says the number of each record once it is flushed; whoever runs it cuts the power at some moment, and
//! gives `check` the last number that it has heard. Two files: one is written through a mapping, the other one is
//! appended to.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use farpage::dax::{DaxFile, DaxOptions};

use crate::pages::{self, Held, PAGE};
use crate::run::say;
use crate::{Outcome, ensure};

/// Before or after the power went.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Writes records for ever, or so many, and says `flushed N` after each.
    Write {
        /// A directory on the file system to be tried.
        #[arg(long)]
        dir: PathBuf,
        /// So many records at most.
        #[arg(long, default_value_t = u64::MAX)]
        records: u64,
        /// Accepts a file system that is not DAX.
        #[arg(long)]
        page_cache: bool,
    },
    /// Looks for the records.
    Check {
        /// The directory.
        #[arg(long)]
        dir: PathBuf,
        /// Numbers that were said: all up to the greatest must be there.
        #[arg(long, num_args = 1..)]
        acked: Vec<u64>,
        /// Accepts a file system that is not DAX.
        #[arg(long)]
        page_cache: bool,
    },
}

/// Records that the mapped file has room for; then it begins again, with the next generation.
const ROOM: u64 = 2048;

fn open(dir: &Path, name: &str, page_cache: bool) -> Outcome<DaxFile> {
    Ok(DaxOptions::new().page_cache(page_cache).create(dir.join(name))?)
}

/// Writes or checks.
pub fn run(command: Command) -> ExitCode {
    let (name, done) = match command {
        Command::Write { dir, records, page_cache } => ("write", write(&dir, records, page_cache)),
        Command::Check { dir, acked, page_cache } => ("check", check(&dir, &acked, page_cache)),
    };
    match done {
        Ok(()) => {
            say(&format!("ok powerloss-{name}"));
            ExitCode::SUCCESS
        }
        Err(e) => {
            say(&format!("FAILED powerloss-{name}: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// Where record `n` lies in the mapped file, and its generation there.
fn place_of(n: u64) -> (u64, u64) {
    (n % ROOM, n / ROOM + 1)
}

fn write(dir: &Path, records: u64, page_cache: bool) -> Outcome {
    let mapped = open(dir, "power-mapped", page_cache)?;
    let log = open(dir, "power-log", page_cache)?;
    mapped.truncate(0)?;
    log.truncate(0)?;
    // Holes: the first write of each page has the file system find a block for it, which must be durable as well.
    mapped.truncate(ROOM * PAGE)?;
    mapped.flush(0..ROOM * PAGE)?;
    log.flush(0..1)?;
    let map = mapped.map(0..ROOM * PAGE)?;
    for n in 0..records {
        let (page, generation) = place_of(n);
        let at = (page * PAGE) as usize;
        let bytes = pages::fill(n, generation);
        if n % 2 == 0 {
            // SAFETY: inside the mapping, which nobody cuts.
            unsafe { map.as_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        } else {
            map.write(at, &bytes)?;
        }
        map.flush(at..at + PAGE as usize)?;
        let end = log.append(&bytes[..record_len(n)])?;
        log.flush(end..end + record_len(n) as u64)?;
        say(&format!("flushed {n}"));
        // The log does not grow for ever.
        if n % ROOM == ROOM - 1 {
            log.truncate(0)?;
        }
    }
    Ok(())
}

/// Records of the log have different lengths, which follow from their number.
fn record_len(n: u64) -> usize {
    64 + (n as usize * 1031) % 4032
}

fn check(dir: &Path, acked: &[u64], page_cache: bool) -> Outcome {
    let Some(last) = acked.iter().max().copied() else {
        say("nothing was said to be durable");
        return Ok(());
    };
    let (checked, newest) = check_mapped(dir, last, page_cache)?;
    // The log may have been emptied after the end of a round, and begun again.
    let emptied = newest % ROOM == ROOM - 1 || newest / ROOM > last / ROOM;
    let logged = if emptied { 0 } else { check_log(dir, last)? };
    say(&format!("checked {checked} mapped and {logged} logged records, {last} was said, {newest} is there"));
    Ok(())
}

/// How many records were looked at, and the newest one that is there: it may be newer than the last one heard of.
fn check_mapped(dir: &Path, last: u64, page_cache: bool) -> Outcome<(u64, u64)> {
    let mapped = open(dir, "power-mapped", page_cache)?;
    ensure!(mapped.len()? == ROOM * PAGE, "the mapped file has {} bytes", mapped.len()?);
    let map = mapped.map(0..ROOM * PAGE)?;
    let (mut checked, mut newest, mut torn) = (0, last, None);
    for page in 0..ROOM {
        let mut bytes = vec![0; PAGE as usize];
        map.read((page * PAGE) as usize, &mut bytes)?;
        // The last record that was to be written here, of those that were said.
        let round = if page <= last % ROOM { Some(last / ROOM) } else { (last / ROOM).checked_sub(1) };
        let wanted = round.map(|round| round * ROOM + page);
        match pages::look(&bytes) {
            Ok(Held::Zeros) => ensure!(wanted.is_none(), "record {wanted:?} is not there"),
            Ok(Held::Page(n, generation)) => {
                ensure!((page, generation) == place_of(n), "page {page} holds record {n}, {generation}");
                ensure!(wanted.is_none_or(|wanted| n >= wanted), "record {n} is there, {wanted:?} is not");
                newest = newest.max(n);
                checked += 1;
            }
            // The one that was being written when the power went.
            Err(e) => {
                ensure!(torn.is_none() && Some(last) != wanted, "page {page}, after page {torn:?}: {e}");
                torn = Some(page);
            }
        }
    }
    ensure!(
        torn.is_none_or(|page| page == (newest + 1) % ROOM),
        "page {torn:?} is wrong, the newest is {newest}"
    );
    Ok((checked, newest))
}

fn check_log(dir: &Path, last: u64) -> Outcome<u64> {
    let log = std::fs::read(dir.join("power-log"))?;
    let (first, mut at) = (last / ROOM * ROOM, 0);
    for n in first..=last {
        let (_, generation) = place_of(n);
        let right = &pages::fill(n, generation)[..record_len(n)];
        ensure!(
            log.get(at..at + right.len()) == Some(right),
            "record {n} is not in the log at {at}, which has {} bytes",
            log.len()
        );
        at += right.len();
    }
    Ok(last - first + 1)
}
