//! `farpage dax ls`: who uses which DAX file, and what he holds of it.

use std::fmt::Write as _;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use farpage::dax::{Access, DaxError, DaxOptions, Difference, TableError, User, tables};
use farpage::size::format_size;
use rustix::fs::{FileType, Mode, OFlags};
use serde_json::{Value, json};

use super::parse::show;
use super::{DaxCommandError, open};
use crate::error::CliError;

/// Arguments of `farpage dax ls`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these files.
    files: Vec<PathBuf>,
    /// Prints it as JSON.
    #[arg(long)]
    json: bool,
}

/// A file and its users.
#[derive(Debug)]
struct Used {
    path: PathBuf,
    /// Length in bytes, and whether its pages are its storage; `None` where it cannot be found by its name.
    file: Option<(u64, bool)>,
    users: Vec<User>,
    differences: Vec<Difference>,
}

/// One that cannot be looked at: whose, and why.
#[derive(Debug)]
struct Hidden {
    path: PathBuf,
    why: String,
}

/// Prints them.
pub fn run(args: &Args) -> Result<u8, CliError> {
    let (used, hidden) = if args.files.is_empty() { all()? } else { these(&args.files)? };
    let text = if args.json {
        format!("{:#}\n", as_json(&used, &hidden))
    } else if used.is_empty() && hidden.is_empty() {
        "no DAX file is in use by farpage\n".to_owned()
    } else {
        used.iter().map(describe).chain(hidden.iter().map(Hidden::line)).collect()
    };
    // Who closed the output still gets the exit status.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(u8::from(used.iter().any(|used| !used.differences.is_empty())))
}

fn all() -> Result<(Vec<Used>, Vec<Hidden>), DaxCommandError> {
    let (mut used, mut hidden) = (Vec::new(), Vec::new());
    for table in tables().map_err(DaxCommandError::Tables)? {
        match table {
            Ok(info) => used.push(Used {
                file: size_and_access(&info.file),
                path: info.file,
                users: info.users,
                differences: info.differences,
            }),
            Err((path, why)) => hidden.push(Hidden { path, why: reason(why) }),
        }
    }
    used.sort_by(|a, b| a.path.cmp(&b.path));
    hidden.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((used, hidden))
}

fn these(files: &[PathBuf]) -> Result<(Vec<Used>, Vec<Hidden>), DaxCommandError> {
    let (mut used, mut hidden) = (Vec::new(), Vec::new());
    let options = DaxOptions::new().page_cache(true).map_sync(false).read_only(true).lease(false);
    for path in files {
        let file = match open(&options, path) {
            Ok(file) => file,
            Err(DaxCommandError::Library(DaxError::Table {
                why: why @ (TableError::Foreign(_) | TableError::Untrusted(_)),
                ..
            })) => {
                hidden.push(Hidden { path: path.clone(), why: reason(why) });
                continue;
            }
            Err(e) => return Err(e),
        };
        let mut users = file.users();
        // We are one for the time of looking.
        users.retain(|user| user.pid != std::process::id() || !user.holds.is_empty());
        used.push(Used {
            path: path.clone(),
            file: Some((file.len()?, file.access() != Access::PageCache)),
            users,
            differences: file.audit(),
        });
    }
    Ok((used, hidden))
}

fn reason(why: TableError) -> String {
    match why {
        TableError::Foreign(uid) => format!("in use by user {uid}: only that user and root can look"),
        TableError::Untrusted(uid) => {
            format!("in use by user {uid}, who does not own it and so cannot be trusted")
        }
        why => format!("cannot be looked at: {why}"),
    }
}

/// By name, as it was when it was opened first: it may be another's by now, or nobody's.
fn size_and_access(path: &Path) -> Option<(u64, bool)> {
    // Without opening it, which would end leases.
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    (path.is_absolute() && is_file)
        .then(|| Some((stat.st_size as u64, farpage::sys::dax::is_dax(file.as_fd()).ok()?)))?
}

fn access(direct: bool) -> &'static str {
    if direct { "direct access" } else { "page cache" }
}

impl Hidden {
    fn line(&self) -> String {
        format!("{}: {}\n", self.path.display(), self.why)
    }
}

fn describe(used: &Used) -> String {
    let file = used.file.map_or_else(
        || "not found by this name".to_owned(),
        |(size, direct)| format!("{}, {}", format_size(size), access(direct)),
    );
    let mut text = format!("{}: {file}", used.path.display());
    if used.users.is_empty() {
        text += ", not in use";
    }
    text.push('\n');
    for user in &used.users {
        let holds: Vec<String> =
            user.holds.iter().map(|hold| format!("{} of {}", hold.kind, show(&hold.range))).collect();
        let holds = if holds.is_empty() { "open, nothing held".to_owned() } else { holds.join(", ") };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {} {}: {holds}", user.pid, user.command);
    }
    for difference in &used.differences {
        let _ = writeln!(
            text,
            "  WRONG: the page at {} has the count {}, but {} references are recorded",
            format_size(difference.offset),
            difference.count,
            difference.recorded
        );
    }
    text
}

fn as_json(used: &[Used], hidden: &[Hidden]) -> Value {
    let user = |user: &User| {
        let hold = |hold: &farpage::dax::Holding| json!({ "kind": hold.kind.to_string(), "start": hold.range.start, "end": hold.range.end });
        let holds: Vec<Value> = user.holds.iter().map(hold).collect();
        json!({ "pid": user.pid, "command": user.command, "holds": holds })
    };
    let difference = |d: &Difference| json!({ "offset": d.offset, "count": d.count, "recorded": d.recorded });
    let files: Vec<Value> = used
        .iter()
        .map(|used| {
            json!({
                "path": used.path.to_string_lossy(),
                "size": used.file.map(|(size, _)| size),
                "access": used.file.map(|(_, direct)| access(direct)),
                "users": used.users.iter().map(user).collect::<Vec<_>>(),
                "differences": used.differences.iter().map(difference).collect::<Vec<_>>(),
            })
        })
        .collect();
    let hidden: Vec<Value> =
        hidden.iter().map(|h| json!({ "path": h.path.to_string_lossy(), "why": h.why })).collect();
    json!({ "files": files, "hidden": hidden })
}

#[cfg(test)]
mod tests {
    use super::*;
    use farpage::dax::Holding;
    use farpage::frame::ledger::HolderKind;

    #[test]
    fn one_line_a_user_and_one_a_difference() {
        let hold = |kind, range| Holding { kind, range };
        let holds = vec![hold(HolderKind::Mapping, 0..4 << 20), hold(HolderKind::LongPin, 4096..8192)];
        let mut used = Used {
            path: "/mnt/log".into(),
            file: Some((4 << 20, true)),
            users: vec![
                User { pid: 7, command: "db".into(), holds },
                User { pid: 9, command: "cp".into(), holds: vec![] },
            ],
            differences: vec![Difference { offset: 4096, count: 3, recorded: 2 }],
        };
        assert_eq!(
            describe(&used),
            "/mnt/log: 4M, direct access\n  \
             7 db: mapping of 0..4M, long-term pin of 4K..8K\n  \
             9 cp: open, nothing held\n  \
             WRONG: the page at 4K has the count 3, but 2 references are recorded\n"
        );
        let json = as_json(std::slice::from_ref(&used), &[]);
        assert_eq!(json["files"][0]["users"][0]["holds"][1]["kind"], "long-term pin");
        assert_eq!(json["files"][0]["differences"][0]["recorded"], 2);
        (used.file, used.users, used.differences) = (None, vec![], vec![]);
        assert_eq!(describe(&used), "/mnt/log: not found by this name, not in use\n");
    }

    #[test]
    fn others_files_get_one_clear_line() {
        let hidden = Hidden { path: "/dev/shm/t".into(), why: reason(TableError::Foreign(1000)) };
        assert_eq!(hidden.line(), "/dev/shm/t: in use by user 1000: only that user and root can look\n");
    }
}
