//! Power losses: the virtual machine is killed while it writes; the next boot looks what is there.

use std::time::{Duration, Instant, SystemTime};

use super::bench::{Bench, Plan};
use super::error::VmError;
use super::machine::End;
use super::results::{Outcome, Results, case};
use super::scenarios::power_nvdimms;

/// The file systems.
const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];
/// The power goes at some moment within this time after the first writes were told.
const CUT_WITHIN: Duration = Duration::from_secs(3);

/// Cuts the power `cuts` times. Each boot but the first checks what the one before it has told as flushed; each but
/// the last writes until the power goes.
pub fn run(bench: &Bench, cuts: u32, results: &mut Results) -> Result<(), VmError> {
    let nvdimms = power_nvdimms(&bench.folder.join("images"));
    for nvdimm in &nvdimms {
        nvdimm.create()?;
    }
    let mut flushed: [Vec<String>; 2] = Default::default();
    for round in 0..=cuts {
        let mut scripts = Vec::new();
        let mut files = Vec::new();
        for (n, fs) in FILE_SYSTEMS.into_iter().enumerate() {
            if round > 0 {
                let name = format!("powerloss-{fs}-{round}");
                scripts.push((name, format!("power_check {fs} {}", round - 1)));
                // The last one: it was said after all others.
                let last = std::mem::take(&mut flushed[n]).pop().unwrap_or_default();
                files.push((format!("etc/dax-vm/flushed-{fs}"), format!("{last}\n")));
            }
        }
        let writes = round < cuts;
        if writes {
            let starts: String =
                FILE_SYSTEMS.iter().map(|fs| format!("power_write {fs} {round}\n")).collect();
            scripts.push((format!("powerloss-write-{}", round + 1), format!("{starts}wait")));
        }
        let plan = Plan { name: &format!("powerloss-{round}"), scripts, files, nvdimms: &nvdimms };
        let mut bad = Vec::new();
        let end = bench.boot(&plan, results, |line| {
            take(line, &mut flushed, &mut bad);
            // Both have to be in the middle of it.
            flushed.iter().all(|lines| !lines.is_empty()).then(|| Instant::now() + some_of(CUT_WITHIN))
        })?;
        let name = format!("powerloss-write-{}", round + 1);
        for (fs, outcome) in bad {
            results.add(&name, &fs, outcome);
        }
        if writes {
            let [ext4, xfs] = flushed.each_ref().map(Vec::len);
            println!("   {name}| {ext4} times flushed on ext4, {xfs} times on xfs");
            let outcome = match end {
                End::Cut => Outcome::Passed,
                end => Outcome::Failed(format!("the machine ended before: {end:?}")),
            };
            results.add(&name, "the power is cut while both file systems are written", outcome);
        }
    }
    Ok(())
}

/// Takes `FS flushed …`; anything else that the writer says is a failure.
fn take(line: &str, flushed: &mut [Vec<String>; 2], bad: &mut Vec<(String, Outcome)>) {
    let (fs, said) = line.split_once(' ').unwrap_or((line, ""));
    match FILE_SYSTEMS.iter().position(|known| *known == fs) {
        Some(n) if said.starts_with("flushed ") => flushed[n].push(said["flushed ".len()..].to_owned()),
        _ => {
            let outcome = case(said).map(|(_, outcome)| outcome).filter(|o| *o != Outcome::Passed);
            bad.push((format!("write {fs}"), outcome.unwrap_or_else(|| Outcome::Failed(said.to_owned()))));
        }
    }
}

/// A random part of `time`.
fn some_of(time: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    time.mul_f64(f64::from(now.subsec_nanos() % 1_000_003) / 1_000_003.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_flushed_is_kept_and_all_else_is_a_failure() {
        let (mut flushed, mut bad) = (Default::default(), Vec::new());
        for line in ["ext4 flushed 1", "xfs flushed 1 2", "ext4 flushed 2", "xfs FAILED write: no room"] {
            take(line, &mut flushed, &mut bad);
        }
        assert_eq!(flushed, [vec!["1", "2"], vec!["1 2"]]);
        assert_eq!(bad, [("write xfs".to_owned(), Outcome::Failed("no room".to_owned()))]);
    }
}
