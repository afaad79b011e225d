//! Tries DAX files (`farpage::dax`) with real processes: on a DAX file system in a virtual machine, and on any file
//! system through the page cache. Every case runs in a process of its own, so that a crash, a SIGBUS or a hang of one
//! is told like any other failure. The program needs nothing but itself: other processes are itself again.

mod cases;
mod device;
mod fuse;
mod pages;
mod peer;
mod place;
mod powerloss;
mod remount;
mod run;
mod storm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use place::{Expect, Place};

/// What a case, or a part of one, comes to.
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Fails the case, with what was found, unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($text:tt)+) => {
        if !$cond {
            return Err(format!($($text)+).into());
        }
    };
}

/// Tries DAX files.
#[derive(Debug, Parser)]
#[command(name = "farpage-dax-suite")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the cases in a directory.
    Run {
        #[command(flatten)]
        place: PlaceArgs,
        /// Only cases whose name holds this.
        #[arg(long)]
        only: Option<String>,
        /// A part of the case that goes over a remount: `write`, then unmount and mount, then `check`.
        #[arg(long)]
        phase: Option<remount::Phase>,
    },
    /// Names the cases, one a line.
    List {
        /// What the directory is expected to be.
        #[arg(long)]
        expect: Expect,
    },
    /// Tries a device-dax device.
    Devdax {
        /// The device.
        #[arg(long)]
        device: PathBuf,
        /// As for `run`.
        #[arg(long, default_value_t = 2)]
        seconds: u64,
    },
    /// Tries a FUSE file system that is served from a DAX file.
    Fuse {
        /// A directory on the file system that the file is to be on.
        #[arg(long, visible_alias = "source")]
        dir: PathBuf,
        /// Where it is mounted.
        #[arg(long)]
        mount: PathBuf,
        /// What the file system is expected to be.
        #[arg(long, default_value = "dax")]
        expect: Expect,
        /// As for `run`.
        #[arg(long, default_value_t = 2)]
        seconds: u64,
    },
    /// Writes records until the power goes, and looks afterwards for those that were said to be durable.
    Powerloss {
        #[command(subcommand)]
        command: powerloss::Command,
    },
    /// One case, in this process.
    #[command(hide = true)]
    Case {
        #[command(flatten)]
        place: PlaceArgs,
        name: String,
    },
    /// A helper process of a case.
    #[command(hide = true)]
    Peer {
        #[command(flatten)]
        place: PlaceArgs,
    },
}

/// Where, and what is expected there.
#[derive(Debug, Clone, Args)]
struct PlaceArgs {
    /// A directory on the file system to be tried.
    #[arg(long)]
    dir: PathBuf,
    /// What the file system is expected to be.
    #[arg(long)]
    expect: Expect,
    /// How long cases run that try random moments.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Where the tables are: without it a directory of each case's own.
    #[arg(long)]
    tables: Option<PathBuf>,
    /// Where a FUSE file system can be mounted: without it in a directory of the case's own.
    #[arg(long)]
    mount: Option<PathBuf>,
    /// A device-dax device, for `device`: without it a file in its place.
    #[arg(long)]
    device: Option<PathBuf>,
}

impl PlaceArgs {
    fn place(self) -> Place {
        let tables = self.tables.unwrap_or_else(|| PathBuf::from("/dev/shm"));
        Place {
            dir: self.dir,
            expect: self.expect,
            seconds: self.seconds,
            tables,
            mount: self.mount,
            device: self.device,
        }
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { place, phase: Some(phase), .. } => remount::run(&place.place(), phase),
        Command::Run { place, only, phase: None } => run::run(&place.place(), only.as_deref()),
        Command::List { expect } => {
            cases::all(expect).for_each(|case| println!("{}", case.name));
            ExitCode::SUCCESS
        }
        Command::Fuse { dir, mount, expect, seconds } => {
            let place = PlaceArgs { dir, expect, seconds, tables: None, mount: Some(mount), device: None };
            run::run(&place.place(), Some("fuse-"))
        }
        Command::Devdax { device, seconds } => {
            let args = PlaceArgs {
                dir: std::env::temp_dir(),
                expect: Expect::Device,
                seconds,
                tables: None,
                mount: None,
                device: Some(device),
            };
            run::run(&args.place(), None)
        }
        Command::Powerloss { command } => powerloss::run(command),
        Command::Case { place, name } => run::case(&place.place(), &name),
        Command::Peer { place } => peer::serve(&place.place()),
    }
}
