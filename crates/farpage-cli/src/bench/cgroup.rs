//! A memory control group (version 1 or 2) with a limit, removed when dropped.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why there is no control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Neither version offers the memory controller here.
    #[error(
        "no memory control group can be made here: mount the memory controller (cgroup v1) or enable it for the root's children (cgroup v2)"
    )]
    None,
    /// A step failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// A control group that limits DRAM and allows swap.
pub struct Cgroup {
    dir: PathBuf,
    version: u8,
}

impl Cgroup {
    /// A group limited to `bytes` of DRAM, with as much swap as there is. Needs root.
    pub fn new(bytes: u64) -> Result<Cgroup, CgroupError> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (version, parent) = parent(&mounts, &own).ok_or(CgroupError::None)?;
        let dir = parent.join(format!("farpage-bench-{}", std::process::id()));
        fs::create_dir(&dir).map_err(io(format!("make {}", dir.display())))?;
        let group = Cgroup { dir, version };
        if version == 1 {
            group.set("memory.limit_in_bytes", &bytes.to_string())?;
            group.set("memory.swappiness", "100")?;
        } else {
            group.set("memory.max", &bytes.to_string())?;
            group.set("memory.swap.max", "max")?;
        }
        Ok(group)
    }

    /// Where it is; a process enters by writing to `cgroup.procs` there.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is, in words.
    pub fn describe(&self) -> String {
        format!("cgroup v{}", self.version)
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.dir.join(file);
        fs::write(&path, value).map_err(io(format!("write '{value}' to {}", path.display())))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has just ended may still be counted for a moment.
        let start = Instant::now();
        while let Err(error) = fs::remove_dir(&self.dir) {
            if start.elapsed() > Duration::from_secs(5) {
                let _ = writeln!(io::stderr(), "farpage: cannot remove {}: {error}", self.dir.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The version and the directory to make a group in: for v1 our own group where it can be seen (so
/// that its limits hold on), else the root.
fn parent(mounts: &str, own: &str) -> Option<(u8, PathBuf)> {
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(1);
        let (Some(dir), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let dir = PathBuf::from(dir);
        if kind == "cgroup" && options.split(',').any(|o| o == "memory") {
            // A line is ID:CONTROLLERS:PATH.
            let own = own.lines().find_map(|l| l.split_once(":memory:"));
            let path = own.map_or("/", |(_, path)| path);
            let inner = dir.join(path.trim_start_matches('/'));
            return Some((1, if inner.join("cgroup.procs").exists() { inner } else { dir }));
        }
        let enabled = || fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
        if kind == "cgroup2" && enabled().split_ascii_whitespace().any(|c| c == "memory") {
            return Some((2, dir));
        }
    }
    None
}

fn io(what: String) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_controller_of_version_1() {
        let mounts = "cgroup /nowhere/cpu cgroup rw,cpu 0 0\ncgroup /nowhere/mem cgroup rw,memory 0 0\n";
        let own = "5:cpu:/a\n4:memory:/b/c\n";
        assert_eq!(parent(mounts, own), Some((1, "/nowhere/mem".into())));
        assert_eq!(parent("tmpfs /x tmpfs rw 0 0\nnonsense\n", own), None);
        assert_eq!(parent("cgroup2 /nowhere cgroup2 rw 0 0\n", own), None);
    }

    #[test]
    fn stays_within_its_own_group_where_it_can_be_seen() {
        let root = std::env::temp_dir().join(format!("farpage-cgroup-test-{}", std::process::id()));
        fs::create_dir_all(root.join("b/c")).unwrap();
        fs::write(root.join("b/c/cgroup.procs"), "").unwrap();
        fs::write(root.join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        let v1 = format!("cgroup {} cgroup rw,memory 0 0\n", root.display());
        let v2 = format!("cgroup2 {} cgroup2 rw 0 0\n", root.display());
        let found = (parent(&v1, "4:memory:/b/c\n"), parent(&v2, "0::/\n"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, (Some((1, root.join("b/c"))), Some((2, root))));
    }
}
