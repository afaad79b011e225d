//! DAX files with the page cache accepted, tried by the same program (`farpage-dax-suite`) that tries real DAX in a
//! virtual machine: on tmpfs, and on the file system that this was built on.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use farpage_tests::{Test, Verdict, plain_only, suite};

const PROGRAM: &str = env!("CARGO_BIN_EXE_farpage-dax-suite");
/// How long cases run that try random moments.
const SECONDS: &str = "1";

fn names(expect: &str) -> Vec<String> {
    let out = Command::new(PROGRAM).args(["list", "--expect", expect]).output();
    let out = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    out.lines().map(str::to_owned).collect()
}

fn run(dir: &Path, expect: &str, name: &str) -> Result<Verdict, String> {
    if plain_only() {
        return Ok(Verdict::Skipped("the program does nothing without farpage".to_owned()));
    }
    let out = Command::new(PROGRAM)
        .args(["run", "--expect", expect, "--seconds", SECONDS, "--only", name, "--dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot start {PROGRAM}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let first = text.lines().next().unwrap_or_default();
    if out.status.success() && first == format!("ok {name}") {
        return Ok(Verdict::Passed);
    }
    match first.strip_prefix(&format!("SKIPPED {name}: ")) {
        Some(why) if out.status.success() => Ok(Verdict::Skipped(why.to_owned())),
        _ => Err(format!("{}: {text}{}", out.status, String::from_utf8_lossy(&out.stderr))),
    }
}

fn main() -> ExitCode {
    let dirs = [("tmpfs", PathBuf::from("/dev/shm")), ("disk", PathBuf::from(env!("CARGO_TARGET_TMPDIR")))];
    let mut tests: Vec<Test> = Vec::new();
    let mut cases = 0;
    for (fs, dir) in &dirs {
        for expect in ["page-cache", "refused", "device"] {
            for name in names(expect) {
                cases += 1;
                let dir = dir.clone();
                tests.push((format!("dax-{fs}::{name}"), Box::new(move || run(&dir, expect, &name))));
            }
        }
    }
    tests.push((
        "dax::cases".to_owned(),
        Box::new(move || match cases {
            0..60 => Err(format!("{PROGRAM} names {cases} cases only")),
            _ => Ok(Verdict::Passed),
        }),
    ));
    suite(tests)
}
