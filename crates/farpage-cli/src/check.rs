//! `farpage check`: audits the counts of a process tree that runs under `farpage run`.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use farpage::domain::{Audit, Domain, DomainError, ENV_DOMAIN};
use rustix::process::Pid;

use crate::error::CliError;
use crate::run::tree;

/// What `/proc` says of a descriptor of a domain's segment.
const SEGMENT: &str = "/memfd:farpage (deleted)";

/// Arguments of `farpage check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A process under `farpage run`, or that `farpage run` itself.
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Prints everything that was found, as JSON.
    #[arg(long)]
    json: bool,
}

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// There is no such process.
    #[error("there is no process {0}: name one that runs under 'farpage run'")]
    NoProcess(i32),
    /// It is another user's, or more privileged.
    #[error("no permission to look at process {0}: check it as the user who started it, or as root")]
    Permission(i32),
    /// It has no domain.
    #[error("process {0} does not run under 'farpage run'")]
    NotManaged(i32),
    /// It is managed by something else.
    #[error("process {0} runs under another version of farpage: check it with that one")]
    OtherVersion(i32),
    /// The domain cannot be reached.
    #[error("cannot look at the managed memory of process {pid}: {source}")]
    Domain {
        /// The process.
        pid: i32,
        /// Why.
        source: DomainError,
    },
}

/// Prints the audit. The exit status is 0 if all is right, 1 if something differs.
pub fn run(args: Args) -> Result<u8, CliError> {
    let pid = args.pid;
    let domain = attach(pid)?;
    let audit = domain.audit().map_err(|source| CheckError::Domain { pid, source })?;
    let text = if args.json {
        let value = serde_json::to_string_pretty(&audit);
        value.map_err(|e| CliError::Other(format!("the audit cannot be written: {e}")))? + "\n"
    } else {
        describe(&audit)
    };
    // Who closed the output still gets the exit status.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(u8::from(!audit.is_right()))
}

fn describe(audit: &Audit) -> String {
    let Audit { frames, references, processes, moving, silent, .. } = audit;
    if !audit.is_right() {
        let frames = audit.differences.iter().map(ToString::to_string);
        return frames.chain(audit.charges.iter().map(ToString::to_string)).map(|l| l + "\n").collect();
    }
    let mut line = format!("all right: {frames} frames, {references} references, {processes} processes");
    if *moving > 0 {
        line += &format!("; {moving} frames were in motion all the time");
    }
    if !silent.is_empty() {
        let list: Vec<String> = silent.iter().map(ToString::to_string).collect();
        line += &format!("; DRAM not counted, no quiet moment in process {}", list.join(", "));
    }
    line + "\n"
}

/// The domain that a process belongs to.
fn attach(pid: i32) -> Result<Domain, CheckError> {
    let path = segment_of(pid)?.ok_or(CheckError::NotManaged(pid))?;
    Domain::attach(&path).map_err(|source| match source {
        DomainError::NotOurs => CheckError::OtherVersion(pid),
        DomainError::Sys { source: rustix::io::Errno::NOENT, .. } => CheckError::NotManaged(pid),
        DomainError::Sys { source: rustix::io::Errno::ACCESS | rustix::io::Errno::PERM, .. } => {
            CheckError::Permission(pid)
        }
        source => CheckError::Domain { pid, source },
    })
}

/// A path of the segment. A managed process has it open, and so has the keeper; a program that is not managed itself (linked
/// statically) has it in its environment; of the process that the user started it is a child's.
fn segment_of(pid: i32) -> Result<Option<String>, CheckError> {
    if !Path::new(&format!("/proc/{pid}")).exists() {
        return Err(CheckError::NoProcess(pid));
    }
    let refused = |e: io::Error| match e.kind() {
        ErrorKind::PermissionDenied => CheckError::Permission(pid),
        // It has ended just now.
        _ => CheckError::NoProcess(pid),
    };
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(refused)?;
    for fd in fds.flatten() {
        if std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == SEGMENT) {
            return Ok(Some(fd.path().to_string_lossy().into_owned()));
        }
    }
    let environ = std::fs::read(format!("/proc/{pid}/environ")).map_err(refused)?;
    let named = environ.split(|&b| b == 0).find_map(|var| {
        let value = var.strip_prefix(ENV_DOMAIN.as_bytes())?.strip_prefix(b"=")?;
        String::from_utf8(value.to_vec()).ok()
    });
    if named.is_some() {
        return Ok(named);
    }
    if !is_farpage(pid) {
        return Ok(None);
    }
    let keeper = Pid::from_raw(pid).into_iter().flat_map(tree::children_of);
    keeper.map(|child| segment_of(child.as_raw_nonzero().get())).find_map(Result::transpose).transpose()
}

/// Whether it is this command.
fn is_farpage(pid: i32) -> bool {
    let exe = |pid: &str| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let theirs = exe(&pid.to_string());
    theirs.is_some_and(|t| t.file_name() == exe("self").as_deref().and_then(Path::file_name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use farpage::domain::{ChargeDifference, Difference, Holding};

    #[test]
    fn one_line_if_all_is_right_and_one_a_difference_if_not() {
        let mut audit = Audit { frames: 3, references: 4, processes: 2, ..Audit::default() };
        assert_eq!(describe(&audit), "all right: 3 frames, 4 references, 2 processes\n");
        audit.moving = 1;
        audit.silent = vec![7, 9];
        assert!(describe(&audit).ends_with(
            "; 1 frames were in motion all the time; DRAM not counted, no quiet moment in process 7, 9\n"
        ));
        let held = |process, references| Holding { process, kind: "page entries", references };
        let difference =
            |frame, holders| Difference { device: "ram:1G".into(), frame, count: 2, references: 3, holders };
        audit.differences = vec![difference(5, vec![held(7, 2), held(9, 1)]), difference(6, vec![])];
        audit.charges = vec![ChargeDifference { process: 7, charged: 10, found: 12 }];
        assert_eq!(
            describe(&audit),
            "device ram:1G, frame 5: count 2, references found 3 \
             (process 7: 2 in page entries, process 9: 1 in page entries)\n\
             device ram:1G, frame 6: count 2, references found 3\n\
             process 7: charged for 10 pages of DRAM, has 12\n"
        );
    }
}
