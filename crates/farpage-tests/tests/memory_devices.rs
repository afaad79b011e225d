//! Memory that the CPU reaches in place as a device of `farpage run`: memfds, huge pages, files, a memory node, device-dax.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use rustix::process::Signal;

use farpage_tests::{
    Expect, Job, MIB, Rng, Running, Stats, Test, Verdict, need, plain_only, program, run_both_and, suite,
    tree,
};

/// The most that device `i` held, in bytes.
fn peak(stats: &Stats, i: usize) -> u64 {
    stats.devices.get(i).and_then(|d| d.get("peak")?.as_u64()).unwrap_or(0)
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

fn job(argv: &[&str]) -> Result<Job, Result<Verdict, String>> {
    let path = program(argv[0])?;
    let argv = std::iter::once(path.into_os_string()).chain(argv[1..].iter().map(|a| (*a).into()));
    Ok(Job::new(argv).dram("12M").limit(Duration::from_secs(90)))
}

/// A program's output is what it is plainly, and its pages were on the device.
fn pages_go_there(argv: &'static [&'static str], device: &str) -> Result<Verdict, String> {
    let job = match job(argv) {
        Ok(job) => job.device(device),
        Err(verdict) => return verdict,
    };
    run_both_and(&job, "12M", |stats| ensure(peak(stats, 0) > 4 * MIB, "no pages went to the device"))
}

/// When the first device has no more memory the next one takes over: nothing is lost, and nobody gets a SIGBUS.
fn next_takes_over(first: &str, at_least: u64) -> Result<Verdict, String> {
    let job = match job(&["touch", "noise", "48"]) {
        Ok(job) => job.device(first).device("ram:256M"),
        Err(verdict) => return verdict,
    };
    run_both_and(&job, "12M", |stats| {
        ensure(peak(stats, 0) >= at_least, "the first device was not used")?;
        ensure(peak(stats, 1) > 4 * MIB, "the second device was not used")?;
        ensure(stats.over_budget == 0, "DRAM was exceeded")
    })
}

/// All full: the program goes on in DRAM.
fn all_full() -> Result<Verdict, String> {
    let job = match job(&["touch", "noise", "48"]) {
        Ok(job) => job.device("generic:memfd:8M").expect(Expect::FAULTY),
        Err(verdict) => return verdict,
    };
    run_both_and(&job, "12M", |stats| {
        ensure(stats.over_budget > 0, "that DRAM was exceeded was not counted")?;
        ensure(
            peak(stats, 0) > 7 * MIB && stats.store_errors + stats.poisoned == 0,
            "stores failed otherwise",
        )
    })
}

/// A file system that is smaller than the file on it.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=6m", "none"]).arg(dir.path()).output();
        match mount {
            Ok(out) if out.status.success() => Ok(Self(dir)),
            Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
            Err(e) => Err(format!("mount: {e}")),
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // It goes with the machine if it cannot be unmounted.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn no_space() -> Result<Verdict, String> {
    match Small::new() {
        Ok(fs) => next_takes_over(&format!("generic:{}:64M", fs.0.path().display()), 4 * MIB),
        Err(why) => Ok(Verdict::Skipped(format!("no small file system: {why}"))),
    }
}

/// More huge pages than the machine has: those that there are, if any, serve.
fn no_huge_pages() -> Result<Verdict, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| e.to_string())?;
    let free = text.lines().find_map(|l| l.strip_prefix("HugePages_Free:"));
    match free.and_then(|n| n.trim().parse::<u64>().ok()) {
        None => Ok(Verdict::Skipped("no huge pages in this kernel".to_owned())),
        Some(n) if n > 8 => Ok(Verdict::Skipped(format!("{n} huge pages are free"))),
        Some(_) => next_takes_over("generic:hugetlb:256M", 0),
    }
}

/// `sort`, with a file that is made for it.
fn sorted(kind: &str) -> Result<Verdict, String> {
    let sort = match need::tool("sort") {
        Ok(sort) => sort,
        Err(why) => return Ok(Verdict::Skipped(why)),
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let numbers = dir.path().join("numbers");
    let mut rng = Rng::new(7);
    let text: String = (0..300_000).map(|_| format!("{}\n", rng.draw())).collect();
    std::fs::write(&numbers, text).map_err(|e| e.to_string())?;
    let device = format!("{kind}:{}:256M", dir.path().join("memory").display());
    let argv = [sort.into_os_string(), "-n".into(), "-S".into(), "64M".into(), numbers.into_os_string()];
    let verdict = run_both_and(&Job::new(argv).device(&device), "12M", |stats| {
        ensure(peak(stats, 0) > 4 * MIB, "no pages went to the device")
    });
    let left: Vec<_> = std::fs::read_dir(dir.path()).map_err(|e| e.to_string())?.flatten().collect();
    ensure(left.len() == 1, "the file that was made for it is still there")?;
    verdict
}

/// The bytes of a file that take room.
fn takes(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().map_or(u64::MAX, |m| m.blocks() * 512)
}

/// A file that was there before: it is used by one domain at a time, and empty again when the tree has been killed.
fn killed(seed: u64) -> Result<Verdict, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = dir.path().join("memory");
    std::fs::File::create(&file).and_then(|f| f.set_len(256 << 20)).map_err(|e| e.to_string())?;
    let device = format!("generic:{}", file.display());
    let job = match job(&["fork", "endless", "40"]) {
        Ok(job) => job.device(&device).expect(Expect::CLEAN),
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let mut rng = Rng::new(seed);
    let running = job.start_farpage()?;
    let wanted = 20 + rng.below(100) as usize;
    running.wait_for(false, |text| text.matches("tick").count() > wanted)?;
    let second = job.start_farpage()?.finish()?;
    ensure(second.status != 0 && second.stderr.contains("in use by another process"), &second.stderr)?;
    let mut members = tree::program_processes(running.pid());
    while !members.is_empty() {
        let victim = members.swap_remove(rng.below(members.len() as u64) as usize);
        Running::kill(victim, Signal::KILL);
    }
    let outcome = running.finish()?;
    let stats = outcome.stats.as_ref().ok_or("farpage left no stats")?;
    Expect::CLEAN.check(stats)?;
    ensure(stats.reaped > 0 && peak(stats, 0) > 4 * MIB, "nothing was reaped, or nothing on the device")?;
    ensure(takes(&file) == 0, "the file is not empty again")?;
    Ok(Verdict::Passed)
}

/// Farpage itself is killed: what is left in a file with a name is not overwritten unasked.
fn keeper_killed() -> Result<Verdict, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = dir.path().join("memory");
    std::fs::File::create(&file).and_then(|f| f.set_len(256 << 20)).map_err(|e| e.to_string())?;
    let job = match job(&["fork", "endless", "40"]) {
        Ok(job) => job.device(&format!("generic:{}", file.display())),
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let running = job.start_farpage()?;
    running.wait_for(false, |text| text.matches("tick").count() > 50)?;
    let members = tree::descendants(running.pid());
    let keeper = *members.iter().find(|pid| tree::is_farpage(**pid)).ok_or("farpage has no keeper")?;
    Running::kill(keeper, Signal::KILL);
    let outcome = running.finish()?;
    ensure(outcome.status != 0, "the tree went on without its keeper")?;
    ensure(takes(&file) > 0, "nothing was on the device")?;
    let again = job.start_farpage()?.finish()?;
    ensure(again.status != 0 && again.stderr.contains("holds data"), &again.stderr)?;
    std::fs::File::create(&file).and_then(|f| f.set_len(256 << 20)).map_err(|e| e.to_string())?;
    let running = job.start_farpage()?;
    running.wait_for(false, |text| text.matches("tick").count() > 5)?;
    Ok(Verdict::Passed)
}

/// A device-dax node that may be overwritten, as `FARPAGE_DAX_DEVICE` names it.
fn device_dax() -> Result<Verdict, String> {
    let Some(node) = std::env::var_os("FARPAGE_DAX_DEVICE") else {
        return Ok(Verdict::Skipped("FARPAGE_DAX_DEVICE names no device-dax node".to_owned()));
    };
    let node = Path::new(&node);
    if let Err(why) = need::device(node) {
        return Ok(Verdict::Skipped(why));
    }
    pages_go_there(&["fork", "modify", "32"], &format!("generic:{}", node.display()))
}

fn node() -> Result<Verdict, String> {
    let text = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    match text.trim().rsplit([',', '-']).next().filter(|n| !n.is_empty()) {
        Some(node) => pages_go_there(&["touch", "mixed", "48"], &format!("numa:{node}:256M")),
        None => Ok(Verdict::Skipped("this machine does not say which memory nodes it has".to_owned())),
    }
}

fn main() -> ExitCode {
    let mut tests: Vec<Test> = Vec::new();
    let mut test = |name: &str, body: fn() -> Result<Verdict, String>| {
        tests.push((format!("memory::{name}"), Box::new(body)));
    };
    test("touch-generic", || pages_go_there(&["touch", "scattered", "48"], "generic:memfd:256M"));
    test("touch-coherent", || pages_go_there(&["touch", "mixed", "48"], "coherent:memfd:256M"));
    test("touch-node", node);
    test("forks-generic", || pages_go_there(&["fork", "modify", "32"], "generic:memfd:512M"));
    test("forks-coherent", || pages_go_there(&["fork", "storm", "24"], "coherent:memfd:512M"));
    test("execs", || pages_go_there(&["fork", "execs", "32"], "generic:memfd:512M"));
    test("sort-generic", || sorted("generic"));
    test("sort-coherent", || sorted("coherent"));
    test("injected", || {
        pages_go_there(&["touch", "scattered", "48"], "inject:full=%3,delay=20us:generic:memfd:256M")
    });
    test("next-when-full", || next_takes_over("generic:memfd:8M", 7 * MIB));
    test("next-when-no-space", no_space);
    test("next-when-no-huge-pages", no_huge_pages);
    test("all-full", all_full);
    test("killed-1", || killed(1));
    test("killed-2", || killed(2));
    test("keeper-killed", keeper_killed);
    test("device-dax", device_dax);
    suite(tests)
}
