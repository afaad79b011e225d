//! The command `farpage`.
#![deny(unsafe_code)]

/// Says that a test could not be made, past the test harness, which hides what passing tests print.
#[cfg(test)]
macro_rules! skipped {
    ($($why:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", format_args!($($why)*));
    }};
}
#[cfg(test)]
pub(crate) use skipped;

mod access;
mod bench;
mod budget;
mod check;
mod dax;
mod demo;
mod doctor;
mod error;
mod human;
mod plainrefs;
mod probe;
mod program;
mod run;
mod sys;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::{CliError, EXIT_OWN};

/// Runs programs beyond their DRAM: their memory pages to compressed RAM and to disk.
#[derive(Debug, Parser)]
#[command(name = "farpage", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a program with at most so much DRAM.
    Run(run::Args),
    /// Compares all reference counts of a running program with the references that can be found.
    Check(check::Args),
    /// DAX files: who holds what of them, holding parts of them, cutting only what nobody holds.
    Dax(dax::Args),
    /// Shows what this machine offers and lacks, with the remedies.
    Doctor(doctor::Args),
    /// Shows a program that needs four times its DRAM at work, and checks its result.
    Demo(demo::Args),
    /// Measures farpage beside the kernel's own swap.
    Bench(bench::Args),
    /// The program that `bench` measures.
    #[command(hide = true)]
    Access(access::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::try_parse() {
        Ok(cli) => match cli.command {
            Command::Run(args) => run::run(args),
            Command::Check(args) => check::run(args),
            Command::Dax(args) => dax::run(args),
            Command::Doctor(args) => doctor::run(args),
            Command::Demo(args) => demo::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Access(args) => access::run(args),
        },
        Err(e) if !e.use_stderr() => {
            // `--help` and `--version`; a closed pipe is no reason to fail.
            let _ = e.print();
            Ok(0)
        }
        Err(e) if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = e.print();
            Ok(EXIT_OWN)
        }
        Err(e) => Err(CliError::Usage(one_sentence(&e.to_string()))),
    };
    ExitCode::from(outcome.unwrap_or_else(|e| {
        say(&e.to_string());
        e.exit_code()
    }))
}

/// Says one sentence on standard error. A closed standard error is no reason to fail.
fn say(sentence: &str) {
    let _ = writeln!(std::io::stderr(), "farpage: {sentence}");
}

/// The first paragraph of clap's message, without its `error: `, on one line.
fn one_sentence(message: &str) -> String {
    let first = message.split("\n\n").next().unwrap_or(message);
    first.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn messages_become_one_line() {
        assert_eq!(one_sentence("error: a\n  <B>\n\nUsage: c\n"), "a <B>");
    }
}
