//! `farpage check` and the audit of a run: silent where all is right, and not where a count or a charge is made wrong.

use std::process::{Command, ExitCode};
use std::time::Duration;

use farpage::domain::{Domain, ENV_DOMAIN};
use farpage_tests::{Expect, Job, Running, Test, Verdict, farpage, plain_only, program, suite, tree};
use rustix::process::Signal;

/// Four processes that write for ever, and their segment; `None` where there is no C compiler.
fn endless() -> Result<(Running, Domain), Result<Verdict, String>> {
    if plain_only() {
        return Err(Ok(Verdict::Skipped("has no plain half".to_owned())));
    }
    let path = program("fork")?;
    let job = Job::new([path.into_os_string(), "endless".into(), "40".into()]);
    let text = |e: &dyn ToString| Err(e.to_string());
    let running = job.dram("12M").limit(Duration::from_secs(60)).start_farpage().map_err(|e| text(&e))?;
    let all_there = |t: &str| t.matches("tick").count() > 60;
    running.wait_for(false, all_there).map_err(|e| text(&e))?;
    let member = *tree::program_processes(running.pid()).first().ok_or(Err("no program".to_owned()))?;
    let environ = std::fs::read(format!("/proc/{member}/environ")).map_err(|e| text(&e))?;
    let prefix = format!("{ENV_DOMAIN}=");
    let segment = environ.split(|&b| b == 0).find_map(|v| v.strip_prefix(prefix.as_bytes()));
    let segment = segment.ok_or(Err("no segment in the environment".to_owned()))?;
    let domain = Domain::attach(&String::from_utf8_lossy(segment)).map_err(|e| text(&e))?;
    Ok((running, domain))
}

/// `farpage check PID`: its exit status and what it printed.
fn check(pid: u32) -> Result<(i32, String), String> {
    let out = Command::new(farpage()?).args(["check", &pid.to_string()]).output();
    let out = out.map_err(|e| e.to_string())?;
    if !out.stderr.is_empty() {
        return Err(format!("farpage check says: {}", String::from_utf8_lossy(&out.stderr)));
    }
    Ok((out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stdout).into_owned()))
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

/// Ends the run; the audits of its launcher said what `check` said, and the exit status is farpage's own.
fn caught_by_the_run(running: Running, word: &str) -> Result<(), String> {
    running.wait_for(true, |t| t.contains("audit:"))?;
    for pid in tree::program_processes(running.pid()) {
        Running::kill(pid, Signal::KILL);
    }
    let outcome = running.finish()?;
    ensure(outcome.status == 125, &format!("status {}", outcome.status))?;
    ensure(outcome.stderr.contains(word), &format!("not said: {word}\n{}", outcome.tail()))
}

/// While four processes that share pages write and are evicted: one line, whoever of the tree is asked for.
fn all_right() -> Result<Verdict, String> {
    let (running, _) = match endless() {
        Ok(r) => r,
        Err(verdict) => return verdict,
    };
    let mut pids = tree::program_processes(running.pid());
    ensure(pids.len() == 4, "not four processes")?;
    let keeper = tree::descendants(running.pid()).into_iter().find(|p| tree::is_farpage(*p));
    pids.extend(keeper.into_iter().chain([running.pid()]));
    ensure(pids.len() == 6, "no keeper")?;
    for pid in &pids {
        let (status, said) = check(*pid)?;
        let told = format!("process {pid}: status {status}\n{said}");
        ensure(status == 0 && said.lines().count() == 1 && said.starts_with("all right: "), &told)?;
        let frames: u64 = said.split(' ').nth(2).and_then(|n| n.parse().ok()).ok_or(&told)?;
        ensure(frames > 1000 && said.contains("4 processes"), &told)?;
    }
    // Stopped, they cannot count their DRAM, which is said; the counts can be compared all the same.
    for pid in &pids[..4] {
        Running::kill(*pid, Signal::STOP);
    }
    let (status, said) = check(running.pid())?;
    let silent = pids[..4].iter().all(|p| said.contains(&p.to_string()));
    ensure(status == 0 && silent && said.lines().count() == 1, &said)?;
    for pid in pids {
        Running::kill(pid, Signal::KILL);
    }
    Ok(Verdict::Passed)
}

/// One reference too many on a frame, as if a put had been forgotten.
fn count_differs() -> Result<Verdict, String> {
    let (running, domain) = match endless() {
        Ok(r) => r,
        Err(verdict) => return verdict,
    };
    let frames = &domain.pagemaps[0].frames;
    let frame = (0..frames.len() as u32).find(|&f| frames.get(f).is_ok()).ok_or("no frame in use")?;
    let (status, said) = check(running.pid())?;
    let words = format!("frame {frame}: count ");
    let told = format!("status {status}\n{said}");
    ensure(status == 1 && said.lines().count() == 1, &told)?;
    ensure(said.starts_with("device ram:512M, ") && said.contains(&words), &told)?;
    let after = |word: &str| said.split(word).nth(1)?.split([',', ' ', '\n']).next()?.parse::<u32>().ok();
    let numbers = after("count ").zip(after("references found "));
    ensure(numbers.is_some_and(|(count, found)| count == found + 1), &told)?;
    caught_by_the_run(running, &words)?;
    Ok(Verdict::Passed)
}

/// Pages charged that are not there.
fn charge_differs() -> Result<Verdict, String> {
    let (running, domain) = match endless() {
        Ok(r) => r,
        Err(verdict) => return verdict,
    };
    let pid = tree::program_processes(running.pid())[1];
    let theirs = |s: &farpage::domain::Slot| s.pid.load(std::sync::atomic::Ordering::Acquire) == pid;
    let owner = domain.slots().find(|(_, s)| theirs(s)).ok_or("no slot")?.0;
    domain.force_charge(owner, 7);
    let (status, said) = check(pid)?;
    let words = format!("process {pid}: charged for ");
    let told = format!("status {status}\n{said}");
    ensure(status == 1 && said.lines().count() == 1 && said.starts_with(&words), &told)?;
    let numbers: Vec<u64> = said.split([' ', ',', '\n']).filter_map(|w| w.parse().ok()).collect();
    ensure(numbers.len() == 2 && numbers[0] == numbers[1] + 7, &told)?;
    caught_by_the_run(running, &words)?;
    Ok(Verdict::Passed)
}

/// The audits are there that the other tests rely on.
fn runs_are_audited() -> Result<Verdict, String> {
    let path = match program("touch") {
        Ok(path) => path,
        Err(verdict) => return verdict,
    };
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let job = Job::new([path.into_os_string(), "noise".into(), "64".into()]).expect(Expect::PAGED);
    let (outcome, stats) = farpage_tests::run_farpage(&job)?;
    ensure(outcome.status == 0, &outcome.tail())?;
    // Before the program's references are given back at the latest, most of its pages are away.
    ensure(stats.audits >= 2 && stats.audit_frames > 8192, &format!("{stats:#?}"))?;
    Ok(Verdict::Passed)
}

fn main() -> ExitCode {
    let tests: Vec<Test> = vec![
        ("audit::all-right".to_owned(), Box::new(all_right)),
        ("audit::count-differs".to_owned(), Box::new(count_differs)),
        ("audit::charge-differs".to_owned(), Box::new(charge_differs)),
        ("audit::runs-are-audited".to_owned(), Box::new(runs_are_audited)),
    ];
    suite(tests)
}
