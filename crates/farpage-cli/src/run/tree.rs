//! The children of this process, which as a subreaper include the orphans of its tree.

use std::fs;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, wait};

/// The children of this process, zombies included.
pub fn children() -> Vec<Pid> {
    children_of(getpid())
}

/// The children of a process, zombies included.
pub fn children_of(process: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
        .filter(|pid| parent(*pid) == Some(process))
        .collect()
}

/// The parent of a process, if it still exists.
fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // PID (NAME) STATE PARENT …; the name may hold anything, also parentheses.
    let after = stat.rsplitn(2, |&b| b == b')').next()?;
    std::str::from_utf8(after).ok()?.split_whitespace().nth(1)?.parse().ok().and_then(Pid::from_raw)
}

/// Ends every process of the tree: what a killed process leaves becomes a child of this one and is killed next.
/// Returns when no child is left, or none that this user may kill.
pub fn kill_all() {
    loop {
        let mut killed = false;
        for pid in children() {
            killed |= kill_process(pid, Signal::KILL).is_ok();
        }
        // One at a time: each death may bring new children.
        let options = if killed { WaitOptions::empty() } else { WaitOptions::NOHANG };
        match wait(options) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return,
        }
    }
}
