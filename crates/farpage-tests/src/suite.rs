//! A test suite by table: each test passes, fails, or says why this machine cannot run it.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// How a test ended that did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It ran and everything held.
    Passed,
    /// It could not run here; why.
    Skipped(String),
}

/// True where only the programs themselves are to be tested, without farpage (`FARPAGE_TESTS=plain`).
pub fn plain_only() -> bool {
    std::env::var_os("FARPAGE_TESTS").is_some_and(|v| v == "plain")
}

/// A test's body.
pub type Body = Box<dyn FnOnce() -> Result<Verdict, String> + Send>;

/// A test's name and body.
pub type Test = (String, Body);

/// Runs the tests as `cargo test` expects it; skipped ones are counted as ignored, listed with their reason,
/// and summed up in a last line that begins with `SKIPPED`.
pub fn suite(tests: Vec<Test>) -> ExitCode {
    let mut args = Arguments::from_args();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    args.test_threads.get_or_insert(cpus.min(4));
    let skipped = Arc::new(Mutex::new(Vec::new()));
    let times = Arc::new(Mutex::new(Vec::new()));
    let trials = tests
        .into_iter()
        .map(|(name, body)| {
            let skipped = Arc::clone(&skipped);
            let times = Arc::clone(&times);
            Trial::ignorable_test(name.clone(), move || {
                let started = Instant::now();
                let verdict = body();
                times.lock().unwrap_or_else(PoisonError::into_inner).push((started.elapsed(), name.clone()));
                match verdict {
                    Ok(Verdict::Passed) => Ok(Completion::Completed),
                    Ok(Verdict::Skipped(why)) => {
                        skipped.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{name}: {why}"));
                        Ok(Completion::ignored_with(format!("SKIPPED: {why}")))
                    }
                    Err(text) => Err(Failed::from(text)),
                }
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&args, trials);
    let skipped = skipped.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = std::io::stdout().lock();
    for line in skipped.iter() {
        // A closed pipe is no reason to change the verdict.
        let _ = writeln!(out, "SKIPPED: {line}");
    }
    if !skipped.is_empty() {
        let _ = writeln!(out, "SKIPPED in total: {}", skipped.len());
    }
    let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
    times.sort_by(|a, b| b.cmp(a));
    let slowest: Vec<_> =
        times.iter().take(5).map(|(t, name)| format!("{name} {:.1} s", t.as_secs_f64())).collect();
    let _ = writeln!(out, "slowest: {}", slowest.join(", "));
    if plain_only() {
        let _ = writeln!(out, "NOTE: FARPAGE_TESTS=plain, farpage itself was not tested");
    }
    conclusion.exit_code()
}
