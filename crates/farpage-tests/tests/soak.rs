//! `farpage-soak` under farpage: ten seconds, or as many as `FARPAGE_SOAK_SECONDS` says, with the seed of
//! `FARPAGE_SOAK_SEED` where that is set.

use std::process::ExitCode;
use std::time::Duration;

use farpage_tests::{Job, Verdict, plain_only, run_farpage, run_plain, suite};

fn number(key: &str) -> Option<u64> {
    std::env::var(key).ok()?.parse().ok()
}

fn soak(seconds: u64, more: &[&str]) -> Job {
    let mut argv =
        vec![env!("CARGO_BIN_EXE_farpage-soak").to_owned(), "--seconds".into(), seconds.to_string()];
    if let Some(seed) = number("FARPAGE_SOAK_SEED") {
        argv.extend(["--seed".to_owned(), seed.to_string()]);
    }
    argv.extend(more.iter().map(|s| (*s).to_owned()));
    Job::new(argv).limit(Duration::from_secs(seconds + 120)).device("ram:768M")
}

fn run(more: &'static [&'static str], seconds: u64) -> Result<Verdict, String> {
    let plain = run_plain(&soak(1, more))?;
    if plain.status != 0 {
        return Err(format!("fails without farpage: {}", plain.stderr));
    }
    if plain_only() {
        return Ok(Verdict::Passed);
    }
    let (outcome, stats) = run_farpage(&soak(number("FARPAGE_SOAK_SECONDS").unwrap_or(seconds), more))?;
    let said = String::from_utf8_lossy(&outcome.stdout);
    if outcome.status != 0 || !said.ends_with("farpage-soak: all right\n") {
        return Err(format!("status {}\n{said}\n{}\n{stats:#?}", outcome.status, outcome.tail()));
    }
    Ok(Verdict::Passed)
}

fn main() -> ExitCode {
    suite(vec![
        ("soak::everything".to_owned(), Box::new(|| run(&[], 10))),
        ("soak::one-thread".to_owned(), Box::new(|| run(&["--threads", "1"], 5))),
        ("soak::no-fork".to_owned(), Box::new(|| run(&["--no-fork", "--size", "160"], 5))),
    ])
}
