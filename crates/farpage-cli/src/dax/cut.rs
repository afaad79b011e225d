//! `farpage dax truncate`, `punch`, `zero`, `collapse`: cutting what nobody holds.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use farpage::dax::{Change, DaxError, Wait};
use farpage::size::parse_size;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::parse::Part;
use super::{DaxCommandError, Opening, open};
use crate::error::{CliError, system};
use crate::{say, sys};

/// Arguments of `farpage dax truncate`.
#[derive(Debug, clap::Args)]
pub struct TruncateArgs {
    /// The file.
    file: PathBuf,
    /// Its new length (bytes, or with K, M, G, T).
    #[arg(value_parser = parse_size)]
    size: u64,
    #[command(flatten)]
    opening: Opening,
}

/// Arguments of the others.
#[derive(Debug, clap::Args)]
pub struct PartArgs {
    /// The file.
    file: PathBuf,
    /// Which bytes (each with K, M, G, T), for example 4M:64K.
    #[arg(value_name = "OFFSET:LENGTH")]
    part: Part,
    #[command(flatten)]
    opening: Opening,
}

/// See [`DaxFile::truncate`](farpage::dax::DaxFile::truncate).
pub fn truncate(args: &TruncateArgs) -> Result<u8, CliError> {
    cut(&args.file, &args.opening, Change::Truncate(args.size))
}

/// Changes a part.
pub fn part(args: &PartArgs, change: fn(Range<u64>) -> Change) -> Result<u8, CliError> {
    cut(&args.file, &args.opening, change(args.part.range()))
}

/// A signal that is to end the wait.
struct Stop {
    came: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
}

impl Stop {
    fn new() -> Result<Self, CliError> {
        let (came, which) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
            // The number first: who sees that one came knows which.
            signal_hook::flag::register_usize(signal, which.clone(), signal as usize)
                .and_then(|_| signal_hook::flag::register(signal, came.clone()))
                .map_err(system("handling signals failed"))?;
        }
        Ok(Self { came, which })
    }
}

fn cut(path: &Path, opening: &Opening, change: Change) -> Result<u8, CliError> {
    let stop = Stop::new()?;
    let file = open(&opening.options(), path)?;
    let wait = Wait { timeout: opening.timeout, stop: Some(&stop.came) };
    let done = file.change(change, &wait);
    // Its table goes with it, whatever comes now.
    drop(file);
    match done {
        Ok(()) => Ok(0),
        Err(e @ DaxError::Interrupted { .. }) => {
            say(&format!("{e}; nothing was changed"));
            sys::die_of(stop.which.load(Ordering::SeqCst) as i32)
        }
        Err(e) => Err(DaxCommandError::from(e).into()),
    }
}
