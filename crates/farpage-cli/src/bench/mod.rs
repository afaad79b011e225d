//! `farpage bench`: measures farpage beside the kernel's own swap.

use std::io;
use std::process::ExitStatus;

use crate::access::Pattern;
use crate::error::CliError;

mod bare;
mod cgroup;
pub mod data;
mod dax;
pub mod histogram;
pub mod memory;
pub mod plan;
pub mod proc;
mod report;
pub mod side;
mod stats;
mod swap;
mod sys;
mod zram;

/// `farpage bench …`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Side by side with the kernel's swap on zram: the same accesses, data and DRAM (needs root).
    Swap(plan::Args),
    /// DAX files of the library beside the bare system calls: mapping, pinning, punching.
    Dax(dax::Args),
}

/// Why a benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The sizes do not fit together.
    #[error("{0}")]
    Usage(String),
    /// Ctrl-C or another request to end.
    #[error("interrupted; swap device and control group were removed")]
    Interrupted,
    /// The same, where there was neither.
    #[error("interrupted; the file was removed")]
    Stopped,
    /// A run of the access program failed; it has said why.
    #[error("the {side:?} run of {pattern:?} failed: {status}")]
    Failed {
        /// On which side.
        side: side::Side,
        /// Doing what.
        pattern: Pattern,
        /// How it ended.
        status: ExitStatus,
    },
    /// A run printed something else than a result.
    #[error("the {side:?} run printed no result: {source}")]
    Result {
        /// On which side.
        side: side::Side,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl BenchError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> BenchError {
        move |source| BenchError::Io { what, source }
    }
}

impl From<BenchError> for CliError {
    fn from(error: BenchError) -> CliError {
        CliError::Other(error.to_string())
    }
}

/// Runs the benchmark and prints its report; 0 whatever the figures are.
pub fn run(args: Args) -> Result<u8, CliError> {
    match args.what {
        What::Swap(args) => Ok(swap::run(&args)?),
        What::Dax(args) => Ok(dax::run(&args)?),
    }
}
