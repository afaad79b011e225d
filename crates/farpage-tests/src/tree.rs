//! The process tree, as /proc shows it.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

/// Every living process below `root` (not `root` itself, no zombies), parents before children.
pub fn descendants(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut dead = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // "pid (name) state ppid …", and the name may hold anything.
        let mut fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
        if fields.next().is_some_and(|state| state == "Z" || state == "X") {
            dead.push(pid);
        }
        if let Some(parent) = fields.next().and_then(|p| p.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found.remove(0);
    found.retain(|pid| !dead.contains(pid));
    found
}

/// True for a process of farpage itself (the launcher and its helpers), false for the program's.
pub fn is_farpage(pid: u32) -> bool {
    let ours = crate::farpage().ok().and_then(|p| p.canonicalize().ok());
    let theirs = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    ours.is_some() && ours == theirs
}

/// The processes of the program that runs under the farpage process `root`.
pub fn program_processes(root: u32) -> Vec<u32> {
    let mut pids = descendants(root);
    pids.retain(|pid| !is_farpage(*pid));
    pids
}

/// What every thread of `pid` is doing, for the message of a test that hangs.
pub fn describe(pid: u32) -> String {
    let mut text = String::new();
    let base = Path::new("/proc").join(pid.to_string());
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let _ = writeln!(text, "process {pid} ({})", read(&base.join("comm")));
    for task in std::fs::read_dir(base.join("task")).into_iter().flatten().flatten() {
        let at = task.path();
        let state =
            read(&at.join("stat")).rsplit(')').next().unwrap_or("").trim().chars().next().unwrap_or('?');
        let call = read(&at.join("syscall"));
        let call = call.split(' ').next().unwrap_or("").to_owned();
        let _ = writeln!(
            text,
            "  thread {} ({}) state {state}, waits in {}, system call {call}",
            task.file_name().to_string_lossy(),
            read(&at.join("comm")),
            read(&at.join("wchan")),
        );
    }
    text
}
