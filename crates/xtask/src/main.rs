//! What the project does to itself, as `cargo xtask COMMAND`.
#![forbid(unsafe_code)]

mod dax_vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What the project does to itself.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tests DAX files and device-dax in a virtual machine that has persistent memory.
    DaxVm(dax_vm::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::DaxVm(args) => dax_vm::run(&args),
    }
}
