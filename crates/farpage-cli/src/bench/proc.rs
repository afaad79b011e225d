//! What `/proc` says about a process and the processes it started.

use std::fs;

/// Faults of this process so far: minor and major. Swap-ins are major; a fault that userfaultfd resolved
/// counts as minor on some kernels and as major on others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// Resolved without waiting.
    pub minor: u64,
    /// Resolved from a device.
    pub major: u64,
}

/// The faults of this process, all threads; zero where `/proc` cannot be read.
pub fn faults() -> Faults {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    parse_faults(&stat)
}

fn parse_faults(stat: &str) -> Faults {
    Faults { minor: stat_field(stat, 10).unwrap_or(0), major: stat_field(stat, 12).unwrap_or(0) }
}

/// The processor's name; empty where `/proc` does not tell.
pub fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(": "));
    line.map(|(_, name)| name.trim().to_owned()).unwrap_or_default()
}

/// Field `n` of a `/proc/PID/stat` line, counted from 1 as proc(5) does; the command name may hold
/// anything, so counting starts after its last parenthesis.
fn stat_field(stat: &str, n: usize) -> Option<u64> {
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(n.checked_sub(3)?)?.parse().ok()
}

/// The process and everything below it, as far as `/proc` shows it now.
pub fn tree(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, u32::try_from(stat_field(&stat, 4)?).ok()?))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(pid, p)| *p == parent && *pid != root).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

/// Bytes of anonymous memory of a process that are in DRAM; `None` once it is gone.
pub fn rss_anon(pid: u32) -> Option<u64> {
    field_kib(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "RssAnon:")
}

/// Bytes of memory that could be used now without swapping.
pub fn available_memory() -> Option<u64> {
    field_kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn field_kib(text: &str, name: &str) -> Option<u64> {
    let kib: u64 =
        text.lines().find_map(|l| l.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Nanoseconds of CPU that all threads of a process but the calling one have used; 0 once it is gone.
pub fn others_cpu_ns(pid: u32) -> u64 {
    let me = rustix::thread::gettid().as_raw_nonzero().to_string();
    fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(|task| Some(task.ok()?.path()).filter(|path| !path.ends_with(&me)))
        .filter_map(|path| fs::read_to_string(path.join("schedstat")).ok())
        .filter_map(|s| s.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

/// The largest resident set seen in a process tree.
pub struct PeakRss {
    root: u32,
    tree: Vec<u32>,
    samples: u32,
    /// Bytes of anonymous DRAM in the whole tree at the last sample.
    pub now: u64,
    /// The most that a sample saw.
    pub peak: u64,
}

impl PeakRss {
    /// Watches `root` and what it starts.
    pub fn new(root: u32) -> PeakRss {
        PeakRss { root, tree: Vec::new(), samples: 0, now: 0, peak: 0 }
    }

    /// Looks once. Processes are searched for at the first eight looks and then at every eighth, because
    /// that is dear.
    pub fn sample(&mut self) {
        if self.samples < 8 || self.samples.is_multiple_of(8) {
            self.tree = tree(self.root);
        }
        self.samples += 1;
        self.now = self.tree.iter().filter_map(|pid| rss_anon(*pid)).sum();
        self.peak = self.peak.max(self.now);
    }

    /// Faults of the tree so far, without those of processes that have ended.
    pub fn faults(&self) -> u64 {
        let stat = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        self.tree.iter().filter_map(stat).map(|s| parse_faults(&s)).map(|f| f.minor + f.major).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_after_a_strange_name() {
        let stat = "12 (a ) b (c) S 7 12 12 0 -1 4194560 111 0 222 0 5 6 0 0 20 0 1";
        assert_eq!(stat_field(stat, 4), Some(7));
        assert_eq!(parse_faults(stat), Faults { minor: 111, major: 222 });
        assert_eq!(parse_faults("nonsense"), Faults { minor: 0, major: 0 });
    }

    #[test]
    fn sees_itself_and_a_child() {
        let me = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let tree = tree(me);
        let _ = child.kill();
        let _ = child.wait();
        assert!(tree.contains(&me) && tree.contains(&child.id()));
        assert!(rss_anon(me).unwrap() > 4096);
        assert!(others_cpu_ns(child.id()) == 0 && others_cpu_ns(1) > 0);
    }

    #[test]
    fn kib_fields() {
        assert_eq!(field_kib("A: 1\nRssAnon:\t   12 kB\n", "RssAnon:"), Some(12288));
        assert_eq!(field_kib("RssAnon: x kB", "RssAnon:"), None);
        assert_eq!(field_kib("", "RssAnon:"), None);
    }
}
