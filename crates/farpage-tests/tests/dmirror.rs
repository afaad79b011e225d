//! The HMM test device: `programs/dmirror.c` with `libfarpage_dmirror.so` preloaded and nothing else, on private and on
//! coherent devices.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use farpage_tests::{Test, Verdict, dmirror_library, plain_only, program, suite};

const CASES: &[&str] = &[
    "errors",
    "faults",
    "migrate",
    "forks",
    "mappings",
    "snapshot",
    "exclusive",
    "huge",
    "huge-zero",
    "page-map",
    "huge-threads",
    "paths",
    "huge-move",
    "killed",
    "huge-fault",
    "huge-empty",
    "threads",
    "gup",
];
/// Of each pair of devices one.
const MINORS: &[u8] = &[0, 2];
const LIMIT: Duration = Duration::from_secs(60);
/// The program's own word for "not here".
const SKIP: i32 = 77;

fn main() -> ExitCode {
    let mut tests: Vec<Test> = Vec::new();
    for &case in CASES {
        for &minor in MINORS {
            tests.push((format!("dmirror{minor}::{case}"), Box::new(move || run(case, minor))));
        }
    }
    suite(tests)
}

fn run(case: &str, minor: u8) -> Result<Verdict, String> {
    if plain_only() {
        return Ok(Verdict::Skipped("the program has nothing to work on without the library".to_owned()));
    }
    let path = match program("dmirror") {
        Ok(path) => path,
        Err(verdict) => return verdict,
    };
    let library = dmirror_library()?;
    let mut child = Command::new(path)
        .args([case, &minor.to_string()])
        .env("LD_PRELOAD", library)
        .envs((case == "killed").then_some(("FARPAGE_DMIRROR_SIZE", "1M")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start the program: {e}"))?;
    let started = Instant::now();
    while child.try_wait().map_err(|e| e.to_string())?.is_none() {
        if started.elapsed() > LIMIT {
            child.kill().map_err(|e| e.to_string())?;
            child.wait().map_err(|e| e.to_string())?;
            return Err(format!("not done after {LIMIT:?}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let out = child.wait_with_output().map_err(|e| e.to_string())?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    match out.status.code() {
        Some(0) if text.is_empty() => Ok(Verdict::Passed),
        Some(SKIP) => Ok(Verdict::Skipped(text.trim().trim_start_matches("SKIP ").to_owned())),
        _ => Err(format!("{}:\n{text}", out.status)),
    }
}
