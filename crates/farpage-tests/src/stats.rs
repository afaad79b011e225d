//! What `farpage run --stats-json` wrote, and what a test expects of it.

use std::path::Path;

use serde::Deserialize;

/// The counters that tests look at; every one must be there. Sizes are bytes.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Stats {
    pub processes: u64,
    pub dram_budget: u64,
    pub dram_peak: u64,
    pub faults: u64,
    pub faults_zero: u64,
    pub faults_device: u64,
    pub refaults_staged: u64,
    pub pages_out: u64,
    pub pages_in: u64,
    pub pages_clean: u64,
    pub pages_same: u64,
    pub prefetched: u64,
    pub pinned_skips: u64,
    pub held_skips: u64,
    pub store_errors: u64,
    pub load_errors: u64,
    pub poisoned: u64,
    pub over_budget: u64,
    pub leaked_frames: u64,
    pub reaped: u64,
    /// Audits that were made; 0 without `--audit`.
    #[serde(default)]
    pub audits: u64,
    /// What they found wrong.
    #[serde(default)]
    pub audit_differences: u64,
    /// The most frames in use that one of them saw.
    #[serde(default)]
    pub audit_frames: u64,
    pub devices: Vec<serde_json::Value>,
}

impl Stats {
    /// Reads the file that `--stats-json` named.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text =
            std::fs::read_to_string(path).map_err(|e| format!("no stats in {}: {e}", path.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("stats: {e}\n{text}"))
    }
}

/// What must hold of a run's stats. Leaked frames must always be 0, and every audit find nothing.
#[derive(Debug, Clone, Copy)]
pub struct Expect {
    /// Pages went out, and pages came back (from a device or from staging).
    pub paging: bool,
    /// DRAM stayed within the budget.
    pub within_budget: bool,
    /// No device reported an error and no page was poisoned.
    pub no_errors: bool,
}

impl Expect {
    /// Paging happened, within the budget, without an error.
    pub const PAGED: Self = Self { paging: true, within_budget: true, no_errors: true };
    /// As [`Self::PAGED`], but the amount of paging is left open (short processes, killed ones).
    pub const CLEAN: Self = Self { paging: false, within_budget: true, no_errors: true };
    /// Devices may fail and DRAM may be exceeded.
    pub const FAULTY: Self = Self { paging: false, within_budget: false, no_errors: false };

    /// Says what does not hold.
    pub fn check(&self, stats: &Stats) -> Result<(), String> {
        let mut wrong = Vec::new();
        if stats.leaked_frames != 0 {
            wrong.push("frames leaked");
        }
        if stats.audits == 0 {
            wrong.push("no audit was made");
        }
        if stats.audit_differences != 0 {
            wrong.push("counts or charges differ from what is there (see `farpage: audit:` on stderr)");
        }
        if self.paging && stats.pages_out == 0 {
            wrong.push("no page went out");
        }
        if self.paging && stats.pages_in == 0 {
            wrong.push("no page came back");
        }
        if self.within_budget && stats.dram_peak > stats.dram_budget {
            wrong.push("DRAM went above the budget");
        }
        if self.within_budget && stats.dram_budget == 0 {
            wrong.push("the budget is 0");
        }
        if self.no_errors && (stats.store_errors != 0 || stats.load_errors != 0 || stats.poisoned != 0) {
            wrong.push("device errors or poisoned pages");
        }
        if wrong.is_empty() { Ok(()) } else { Err(format!("{}: {stats:#?}", wrong.join(", "))) }
    }
}
