//! What the control groups of this process leave of their memory limits (v1 and v2).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// v1 writes "no limit" as the largest number of pages; nothing real is larger than this.
const UNLIMITED: u64 = 1 << 60;

/// The limit that leaves the least, of all control groups above this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The directory of the control group that sets it.
    pub group: PathBuf,
    /// The limit in bytes.
    pub limit: u64,
    /// What may still be used, in bytes: the limit less what is used, page cache that can be dropped not counted.
    pub left: u64,
}

/// The tightest limit on this process; `None` if there is none. `root` is where `/proc` and the mounted
/// hierarchies are looked for: `/`, except in tests.
pub fn limit(root: &Path) -> Option<Limit> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read(root.join("proc/self/mountinfo")).ok()?;
    let mounts: Vec<Mount> = mounts.split(|&b| b == b'\n').filter_map(Mount::parse).collect();
    let mut tightest: Option<Limit> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let version = if controllers.is_empty() {
            Version::V2
        } else if controllers.split(',').any(|c| c == "memory") {
            Version::V1
        } else {
            continue;
        };
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        // A mount made later hides an earlier one at the same place.
        let Some(mount) = mounts.iter().rev().find(|m| m.version == version) else { continue };
        let top = under(root, &mount.point);
        for group in chain(&top, &mount.inside(Path::new(path))) {
            if let Some(limit) = version.read(&group)
                && tightest.as_ref().is_none_or(|t| limit.left < t.left)
            {
                tightest = Some(limit);
            }
        }
    }
    tightest
}

/// The group and all groups above it, up to the top of the mount.
fn chain(top: &Path, inside: &Path) -> Vec<PathBuf> {
    let group = top.join(inside);
    group.ancestors().take_while(|dir| dir.starts_with(top)).map(Path::to_owned).collect()
}

/// `path` (absolute) as found below `root`.
fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The limit that one group sets, if it sets one.
    fn read(self, group: &Path) -> Option<Limit> {
        let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        let (limit, used, prefix) = match self {
            // `memory.high` does not kill, but a program above it is slowed down to a crawl.
            Self::V2 => {
                let limit = [number("memory.max"), number("memory.high")].into_iter().flatten().min()?;
                (limit, number("memory.current")?, "")
            }
            Self::V1 => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?, "total_"),
        };
        if limit >= UNLIMITED {
            return None;
        }
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let field = |names: &[&str]| {
            names
                .iter()
                .filter_map(|name| {
                    stat.lines()
                        .find_map(|l| l.strip_prefix(prefix)?.strip_prefix(name)?.trim().parse::<u64>().ok())
                })
                .sum::<u64>()
        };
        // Clean pages of files can be dropped at once; dirty ones only after they have been written.
        let cache = field(&["inactive_file ", "active_file "]);
        let dirty = field(match self {
            Self::V2 => &["file_dirty ", "file_writeback "],
            Self::V1 => &["dirty ", "writeback "],
        });
        let used = used.saturating_sub(cache.saturating_sub(dirty));
        Some(Limit { group: group.into(), limit, left: limit.saturating_sub(used) })
    }
}

/// A mounted hierarchy that can hold memory limits.
#[derive(Debug)]
struct Mount {
    version: Version,
    /// Which group is mounted: `/`, or the container's own.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

impl Mount {
    /// Reads a line of `/proc/self/mountinfo`; `None` for everything that is not a memory hierarchy.
    fn parse(line: &[u8]) -> Option<Self> {
        // 31 23 0:28 ROOT POINT OPTIONS [TAGS…] - TYPE SOURCE SUPER_OPTIONS
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let dash = fields.iter().position(|f| *f == b"-")?;
        let version = match *fields.get(dash + 1)? {
            b"cgroup2" => Version::V2,
            b"cgroup" if fields.get(dash + 3)?.split(|&b| b == b',').any(|o| o == b"memory") => Version::V1,
            _ => return None,
        };
        Some(Self { version, root: unescape(fields.get(3)?).into(), point: unescape(fields.get(4)?).into() })
    }

    /// A group's path relative to the mount point. A group outside of what is mounted cannot be seen; the
    /// nearest that can be is the mounted one.
    fn inside(&self, group: &Path) -> PathBuf {
        match group.strip_prefix(&self.root) {
            Ok(rest) if rest.components().all(|c| matches!(c, Component::Normal(_))) => rest.into(),
            _ => PathBuf::new(),
        }
    }
}

/// Undoes the octal escapes (`\040` for a space) of mountinfo.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| OsStr::from_bytes(digits).to_str())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(cgroup: &str, mountinfo: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.file("proc/self/cgroup", cgroup);
            tree.file("proc/self/mountinfo", mountinfo);
            tree
        }
        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fn v2(&self, group: &str, max: &str, current: u64, stat: &str) {
            self.file(&format!("{group}/memory.max"), &format!("{max}\n"));
            self.file(&format!("{group}/memory.current"), &format!("{current}\n"));
            self.file(&format!("{group}/memory.stat"), stat);
        }
        fn v1(&self, group: &str, limit: u64, usage: u64, stat: &str) {
            self.file(&format!("{group}/memory.limit_in_bytes"), &format!("{limit}\n"));
            self.file(&format!("{group}/memory.usage_in_bytes"), &format!("{usage}\n"));
            self.file(&format!("{group}/memory.stat"), stat);
        }
        fn left(&self) -> Option<(String, u64, u64)> {
            let l = limit(self.0.path())?;
            let group = l.group.strip_prefix(self.0.path()).unwrap();
            Some((group.to_str().unwrap().trim_end_matches('/').into(), l.limit, l.left))
        }
    }

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "30 23 0:26 / /cg/cpu rw - cgroup cgroup rw,cpu\n\
                      35 31 0:32 / /cg/memory rw,relatime - cgroup cgroup rw,memory\n";

    #[test]
    fn no_hierarchy_is_no_limit() {
        assert_eq!(Tree::new("", "").left(), None);
        assert_eq!(Tree::new("0::/a\n", "").left(), None);
        let garbage = Tree::new("nonsense\n:\n0::/a\n", &format!("x - cgroup2\n\n{V2}"));
        garbage.file("sys/fs/cgroup/a/memory.max", "what");
        assert_eq!(garbage.left(), None);
    }

    #[test]
    fn v2_takes_the_ancestor_that_leaves_least() {
        let tree = Tree::new("0::/a/b/c\n", V2);
        tree.v2("sys/fs/cgroup/a/b/c", "max", 50, "");
        tree.v2("sys/fs/cgroup/a/b", "1000", 200, "");
        tree.v2("sys/fs/cgroup/a", "1500", 900, "");
        assert_eq!(tree.left(), Some(("sys/fs/cgroup/a".into(), 1500, 600)));
        tree.file("sys/fs/cgroup/a/b/memory.high", "700\n");
        assert_eq!(tree.left(), Some(("sys/fs/cgroup/a/b".into(), 700, 500)));
        // Used beyond the limit (it was lowered): nothing is left, and nothing wraps around.
        tree.v2("sys/fs/cgroup/a", "100", 900, "");
        assert_eq!(tree.left(), Some(("sys/fs/cgroup/a".into(), 100, 0)));
    }

    #[test]
    fn page_cache_that_can_be_dropped_is_not_used_memory() {
        let tree = Tree::new("0::/a\n", V2);
        let stat =
            "anon 300\nfile 600\ninactive_file 400\nactive_file 200\nfile_dirty 100\nfile_writeback 50\n";
        tree.v2("sys/fs/cgroup/a", "1000", 900, stat);
        assert_eq!(tree.left(), Some(("sys/fs/cgroup/a".into(), 1000, 1000 - (900 - 450))));
    }

    #[test]
    fn v1_reads_the_hierarchical_counters() {
        let tree = Tree::new("4:memory:/job\n1:cpu:/\n0::/\n", V1);
        tree.v1(
            "cg/memory/job",
            1000,
            900,
            "inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 100\ntotal_dirty 50\n",
        );
        tree.v1("cg/memory", 9_223_372_036_854_771_712, 5000, "");
        assert_eq!(tree.left(), Some(("cg/memory/job".into(), 1000, 1000 - (900 - 450))));
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_mount() {
        // The group's path is the host's, the mount's root is that group.
        let mounts = V1.replace("0:32 /", "0:32 /docker/abc");
        let tree = Tree::new("4:memory:/docker/abc/inner\n", &mounts);
        tree.v1("cg/memory", 1000, 100, "");
        tree.v1("cg/memory/inner", 800, 100, "");
        assert_eq!(tree.left(), Some(("cg/memory/inner".into(), 800, 700)));
        // A path outside of the mount: the mount itself.
        for outside in ["4:memory:/elsewhere\n", "4:memory:/docker/abc/../..\n", "4:memory:/docker/abcd\n"] {
            let tree = Tree::new(outside, &mounts);
            tree.v1("cg/memory", 1000, 100, "");
            assert_eq!(tree.left(), Some(("cg/memory".into(), 1000, 900)), "{outside}");
        }
    }

    #[test]
    fn both_versions_count_and_escaped_mount_points_are_found() {
        let mounts = format!("{V1}36 31 0:40 / /cg\\040two rw - cgroup2 cgroup2 rw\n");
        let tree = Tree::new("4:memory:/a\n0::/b (deleted)\n", &mounts);
        tree.v1("cg/memory/a", 1000, 100, "");
        tree.v2("cg two/b", "500", 100, "");
        assert_eq!(tree.left(), Some(("cg two/b".into(), 500, 400)));
    }
}
