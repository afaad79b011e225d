//! SIGKILL at random moments, of the program, of single members of its tree, and of the launcher: nothing
//! that a dead process held stays in use, and nobody stays behind.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use farpage_tests::{Expect, Job, Rng, Running, Test, Verdict, plain_only, program, suite, tree};

fn job(case: &str, mib: &str) -> Result<Job, Result<Verdict, String>> {
    let path = program("fork")?;
    let job = Job::new([path.into_os_string(), case.into(), mib.into()]);
    Ok(job.dram("12M").expect(Expect::CLEAN).limit(Duration::from_secs(60)))
}

fn ticks(text: &str) -> usize {
    text.matches("tick").count()
}

/// Waits until nothing is left of the tree below `pids`, by their own ends.
fn all_gone(pids: &[u32]) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(45);
    loop {
        let left: Vec<u32> = pids.iter().copied().filter(|p| alive(*p)).collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(left.iter().map(|p| tree::describe(*p)).collect::<Vec<_>>().join("") + "still alive");
        }
        // Others' processes cannot be waited for; look again shortly.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|s| s.split_whitespace().next()).is_some_and(|s| s != "Z" && s != "X")
}

/// The whole tree of four processes is killed, member by member in random order, while all of them write.
fn whole_tree(seed: u64) -> Result<Verdict, String> {
    let job = match job("endless", "40") {
        Ok(job) => job,
        Err(verdict) => return verdict,
    };
    if plain_only() {
        let plain = job.start_plain()?;
        plain.wait_for(false, |text| ticks(text) > 20)?;
        return Ok(Verdict::Passed);
    }
    let mut rng = Rng::new(seed);
    let running = job.start_farpage()?;
    let wanted = 10 + rng.below(150) as usize;
    running.wait_for(false, |text| ticks(text) > wanted)?;
    let mut members = tree::program_processes(running.pid());
    if members.len() < 4 {
        return Err(format!("only {} processes below farpage", members.len()));
    }
    // The first is the program that was started: it goes at a random place in the order.
    while !members.is_empty() {
        let victim = members.swap_remove(rng.below(members.len() as u64) as usize);
        Running::kill(victim, Signal::KILL);
    }
    let outcome = running.finish()?;
    let stats = outcome.stats.as_ref().ok_or("farpage left no stats")?;
    if outcome.status != 128 + 9 {
        return Err(format!("status {}, expected 137\n{}", outcome.status, outcome.tail()));
    }
    Expect::CLEAN.check(stats)?;
    if stats.reaped == 0 {
        return Err(format!("no process was reaped: {stats:#?}"));
    }
    Ok(Verdict::Passed)
}

/// Only the program that was started is killed; its three children go on until they are killed, too.
fn main_first(seed: u64) -> Result<Verdict, String> {
    let job = match job("endless", "40") {
        Ok(job) => job,
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let mut rng = Rng::new(seed);
    let running = job.start_farpage()?;
    let wanted = 10 + rng.below(100) as usize;
    running.wait_for(false, |text| ticks(text) > wanted)?;
    let members = tree::program_processes(running.pid());
    Running::kill(*members.first().ok_or("no program")?, Signal::KILL);
    // Its children write on, whether farpage waits for them or ends them.
    for victim in &members[1..] {
        Running::kill(*victim, Signal::KILL);
    }
    let outcome = running.finish()?;
    let stats = outcome.stats.as_ref().ok_or("farpage left no stats")?;
    Expect::CLEAN.check(stats)?;
    all_gone(&members)?;
    Ok(Verdict::Passed)
}

/// Single workers are killed; the parent makes new ones and verifies its own memory at the end.
fn members(seed: u64) -> Result<Verdict, String> {
    let job = match job("workers", "32") {
        Ok(job) => job,
        Err(verdict) => return verdict,
    };
    let mut rng = Rng::new(seed);
    let running = if plain_only() { job.start_plain()? } else { job.start_farpage()? };
    let mut killed = 0;
    for n in 1..=12usize {
        let nth = |text: &str| {
            text.lines().filter_map(|l| l.strip_prefix("worker ")?.parse::<u32>().ok()).nth(n - 1)
        };
        let pid = std::cell::Cell::new(None);
        running.wait_for(true, |text| {
            pid.set(nth(text));
            pid.get().is_some()
        })?;
        if rng.below(2) == 0 {
            // Somewhere in its life; the moment is random on purpose.
            std::thread::sleep(Duration::from_micros(rng.below(30_000)));
            Running::kill(pid.get().ok_or("no worker")?, Signal::KILL);
            killed += 1;
        }
    }
    let outcome = running.finish()?;
    if outcome.status != 0 {
        return Err(format!("status {} after {killed} kills\n{}", outcome.status, outcome.tail()));
    }
    if !plain_only() {
        Expect::PAGED.check(outcome.stats.as_ref().ok_or("farpage left no stats")?)?;
    }
    Ok(Verdict::Passed)
}

/// One of farpage's own processes is killed, the launcher or its helper: the program must not go on with memory
/// that nobody looks after, and nobody stays behind.
fn own_process(helper: bool) -> Result<Verdict, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let job = match job("endless", "40") {
        Ok(job) => job.env("TMPDIR", dir.path()),
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let running = job.start_farpage()?;
    running.wait_for(false, |text| ticks(text) > 50)?;
    let members = tree::descendants(running.pid());
    if tree::program_processes(running.pid()).len() < 4 {
        return Err(format!("only {} processes below farpage", members.len()));
    }
    let victim = if helper {
        match members.iter().find(|pid| tree::is_farpage(**pid)) {
            Some(pid) => *pid,
            None => return Ok(Verdict::Skipped("farpage has no helper process".to_owned())),
        }
    } else {
        running.pid()
    };
    Running::kill(victim, Signal::KILL);
    let gone = all_gone(&members);
    for pid in members {
        Running::kill(pid, Signal::KILL);
    }
    gone?;
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).map_err(|e| e.to_string())?.flatten().map(|e| e.path()).collect();
    if left.is_empty() { Ok(Verdict::Passed) } else { Err(format!("left behind: {left:?}")) }
}

/// Ctrl-C reaches the program: SIGINT to the group, as a terminal sends it.
fn interrupt() -> Result<Verdict, String> {
    let job = match job("endless", "32") {
        Ok(job) => job,
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let running = job.start_farpage()?;
    running.wait_for(false, |text| ticks(text) > 50)?;
    let members = tree::descendants(running.pid());
    if let Some(group) = i32::try_from(running.pid()).ok().and_then(rustix::process::Pid::from_raw) {
        rustix::process::kill_process_group(group, Signal::INT).map_err(|e| e.to_string())?;
    }
    let outcome = running.finish()?;
    if outcome.status != 128 + 2 {
        return Err(format!("status {}, expected 130\n{}", outcome.status, outcome.tail()));
    }
    all_gone(&members)?;
    Expect::CLEAN.check(outcome.stats.as_ref().ok_or("farpage left no stats")?)?;
    Ok(Verdict::Passed)
}

fn main() -> ExitCode {
    let mut tests: Vec<Test> = Vec::new();
    for seed in 1..=6 {
        tests.push((format!("kill::whole-tree-{seed}"), Box::new(move || whole_tree(seed))));
    }
    for seed in 1..=3 {
        tests.push((format!("kill::main-first-{seed}"), Box::new(move || main_first(seed))));
        tests.push((format!("kill::members-{seed}"), Box::new(move || members(seed))));
    }
    tests.push(("kill::launcher".to_owned(), Box::new(|| own_process(false))));
    tests.push(("kill::helper".to_owned(), Box::new(|| own_process(true))));
    tests.push(("kill::interrupt".to_owned(), Box::new(interrupt)));
    suite(tests)
}
