//! `farpage dax`: DAX files from a shell. Who holds what of them; holding; cutting only what nobody holds.

mod cut;
mod error;
mod extents;
mod hold;
pub mod look;
mod ls;
mod map;
mod parse;
mod stay;

use std::path::{Path, PathBuf};
use std::time::Duration;

use farpage::dax::{DaxFile, DaxOptions};

pub use error::DaxCommandError;
pub use parse::parse_time;

use crate::error::CliError;

/// `farpage dax …`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Lists the DAX files that are in use: by whom, and what each holds. 0 if all counts are right, 1 if not.
    Ls(ls::Args),
    /// Maps a file and says how: DAX or not and why not, MAP_SYNC, holes, alignment, 2 MiB pages.
    Map(map::Args),
    /// Pins a part of a file while a command runs, for a time, or until Ctrl-C: nobody who uses farpage cuts it.
    Hold(hold::Args),
    /// Sets a file's length, once nobody holds what is cut off.
    Truncate(cut::TruncateArgs),
    /// Gives blocks of a part back to the file system, once nobody holds them; it reads as zeros then.
    Punch(cut::PartArgs),
    /// Makes a part zero, once nobody holds it; its blocks stay.
    Zero(cut::PartArgs),
    /// Takes a part out, of whole blocks, once nobody holds it or what follows; that moves up.
    Collapse(cut::PartArgs),
}

/// How a file is opened.
#[derive(Debug, clap::Args)]
struct Opening {
    /// Accepts a file that is not DAX: everything means the same, through the page cache.
    #[arg(long)]
    page_cache: bool,
    /// How long those are waited for who hold what is in the way (a whole number with ms, s, m, h or d).
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    timeout: Duration,
}

impl Opening {
    fn options(&self) -> DaxOptions {
        DaxOptions::new().page_cache(self.page_cache).map_sync(false).lease(false).wait(self.timeout)
    }

    /// For what changes no byte: it needs no right to write.
    fn to_look(&self) -> DaxOptions {
        self.options().read_only(true)
    }
}

/// Opens a file by a name that others understand as well: it is what they see in its table.
fn open(options: &DaxOptions, path: &Path) -> Result<DaxFile, DaxCommandError> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    Ok(options.open(absolute)?)
}

/// Runs it; gives the exit status.
pub fn run(args: Args) -> Result<u8, CliError> {
    use farpage::dax::Change;
    match args.what {
        What::Ls(args) => ls::run(&args),
        What::Map(args) => map::run(&args),
        What::Hold(args) => hold::run(&args),
        What::Truncate(args) => cut::truncate(&args),
        What::Punch(args) => cut::part(&args, Change::PunchHole),
        What::Zero(args) => cut::part(&args, Change::ZeroRange),
        What::Collapse(args) => cut::part(&args, Change::CollapseRange),
    }
}
