//! Devices that fail, corrupt, are slow or full: nothing is lost that was not lost by the device itself.

use std::process::ExitCode;
use std::time::Duration;

use farpage_tests::{
    Expect, Job, Outcome, Stats, Test, Verdict, plain_only, program, run_farpage, run_plain, suite,
};

/// What is expected after the run.
type Check = fn(&Outcome, &Stats) -> Result<(), String>;

struct Case {
    name: &'static str,
    program: &'static [&'static str],
    dram: &'static str,
    devices: &'static [&'static str],
    options: &'static [&'static str],
    check: Check,
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

/// The program's word on stderr: `<key> <number>`.
fn said(outcome: &Outcome, key: &str) -> Result<u64, String> {
    let line = outcome.stderr.lines().find_map(|l| l.strip_prefix(key)?.trim().parse().ok());
    line.ok_or_else(|| format!("the program did not say `{key}N`"))
}

/// farpage says that something is wrong, and does not say it again and again.
fn told_once(outcome: &Outcome, word: &str) -> Result<(), String> {
    match lines(outcome, word) {
        0 => Err(format!("no line about `{word}` on stderr")),
        1..=10 => Ok(()),
        n => Err(format!("{n} lines about `{word}` on stderr: nobody can read that")),
    }
}

/// farpage's own lines on stderr that mention `word`.
fn lines(outcome: &Outcome, word: &str) -> usize {
    outcome.stderr.lines().filter(|l| l.starts_with("farpage") && l.contains(word)).count()
}

fn all_right(outcome: &Outcome) -> Result<(), String> {
    ensure(outcome.status == 0, "the program failed")
}

/// Stores failed; nothing was lost.
fn stores_failed(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    ensure(stats.store_errors > 0, "no store error was counted")?;
    ensure(stats.poisoned == 0, "pages were poisoned")?;
    ensure(stats.pages_out > 0 && stats.pages_in > 0, "no paging")?;
    told_once(outcome, "store")
}

/// The device's errors went away when tried again.
fn loads_retried(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    ensure(stats.load_errors > 0, "no load error was counted")?;
    ensure(stats.poisoned == 0, "pages were poisoned although a second try succeeds")?;
    ensure(stats.pages_in > 0, "no paging")
}

fn next_took_over(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    ensure(stats.poisoned == 0 && stats.over_budget == 0, "the next device did not take over")?;
    ensure(stats.dram_peak <= stats.dram_budget, "DRAM went above the budget")?;
    ensure(stats.pages_out > 2000 && stats.pages_in > 0, "no paging")
}

fn above_budget(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    ensure(stats.over_budget > 0, "it was not counted that DRAM is above the budget")?;
    ensure(stats.poisoned == 0, "pages were poisoned")?;
    told_once(outcome, "budget")
}

/// Some of the pages that were stored can never be read again.
fn some_poisoned(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    let count = said(outcome, "poisoned ")?;
    ensure((1..=20).contains(&count), "of 20 spoilt pages between 1 and 20 must raise SIGBUS")?;
    ensure(stats.poisoned == count, "the stats count other poisoned pages than the program")?;
    ensure(lines(outcome, "SIGBUS") as u64 == count, "not one line for each poisoned page")?;
    ensure(lines(outcome, "inject:") > 0, "no line names the device")
}

fn dies_of_sigbus(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    ensure(outcome.status == 128 + 7, "the program did not end by SIGBUS")?;
    ensure(stats.poisoned > 0, "no page was poisoned")?;
    ensure(lines(outcome, "SIGBUS") > 0, "no line says which page of which device")
}

fn child_dies(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    ensure(stats.poisoned > 0, "no page was poisoned")?;
    ensure(outcome.stderr.lines().any(|l| l == "child SIGBUS"), "the child did not end by SIGBUS")
}

fn strict(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    let mapped = said(outcome, "mapped ")?;
    ensure((8..256).contains(&mapped), "mmap did not say ENOMEM, or too early")?;
    // What was mapped before the refusal may still need a little.
    ensure(stats.dram_peak <= stats.dram_budget / 16 * 17, "DRAM went above the budget in spite of --strict")
}

fn not_strict(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    above_budget(outcome, stats)?;
    ensure(said(outcome, "mapped ")? == 256, "without --strict mmap goes on")
}

fn paged(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    all_right(outcome)?;
    Expect::PAGED.check(stats)
}

const CASES: &[Case] = &[
    Case {
        name: "fail-store-once",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:fail-store=5:ram:256M"],
        options: &[],
        check: stores_failed,
    },
    Case {
        name: "fail-store-often",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:fail-store=%7:ram:256M", "ram:128M"],
        options: &[],
        check: stores_failed,
    },
    Case {
        name: "fail-store-in-forks",
        program: &["fork", "modify", "32"],
        dram: "12M",
        devices: &["inject:fail-store=%11:ram:512M", "ram:256M"],
        options: &[],
        check: stores_failed,
    },
    Case {
        name: "fail-store-always",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:fail-store=*:ram:256M"],
        options: &[],
        check: above_budget,
    },
    Case {
        name: "next-device-after-errors",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:fail-store=500+:ram:256M", "ram:256M"],
        options: &[],
        check: next_took_over,
    },
    Case {
        name: "next-device-when-full",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:full-after=1000:ram:256M", "ram:256M"],
        options: &[],
        check: next_took_over,
    },
    Case {
        name: "next-device-when-really-full",
        program: &["touch", "noise", "48"],
        dram: "12M",
        devices: &["ram:8M", "ram:256M"],
        options: &[],
        check: next_took_over,
    },
    Case {
        name: "all-full",
        program: &["touch", "noise", "48"],
        dram: "12M",
        devices: &["ram:8M"],
        options: &[],
        check: above_budget,
    },
    Case {
        name: "full-now-and-then",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:full=%3:ram:256M"],
        options: &[],
        check: |o, s| {
            all_right(o)?;
            ensure(s.poisoned == 0 && s.pages_out > 0 && s.pages_in > 0, "no paging, or pages poisoned")
        },
    },
    Case {
        name: "fail-load-retried",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:fail-load=%50:ram:256M"],
        options: &[],
        check: loads_retried,
    },
    Case {
        name: "corrupt-load-retried",
        program: &["touch", "scattered", "48"],
        dram: "12M",
        devices: &["inject:corrupt-load=%50:ram:256M"],
        options: &[],
        check: loads_retried,
    },
    Case {
        name: "corrupt-store-poisons",
        program: &["faulty", "poisoned", "48"],
        dram: "12M",
        devices: &["inject:corrupt-store=100x20:ram:256M"],
        options: &[],
        check: some_poisoned,
    },
    Case {
        name: "corrupt-store-default-action",
        program: &["touch", "sequential", "48"],
        dram: "12M",
        devices: &["inject:corrupt-store=100x20:ram:256M"],
        options: &[],
        check: dies_of_sigbus,
    },
    Case {
        name: "corrupt-store-child",
        program: &["faulty", "child", "48"],
        dram: "12M",
        devices: &["inject:corrupt-store=100x20:ram:256M"],
        options: &[],
        check: child_dies,
    },
    Case {
        name: "slow",
        program: &["touch", "sequential", "24"],
        dram: "8M",
        devices: &["inject:delay=500us:ram:256M"],
        options: &[],
        check: paged,
    },
    Case {
        name: "slow-forks",
        program: &["fork", "storm", "24"],
        dram: "8M",
        devices: &["inject:delay=200us:ram:256M"],
        options: &[],
        check: paged,
    },
    Case {
        name: "strict",
        program: &["faulty", "until-full"],
        dram: "16M",
        devices: &["ram:16M"],
        options: &["--strict"],
        check: strict,
    },
    Case {
        name: "not-strict",
        program: &["faulty", "until-full"],
        dram: "16M",
        devices: &["ram:16M"],
        options: &[],
        check: not_strict,
    },
];

fn run(case: &Case) -> Result<Verdict, String> {
    let path = match program(case.program[0]) {
        Ok(path) => path,
        Err(verdict) => return verdict,
    };
    let argv = std::iter::once(path.into_os_string()).chain(case.program[1..].iter().map(|a| (*a).into()));
    let mut job = Job::new(argv).dram(case.dram).expect(Expect::FAULTY).limit(Duration::from_secs(60));
    let plain = run_plain(&job)?;
    if plain.status != 0 {
        return Err(format!("fails without farpage: {}", plain.stderr));
    }
    if plain_only() {
        return Ok(Verdict::Passed);
    }
    for device in case.devices {
        job = job.device(device);
    }
    for option in case.options {
        job = job.option(option);
    }
    let (outcome, stats) = run_farpage(&job)?;
    let told = |e| format!("{e}\nstatus {}\nstderr:\n{}\n{stats:#?}", outcome.status, outcome.tail());
    (case.check)(&outcome, &stats).map_err(told)?;
    if outcome.status == 0 && outcome.stdout != plain.stdout {
        return Err(told("other output than plainly".to_owned()));
    }
    Ok(Verdict::Passed)
}

/// A file device, with and without its faults.
fn file_device(faults: &'static str, program_: &'static [&'static str]) -> Result<Verdict, String> {
    let path = match program(program_[0]) {
        Ok(path) => path,
        Err(verdict) => return verdict,
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let argv = std::iter::once(path.into_os_string()).chain(program_[1..].iter().map(|a| (*a).into()));
    let device = format!("{faults}file:{}:512M", dir.path().display());
    let expect = if faults.is_empty() { Expect::PAGED } else { Expect::FAULTY };
    let job = Job::new(argv).dram("12M").device(&device).expect(expect).limit(Duration::from_secs(60));
    if plain_only() {
        return Ok(Verdict::Skipped("has no plain half".to_owned()));
    }
    let (outcome, stats) = run_farpage(&job)?;
    let told = |e| format!("{e}\nstatus {}\nstderr:\n{}\n{stats:#?}", outcome.status, outcome.tail());
    ensure(outcome.status == 0, "the program failed").map_err(told)?;
    ensure(stats.pages_out > 0 && stats.pages_in > 0, "no paging").map_err(told)?;
    let left = std::fs::read_dir(dir.path()).map_err(|e| e.to_string())?.count();
    ensure(left == 0, "the device left files behind").map_err(told)?;
    Ok(Verdict::Passed)
}

fn main() -> ExitCode {
    let mut tests: Vec<Test> = Vec::new();
    for case in CASES {
        tests.push((format!("device::{}", case.name), Box::new(move || run(case))));
    }
    tests.push(("device::file".to_owned(), Box::new(|| file_device("", &["touch", "scattered", "48"]))));
    tests.push(("device::file-mixed".to_owned(), Box::new(|| file_device("", &["touch", "mixed", "48"]))));
    tests.push(("device::file-forks".to_owned(), Box::new(|| file_device("", &["fork", "modify", "32"]))));
    tests.push((
        "device::file-failing".to_owned(),
        Box::new(|| file_device("inject:fail-store=%9,fail-load=%50:", &["touch", "scattered", "48"])),
    ));
    suite(tests)
}
