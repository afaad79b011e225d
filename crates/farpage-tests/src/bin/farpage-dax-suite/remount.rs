//! What is flushed is there after the file system was unmounted and mounted again. Who runs the suite does that.

use std::process::ExitCode;

use clap::ValueEnum;
use farpage::dax::DaxFile;

use crate::pages::{self, PAGE};
use crate::place::Place;
use crate::run::say;
use crate::{Outcome, ensure};

/// Before or after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// Writes and flushes.
    Write,
    /// Looks whether all is there.
    Check,
}

const NAME: &str = "remount";
/// Pages written through a mapping, then by system calls, then appended.
const PARTS: [u64; 4] = [0, 700, 900, 1000];

/// One phase, as a case.
pub fn run(place: &Place, phase: Phase) -> ExitCode {
    let (name, done) = match phase {
        Phase::Write => ("remount-write", write(place)),
        Phase::Check => ("remount-check", check(place)),
    };
    match done {
        Ok(()) => {
            say(&format!("ok {name}"));
            say("suite: 1 passed, 0 failed, 0 skipped");
            ExitCode::SUCCESS
        }
        Err(e) => {
            say(&format!("FAILED {name}: {e}"));
            say("suite: 0 passed, 1 failed, 0 skipped");
            ExitCode::FAILURE
        }
    }
}

fn write(place: &Place) -> Outcome {
    let file = place.options().create(place.path(NAME))?;
    file.truncate(0)?;
    file.truncate(PARTS[1] * PAGE)?;
    let map = file.map(pages::bytes(PARTS[0]..PARTS[1]))?;
    for page in PARTS[0]..PARTS[1] {
        let bytes = pages::fill(page, 1);
        // SAFETY: inside the mapping, which nobody cuts.
        unsafe {
            let at = map.as_ptr().add((page * PAGE) as usize);
            at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }
    map.flush(0..map.len())?;
    pages::write(&file, PARTS[1]..PARTS[2], 1)?;
    file.flush(pages::bytes(PARTS[1]..PARTS[2]))?;
    for page in PARTS[2]..PARTS[3] {
        file.append(&pages::fill(page, 1))?;
    }
    file.flush(pages::bytes(PARTS[2]..PARTS[3]))?;
    // A hole that was punched stays one.
    file.punch_hole(pages::bytes(10..20))?;
    file.flush(0..PARTS[3] * PAGE)?;
    Ok(())
}

fn check(place: &Place) -> Outcome {
    let file: DaxFile = place.options().open(place.path(NAME))?;
    ensure!(file.len()? == PARTS[3] * PAGE, "the file has {} bytes", file.len()?);
    let mut all = vec![0; (PARTS[3] * PAGE) as usize];
    let map = file.map(0..PARTS[3] * PAGE)?;
    map.read(0, &mut all)?;
    let hole = pages::bytes(10..20);
    ensure!(all[hole.start as usize..hole.end as usize].iter().all(|b| *b == 0), "the hole is filled");
    pages::verify(&all[..hole.start as usize], 0, 1)?;
    pages::verify(&all[hole.end as usize..], 20, 1)?;
    drop(map);
    drop(file);
    std::fs::remove_file(place.path(NAME))?;
    Ok(())
}
