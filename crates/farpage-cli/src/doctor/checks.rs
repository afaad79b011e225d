//! The checks of `farpage doctor`. Each does what `farpage run` would do, where that leaves nothing behind.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use farpage::Page;
use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::budget::{self, Dram};
use crate::human::human;
use crate::probe::{self, Access, Unsupported};
use crate::run::library::Library;

/// All checks, in the order in which they are shown.
pub fn all() -> Vec<Check> {
    let mut checks = vec![kernel()];
    checks.extend(userfaultfd());
    checks.extend([library(), seccomp(), io_uring()]);
    checks.extend([temporary_directory(), memory(), cgroup(), address_space(), huge_pages(), cpus()]);
    checks.push(own_memory());
    checks.extend(super::dax::checks());
    checks.push(zram());
    checks
}

fn kernel() -> Check {
    match probe::kernel() {
        Ok(release) => Check::ok("kernel", format!("Linux {release}")),
        Err(e) => Check::failure("kernel", &e.to_string()),
    }
}

/// Access, events, and the two operations.
fn userfaultfd() -> Vec<Check> {
    const NAMES: [&str; 4] = ["userfaultfd", "events", "UFFDIO_MOVE", "UFFDIO_POISON"];
    let access = match probe::open() {
        Ok(access) => access,
        Err(e) => {
            let mut checks = vec![Check::failure(NAMES[0], &e.to_string())];
            let untried = "not tried: needs userfaultfd first";
            checks.extend(NAMES[1..].iter().map(|&name| Check::failure(name, untried)));
            return checks;
        }
    };
    let how = match access {
        Access::Syscall => "by system call",
        Access::Device => "through /dev/userfaultfd",
    };
    let tried = |name, outcome: Result<(), Unsupported>| match outcome {
        Ok(()) => Check::ok(name, "works"),
        Err(e) => Check::failure(name, &e.to_string()),
    };
    vec![
        Check::ok(NAMES[0], format!("full access {how}")),
        tried(NAMES[1], probe::features(access)),
        tried(NAMES[2], probe::try_move(access)),
        tried(NAMES[3], probe::try_poison(access)),
        fork_events(access),
    ]
}

fn fork_events(access: Access) -> Check {
    const NAME: &str = "fork events";
    if probe::fork_events(access) {
        return Check::ok(NAME, "the kernel reports forks");
    }
    Check::warning(
        NAME,
        "the kernel reports no forks to this user; those through the C library are managed all the same",
        "for programs that make the system call themselves: run with CAP_SYS_PTRACE",
    )
}

fn library() -> Check {
    match Library::create() {
        Ok(_) => Check::ok("library", "an executable memory file can be made and mapped"),
        Err(e) => Check::failure("library", &e.to_string()),
    }
}

fn seccomp() -> Check {
    const NAME: &str = "seccomp listener";
    match probe::seccomp_listener() {
        Ok(()) => Check::ok(NAME, "system calls can be watched"),
        Err(e) => Check::warning(
            NAME,
            format!("system calls cannot be watched ({e})"),
            "DRAM frames may be recycled less; permit seccomp filters in this sandbox (CONFIG_SECCOMP_FILTER)",
        ),
    }
}

fn io_uring() -> Check {
    match probe::io_uring() {
        Ok(()) => Check::ok("io_uring", "available to file devices"),
        Err(e) => Check::warning(
            "io_uring",
            format!("not available ({e})"),
            "file devices use pread and pwrite; permit it with `sysctl kernel.io_uring_disabled=0` or in this sandbox",
        ),
    }
}

fn temporary_directory() -> Check {
    const NAME: &str = "temporary directory";
    let (Some(dir), _) = budget::temp_dir(budget::candidates()) else {
        return Check::warning(
            NAME,
            "none on a disk that can be written",
            "only compressed RAM is used by default; set TMPDIR, or give --device file:DIR",
        );
    };
    let shown = dir.display();
    match direct_write(&dir) {
        Ok(()) => Check::ok(NAME, format!("{shown}, with O_DIRECT")),
        Err(e) => Check::warning(
            NAME,
            format!("{shown}, without O_DIRECT ({e})"),
            "pages there take page cache too; give --device file:DIR on ext4, xfs or btrfs",
        ),
    }
}

/// What `generic:`, `coherent:` and `numa:` devices can be made of, besides memfds and files.
fn own_memory() -> Check {
    let list = |what: &str, found: Vec<String>| match found.is_empty() {
        true => format!("no {what}"),
        false => format!("{what} {}", found.join(", ")),
    };
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let mut dax: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.strip_prefix("dax").is_some_and(|rest| rest.contains('.')))
        .map(|name| format!("/dev/{name}"))
        .collect();
    dax.sort();
    let nodes = farpage::sys::numa::memory_nodes().iter().map(u32::to_string).collect();
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = info.lines().find_map(|l| l.strip_prefix("HugePages_Free:")).map_or("0", str::trim);
    let found =
        [list("device-dax nodes", dax), format!("{free} free huge pages"), list("memory nodes", nodes)];
    Check::ok("device memory", found.join("; "))
}

/// Writes a page with O_DIRECT to a file without a name.
fn direct_write(dir: &Path) -> std::io::Result<()> {
    let file = budget::unnamed(dir, OFlags::DIRECT)?;
    file.write_all_at(&Page([0; farpage::PAGE_SIZE]).0, 0)
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let memory = match budget::memory(Path::new("/")) {
        Ok(memory) => memory,
        Err(e) => return Check::failure(NAME, &e.to_string()),
    };
    let found = format!("{} of {} available", human(memory.available), human(memory.total));
    match budget::plan(Dram::Auto, &budget::default_devices(None), &memory) {
        Ok(plan) => Check::ok(NAME, format!("{found}; --dram auto is {}", human(plan.dram))),
        Err(e) => Check::warning(NAME, found, e.to_string()),
    }
}

fn cgroup() -> Check {
    let limit = budget::cgroup::limit(Path::new("/"));
    Check::ok(
        "memory limit",
        limit.map_or("none".into(), |l| {
            format!("{} by control group {}, {} of it left", human(l.limit), l.group.display(), human(l.left))
        }),
    )
}

/// Of address space a process reserves a little more than this, for tables that are nearly all holes.
const ADDRESS_SPACE: u64 = 300 << 30;

fn address_space() -> Check {
    match getrlimit(Resource::As).current {
        None => Check::ok("address space", "not limited"),
        Some(limit) if limit < ADDRESS_SPACE => Check::failure(
            "address space",
            &format!(
                "limited to {}, and farpage reserves far more than it uses: `ulimit -v unlimited`",
                human(limit)
            ),
        ),
        Some(limit) => Check::warning(
            "address space",
            format!("limited to {}", human(limit)),
            "farpage reserves address space far beyond what it uses: `ulimit -v unlimited`",
        ),
    }
}

fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let setting = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("none", |(s, _)| s);
    Check::ok(
        NAME,
        match setting {
            "always" => {
                "always (farpage moves pages of 4 KiB one by one; managed memory is split into them)".into()
            }
            other => other.to_owned(),
        },
    )
}

fn cpus() -> Check {
    match std::thread::available_parallelism() {
        Ok(n) if n.get() > 1 => Check::ok("CPUs", format!("{n}")),
        _ => Check::warning(
            "CPUs",
            "1",
            "pages are compressed on the program's own time; give it a second one",
        ),
    }
}

/// What `farpage bench swap` needs besides.
fn zram() -> Check {
    const NAME: &str = "zram and cgroup";
    let root = rustix::process::geteuid().is_root();
    let zram = ["/sys/class/zram-control", "/sys/block/zram0"].iter().any(|p| Path::new(p).exists());
    let controller = memory_controller();
    match (root, zram, controller) {
        (true, true, Some(at)) => {
            Check::ok(NAME, format!("'farpage bench swap' can compare (controller at {at})"))
        }
        _ => {
            let missing: Vec<&str> = [
                (!root).then_some("root"),
                (!zram).then_some("zram (modprobe zram)"),
                controller.is_none().then_some("a memory controller"),
            ]
            .into_iter()
            .flatten()
            .collect();
            Check::warning(
                NAME,
                format!("missing: {}", missing.join(", ")),
                "'farpage bench swap' runs without the kernel's swap beside it",
            )
        }
    }
}

/// Where memory limits can be set, v2 or v1.
fn memory_controller() -> Option<&'static str> {
    let v2 = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if v2.split_whitespace().any(|c| c == "memory") {
        return Some("/sys/fs/cgroup");
    }
    let v1 = "/sys/fs/cgroup/memory";
    File::open(format!("{v1}/memory.limit_in_bytes")).is_ok().then_some(v1)
}
