//! `farpage dax hold`: pins a part of a file for as long as something else goes on.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use farpage::Pin;

use super::parse::{Part, show};
use super::stay::For;
use super::{DaxCommandError, Opening, open};
use crate::error::{CliError, system};

/// Arguments of `farpage dax hold`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file.
    file: PathBuf,
    /// Which bytes (each with K, M, G, T), for example 4M:64K; all of them by default.
    #[arg(long, value_name = "OFFSET:LENGTH")]
    range: Option<Part>,
    /// Gives up when another wants to cut what is held: a command is ended by SIGTERM first.
    #[arg(long)]
    long: bool,
    /// Holds off programs that do not use farpage, too: who opens the file waits, at most 45 s
    /// (/proc/sys/fs/lease-break-time). Not for a command that opens the file itself.
    #[arg(long)]
    lease: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    stay: For,
}

/// The bytes that are meant.
pub fn range_of(
    part: Option<Part>,
    file: &farpage::dax::DaxFile,
    what: &'static str,
) -> Result<Range<u64>, DaxCommandError> {
    match (part, file.len()?) {
        (Some(part), _) => Ok(part.range()),
        (None, 0) => Err(DaxCommandError::Empty { path: file.path().to_owned(), what }),
        (None, len) => Ok(0..len),
    }
}

/// Holds; gives the command's exit status, 0 for a time or until Ctrl-C, 1 if another wanted it.
pub fn run(args: &Args) -> Result<u8, CliError> {
    let (asked, ask) = std::io::pipe().map_err(system("making a pipe failed"))?;
    let mut options = args.opening.to_look().lease(args.lease);
    if args.long {
        options = options.on_revoke(move |range| {
            let bytes = [range.start.to_ne_bytes(), range.end.to_ne_bytes()].concat();
            // In one piece: it is smaller than any pipe's unit. If nobody reads any more it is about to be given up.
            let _asked = (&ask).write_all(&bytes);
        });
    }
    let file = open(&options, &args.file)?;
    let range = range_of(args.range, &file, "hold")?;
    let pin = file.pin(range, if args.long { Pin::LongTerm } else { Pin::Short });
    let pin = pin.map_err(DaxCommandError::from)?;
    if !args.stay.has_command() {
        let held =
            format!("holding {} of {}; Ctrl-C gives it up\n", show(&pin.range()), file.path().display());
        // Who closed the output still gets what he asked for.
        let _ = std::io::stdout().write_all(held.as_bytes());
    }
    let end = args.stay.stay(args.long.then_some(asked));
    // Before this process may end by a signal.
    drop(pin);
    drop(file);
    drop(options);
    Ok(end?.exit())
}
