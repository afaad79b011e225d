//! `farpage run`: starts a program whose memory farpage manages.
//!
//! Three processes take part, in one process group:
//!
//! * the **front**, which the user started: it passes signals on, stops when the program stops, and ends as
//!   the program ended;
//! * its child, the **keeper**: it owns the domain, is the program's parent and adopts every orphan of its
//!   tree, so it learns of every death;
//! * the **program**, and whatever it starts.
//!
//! If the front is killed, the keeper ends the tree; if the keeper is killed, the front does. So nothing stays behind.

mod auditor;
mod front;
mod keeper;
pub mod library;
mod report;
pub mod tree;

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farpage::device::spec::Spec;
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::budget::{self, BudgetError, Dram, Plan};
use crate::error::{CliError, system};
use crate::human::human;
use crate::program::{self, Program};
use crate::{plainrefs, probe, say, sys};
use farpage::domain::Config;
use farpage::size::parse_size;

/// Set for the program: where the domain is. Its presence means that this process is managed already.
pub const DOMAIN_VARIABLE: &str = "FARPAGE_DOMAIN";

/// Arguments of `farpage run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The most DRAM that the managed memory of the program and its children may occupy (bytes, or with K, M, G,
    /// T), or `auto`: a share of what the memory limit of this control group, or the machine, leaves.
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = parse_dram)]
    dram: Dram,
    /// Where pages live that are not in DRAM: `ram[:SIZE]` (compressed), `file:DIR[:SIZE]`, `mem:SIZE` (uncompressed), `generic:SOURCE[:SIZE]`
    /// or `coherent:SOURCE[:SIZE]` (a device-dax node, a file on DAX or hugetlbfs, `memfd`, `hugetlb`), `numa:NODE:SIZE`; repeat it in
    /// order of preference. Default: `ram`, then `file` in the temporary directory.
    #[arg(long = "device", value_name = "SPEC")]
    devices: Vec<Spec>,
    /// The smallest anonymous mapping that is managed.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    min_size: u64,
    /// Prints a summary at the end, on standard error.
    #[arg(long)]
    stats: bool,
    /// Writes all counters to a file at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,
    /// When DRAM and all devices are full, new mappings fail with ENOMEM instead of exceeding the DRAM budget.
    #[arg(long)]
    strict: bool,
    /// Audits the reference counts every so many milliseconds, before a dead process's references are given back, and at
    /// the end; a difference makes the exit status 125.
    #[arg(long, value_name = "MS", hide = true)]
    audit: Option<u64>,
    /// Says what is decided, on standard error.
    #[arg(long, short)]
    verbose: bool,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

fn parse_dram(text: &str) -> Result<Dram, String> {
    if text == "auto" { Ok(Dram::Auto) } else { parse_size(text).map(Dram::Bytes).map_err(|e| e.to_string()) }
}

/// Everything that was decided before the first process is made.
struct Job {
    config: Config,
    program: Program,
    command: Vec<OsString>,
    stats: bool,
    stats_json: Option<File>,
    audit: Option<Duration>,
}

/// Runs the program; gives its exit status, or ends this process by the signal that ended the program.
pub fn run(args: Args) -> Result<u8, CliError> {
    let job = prepare(args)?;
    // Before the fork, so that no signal is lost and none ends the front before it can pass it on.
    let signals = sys::Signals::take().map_err(system("taking over signals failed"))?;
    let front = pidfd_open(getpid(), PidfdFlags::empty()).map_err(system("pidfd_open failed"))?;
    rustix::process::set_child_subreaper(Some(getpid())).map_err(system("becoming subreaper failed"))?;
    let front_pid = getpid();
    match sys::fork().map_err(system("starting a process failed"))? {
        Some(keeper) => {
            drop(job);
            front::run(keeper, &signals)
        }
        None => {
            let code = keeper::run(job, &signals, front_pid, &front).unwrap_or_else(|e| {
                say(&e.to_string());
                e.exit_code()
            });
            std::process::exit(code.into())
        }
    }
}

/// Checks everything that can be checked before a process is made.
fn prepare(args: Args) -> Result<Job, CliError> {
    if std::env::var_os(DOMAIN_VARIABLE).is_some() {
        return Err(CliError::Nested);
    }
    if sys::privileged_by_file() {
        return Err(CliError::Privileged);
    }
    if args.min_size < budget::MIN_MIN_SIZE {
        return Err(BudgetError::MinSizeTooSmall(args.min_size).into());
    }
    let memory = budget::memory(Path::new("/"))?;
    let devices = if args.devices.is_empty() { default_devices(args.verbose) } else { args.devices };
    let plan = budget::plan(args.dram, &devices, &memory)?;
    let (name, _) = args.command.split_first().ok_or_else(|| CliError::Usage("no program given".into()))?;
    let program = program::resolve(name, std::env::var_os("PATH").as_deref())?;
    let access = probe::check()?;
    let stats_json = args.stats_json.map(|path| open_output(&path)).transpose()?;
    if args.verbose {
        explain(&plan, &memory, &program);
        if !probe::fork_events(access) {
            say("without CAP_SYS_PTRACE only forks through the C library are managed, not raw system calls");
        }
    }
    let inherited = plainrefs::inherited_carrier();
    if inherited && args.verbose {
        say(
            "page frames are not recycled: the program inherits a descriptor with which the kernel may hold pages unseen",
        );
    }
    let config = Config {
        dram: plan.dram,
        min_size: args.min_size,
        strict: args.strict,
        verbose: args.verbose,
        recycle: !inherited,
        max_pinned: None,
        devices: plan.devices,
    };
    let audit = args.audit.map(Duration::from_millis);
    Ok(Job { config, program, command: args.command, stats: args.stats, stats_json, audit })
}

fn default_devices(verbose: bool) -> Vec<Spec> {
    let (temp, refused) = budget::temp_dir(budget::candidates());
    if verbose {
        for r in &refused {
            say(&format!("no pages in {}: {}", r.dir.display(), r.why));
        }
        if temp.is_none() {
            say(
                "no temporary directory on a disk: only compressed RAM is used; name one with --device file:DIR",
            );
        }
    }
    budget::default_devices(temp)
}

/// Opens the file for the counters; what it holds stays until the end.
fn open_output(path: &Path) -> Result<File, CliError> {
    let opened = File::options().write(true).create(true).truncate(false).open(path);
    opened.map_err(|source| CliError::Output { path: path.into(), source })
}

fn explain(plan: &Plan, memory: &budget::Memory, program: &Program) {
    match &memory.limit {
        Some(limit) => say(&format!(
            "control group {} limits memory to {}, {} of it is left",
            limit.group.display(),
            human(limit.limit),
            human(limit.left)
        )),
        None => say(&format!("no memory limit; {} of memory is available", human(memory.available))),
    }
    say(&format!("DRAM budget {}", human(plan.dram)));
    for device in &plan.devices {
        say(&format!("device {}", device));
    }
    say(&format!("program {}", program.path.display()));
}
