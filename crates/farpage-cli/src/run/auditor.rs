//! `farpage run --audit`: compares counts with references while the program runs. For tests.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farpage::domain::Launcher;
use serde_json::{Value, json};

use crate::error::{CliError, system};
use crate::say;

/// Processes may end by the hundred: not more often than this before they are reaped.
const BETWEEN: Duration = Duration::from_millis(20);
/// Lines about differences at most.
const MOST_SAID: u64 = 20;

#[derive(Debug, Default)]
struct Sum {
    audits: u64,
    differences: u64,
    /// The most frames in use that one audit saw.
    frames: u64,
    /// Processes that did not count their DRAM, all audits together.
    silent: u64,
    last: Option<Instant>,
}

/// What all audits of a run have found.
pub struct Auditor {
    launcher: Arc<Launcher>,
    sum: Mutex<Sum>,
}

impl Auditor {
    /// Starts a thread that audits every so often, until this process ends.
    pub fn start(launcher: Arc<Launcher>, every: Duration) -> Result<Arc<Self>, CliError> {
        let auditor = Arc::new(Self { launcher, sum: Mutex::default() });
        let work = {
            let auditor = auditor.clone();
            move || {
                loop {
                    std::thread::sleep(every);
                    auditor.audit(&mut auditor.sum(), true);
                }
            }
        };
        let thread = std::thread::Builder::new().name("farpage-audit".into()).spawn(work);
        thread.map(|_| auditor).map_err(system("starting a thread failed"))
    }

    /// Processes have died, perhaps: what they held is still there.
    pub fn before_reaping(&self) {
        let mut sum = self.sum();
        if sum.last.is_none_or(|at| at.elapsed() > BETWEEN) {
            self.audit(&mut sum, false);
        }
    }

    /// Differences so far.
    pub fn differences(&self) -> u64 {
        self.sum().differences
    }

    /// The last audit, when all has ended; adds what was found to the statistics.
    pub fn finish(&self, stats: &mut Value) {
        let mut sum = self.sum();
        self.audit(&mut sum, false);
        stats["audits"] = json!(sum.audits);
        stats["audit_differences"] = json!(sum.differences);
        stats["audit_frames"] = json!(sum.frames);
        stats["audit_silent"] = json!(sum.silent);
    }

    fn sum(&self) -> MutexGuard<'_, Sum> {
        self.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn audit(&self, sum: &mut Sum, charges: bool) {
        let lines: Vec<String> = match self.launcher.audit(charges) {
            Ok(audit) => {
                sum.frames = sum.frames.max(audit.frames);
                sum.silent += audit.silent.len() as u64;
                let frames = audit.differences.iter().map(ToString::to_string);
                frames.chain(audit.charges.iter().map(ToString::to_string)).collect()
            }
            Err(e) => vec![e.to_string()],
        };
        for line in lines {
            if sum.differences < MOST_SAID {
                say(&format!("audit: {line}"));
            }
            sum.differences += 1;
        }
        sum.audits += 1;
        sum.last = Some(Instant::now());
    }
}
