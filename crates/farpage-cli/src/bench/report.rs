//! The report of `farpage bench swap`, as a table and as JSON.

use std::fmt::Write;
use std::fs;

use serde_json::{Value, json};

use super::plan::{Args, Case, Must};
use super::proc;
use super::side::{Outcome, counter};
use super::stats::{Ratio, median, ratio};
use crate::access::{Pattern, Slow};

/// Anonymous memory that a program and farpage itself may have beyond the budget, in bytes: heap, stacks
/// and tables that are not managed. A row with more is no fair comparison and says so.
const UNMANAGED: u64 = 8 << 20;

/// Two plain runs differ by this much on a quiet machine: a requirement of "no slower" allows for it.
const NOISE: f64 = 0.05;

/// Where it was measured, and what with.
#[derive(Debug, Default, serde::Serialize)]
#[allow(missing_docs)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub transparent_huge_pages: String,
    pub dram_bytes: u64,
    pub size_bytes: u64,
    pub rounds: u32,
    pub kernel_side: Option<String>,
    pub kernel_side_missing: Option<String>,
    /// See [`super::bare`].
    pub bare_fault_us: Option<f64>,
    /// Our side is inline regions of the library.
    pub inline: bool,
}

impl Machine {
    /// This machine.
    pub fn here(args: &Args) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_string();
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        Machine {
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: proc::cpu_name(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            transparent_huge_pages: huge.split(['[', ']']).nth(1).unwrap_or("never").to_string(),
            dram_bytes: args.dram,
            size_bytes: args.size,
            rounds: args.rounds(),
            ..Machine::default()
        }
    }
}

/// One case with what its rounds gave.
pub struct Row {
    /// What was run.
    pub case: Case,
    /// The kernel's rounds (swap, or plain DRAM within the budget).
    pub theirs: Vec<Outcome>,
    /// Ours.
    pub ours: Vec<Outcome>,
    /// The share of our accesses that went to the device, by farpage's counters; `hot` only.
    pub miss: Option<f64>,
}

impl Row {
    /// Without any rounds yet.
    pub fn new(case: Case) -> Row {
        Row { case, theirs: Vec::new(), ours: Vec::new(), miss: None }
    }

    fn ratio(&self) -> Option<Ratio> {
        ratio(&times(&self.theirs), &times(&self.ours))
    }

    /// How much faster than swap random accesses of one thread could be if each of our faults took only `bare` µs, and all
    /// else nothing.
    fn most_by_a_thread(&self, bare: f64) -> Option<f64> {
        if !matches!(self.case.spec.pattern, Pattern::RandRead | Pattern::RandWrite)
            || self.case.spec.threads != 1
        {
            return None;
        }
        let faults = |o: &Outcome| o.phase.slow.count as f64 / o.phase.accesses as f64;
        let faults = median(&self.ours.iter().map(faults).collect::<Vec<_>>())?;
        Some(median(&times(&self.theirs))? / (bare * faults))
    }

    fn idle_percent(&self) -> Option<f64> {
        let share = |o: &Outcome| o.phase.idle_cpu_ms / (o.phase.seconds * 10.0);
        median(&self.ours.iter().map(share).collect::<Vec<_>>())
            .filter(|_| self.case.spec.pattern == Pattern::Idle)
    }

    /// The most anonymous DRAM of our processes in any round, where it is more than they were given.
    fn over_budget(&self) -> Option<u64> {
        let peak = self.ours.iter().map(|o| o.rss_peak).max()?;
        (peak > self.case.spec.dram + UNMANAGED).then_some(peak)
    }

    /// Whether the requirement is met; `None` where there is none or it was not measured.
    fn met(&self) -> Option<bool> {
        let must = self.case.must?;
        if self.over_budget().is_some() {
            return Some(false);
        }
        Some(match must {
            Must::Faster(times) => self.ratio()?.of_medians >= times,
            Must::AtMostTimes(times) => 1.0 / self.ratio()?.of_medians <= times.max(1.0 + NOISE),
            Must::MissPercent(percent) => self.miss? * 100.0 <= percent,
        })
    }

    fn json(&self) -> Value {
        let spec = &self.case.spec;
        json!({
            "pattern": spec.pattern, "ratio": spec.ratio.to_string(), "threads": spec.threads,
            "against": if self.case.within_budget { "plain" } else { "swap" },
            "size_bytes": spec.size, "dram_bytes": spec.dram,
            "theirs": side(&self.theirs), "farpage": side(&self.ours),
            "farpage_stats": self.ours.last().and_then(|o| o.stats.clone()),
            "times_faster": self.ratio(),
            "farpage_miss_share": self.miss,
            "idle_cpu_percent": self.idle_percent(),
            "over_budget_bytes": self.over_budget(), "must": self.case.must, "met": self.met(),
        })
    }
}

/// Time per access in µs of every round: wall time over the accesses of all threads.
fn times(outcomes: &[Outcome]) -> Vec<f64> {
    outcomes.iter().map(|o| o.phase.seconds * 1e6 / o.phase.accesses as f64).collect()
}

/// Faults of a kind per access.
fn fault_share(outcomes: &[Outcome], of: impl Fn(&Outcome) -> u64) -> Option<f64> {
    let share = |o: &Outcome| of(o) as f64 / o.phase.accesses as f64;
    median(&outcomes.iter().map(share).collect::<Vec<_>>())
}

/// Swap-ins per access.
fn swap_ins(outcomes: &[Outcome]) -> Option<f64> {
    fault_share(outcomes, |o| o.phase.major_faults)
}

fn percentile(outcomes: &[Outcome], of: impl Fn(&Slow) -> f64) -> Option<f64> {
    median(&outcomes.iter().filter(|o| o.phase.slow.count > 0).map(|o| of(&o.phase.slow)).collect::<Vec<_>>())
}

fn side(outcomes: &[Outcome]) -> Option<Value> {
    let us_per_access = median(&times(outcomes));
    (!outcomes.is_empty()).then(|| {
        json!({
            "us_per_access": us_per_access, "us_per_access_rounds": times(outcomes),
            "fault_us": {
                "p50": percentile(outcomes, |s| s.p50), "p99": percentile(outcomes, |s| s.p99),
                "p99.9": percentile(outcomes, |s| s.p999), "max": percentile(outcomes, |s| s.max),
            },
            "major_faults_per_access": swap_ins(outcomes),
            "minor_faults_per_access": fault_share(outcomes, |o| o.phase.minor_faults),
            "rss_anon_peak_bytes": outcomes.iter().map(|o| o.rss_peak).max(),
        })
    })
}

/// Everything that was measured.
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// What.
    pub rows: Vec<Row>,
}

impl Report {
    /// For programs.
    pub fn json(&self) -> String {
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        format!("{:#}\n", json!({ "machine": self.machine, "results": rows }))
    }

    /// For people.
    pub fn table(&self) -> String {
        let m = &self.machine;
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "Linux {}, {} × {}, huge pages: {}",
            m.kernel, m.cpus, m.cpu, m.transparent_huge_pages
        );
        let _ = writeln!(
            text,
            "medians of {} round(s), times in µs per access (wall time over the accesses of all threads)",
            m.rounds
        );
        let groups = [
            (
                false,
                format!("{} MiB touched within {} MiB of DRAM; ", m.size_bytes >> 20, m.dram_bytes >> 20)
                    + m.kernel_side.as_deref().unwrap_or("no comparison with the kernel's swap"),
            ),
            (true, "Within the budget, against the same program without farpage".to_string()),
        ];
        for (within_budget, title) in groups {
            let rows: Vec<&Row> = self
                .rows
                .iter()
                .filter(|r| r.case.within_budget == within_budget && r.case.spec.pattern != Pattern::Idle)
                .collect();
            if !rows.is_empty() {
                let _ = writeln!(text, "\n{title}");
                text += &table(&rows, if within_budget { "plain" } else { "swap" });
            }
        }
        if let Some(bare) = m.bare_fault_us {
            let by =
                if m.inline { "the thread itself in a SIGBUS handler" } else { "a thread on the same CPU" };
            let _ = writeln!(
                text,
                "\na bare fault takes {bare:.1} µs: userfaultfd, one page moved in by {by}, no device, no reclaim"
            );
            for row in &self.rows {
                if let Some(most) = row.most_by_a_thread(bare) {
                    let _ = writeln!(
                        text,
                        "  so {} × 1 can be at most {most:.2}× as fast as swap",
                        row.case.name
                    );
                }
            }
        }
        for row in &self.rows {
            if let Some(percent) = row.idle_percent() {
                let _ = writeln!(text, "\nidle after paging: {percent:.3}% of one CPU");
            }
        }
        let paged = || self.rows.iter().filter(|r| !r.case.within_budget);
        if let Some(peak) = paged().flat_map(|r| &r.ours).map(|o| o.rss_peak).max() {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let _ = writeln!(
                text,
                "\nDRAM: farpage's processes had at most {:.1} MiB of anonymous memory resident, all of it counted (budget {} MiB)",
                mib(peak),
                m.dram_bytes >> 20
            );
        }
        for row in paged() {
            let Some(stats) = row.ours.last().and_then(|o| o.stats.as_ref()) else { continue };
            let counters: Vec<String> =
                ["faults_device", "refaults_staged", "prefetched", "pages_out", "pages_in", "pages_clean"]
                    .iter()
                    .filter_map(|name| Some(format!("{name} {}", counter(stats, name)?)))
                    .collect();
            if !counters.is_empty() {
                let _ = writeln!(
                    text,
                    "  {} × {}: {}",
                    row.case.name,
                    row.case.spec.threads,
                    counters.join(", ")
                );
            }
        }
        text
    }
}

fn table(rows: &[&Row], theirs: &str) -> String {
    let mut cells = vec![vec![
        "pattern".to_string(),
        "threads".into(),
        theirs.into(),
        "farpage".into(),
        "faster".into(),
        "rounds".into(),
        format!("{theirs} p50/p99/p99.9"),
        "farpage p50/p99/p99.9".into(),
        format!("{theirs} miss"),
        "farpage miss".into(),
        "required".into(),
    ]];
    for row in rows {
        let ratio = row.ratio();
        let rounds = ratio.as_ref().map(|r| {
            let (low, high) = r.rounds.iter().fold((f64::MAX, 0.0f64), |(l, h), x| (l.min(*x), h.max(*x)));
            format!("{low:.2}–{high:.2}")
        });
        let percentiles = |outcomes: &[Outcome]| {
            let p = |of: fn(&Slow) -> f64| percentile(outcomes, of).map(|v| format!("{v:.1}"));
            Some(format!("{}/{}/{}", p(|s| s.p50)?, p(|s| s.p99)?, p(|s| s.p999)?))
        };
        let time = |outcomes: &[Outcome]| median(&times(outcomes)).map(|t| format!("{t:.3}"));
        let percent = |share: Option<f64>| share.map(|s| format!("{:.2}%", s * 100.0));
        // Only `hot` is about misses: there, ours come from farpage's counters, which tell the device
        // from a page that had not left DRAM yet.
        let hot = row.case.spec.pattern == Pattern::Hot;
        let required = row.case.must.map(|must| {
            let figure = match must {
                Must::Faster(x) => format!("≥{x}×"),
                Must::AtMostTimes(x) => format!("≥{:.2}×", 1.0 / x),
                Must::MissPercent(x) => format!("miss ≤{x}%"),
            };
            let verdict = match (row.over_budget(), row.met()) {
                (Some(_), _) => "OVER BUDGET",
                (None, None) => "not measured",
                (None, Some(true)) => "met",
                (None, Some(false)) => "MISSED",
            };
            format!("{figure} {verdict}")
        });
        let line = [
            Some(row.case.name.clone()),
            Some(row.case.spec.threads.to_string()),
            time(&row.theirs),
            time(&row.ours),
            ratio.as_ref().map(|r| format!("{:.2}×", r.of_medians)),
            rounds,
            percentiles(&row.theirs),
            percentiles(&row.ours),
            percent(swap_ins(&row.theirs)).filter(|_| hot),
            percent(row.miss),
            required,
        ];
        cells.push(line.into_iter().map(|cell| cell.unwrap_or_else(|| "–".into())).collect());
    }
    align(&cells)
}

/// Columns as wide as their widest cell; the first is left-aligned, the others right-aligned.
pub(super) fn align(cells: &[Vec<String>]) -> String {
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in cells {
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(width(column) - cell.chars().count());
            match column {
                0 => text.extend([cell.as_str(), &pad]),
                _ => text.extend(["  ", &pad, cell.as_str()]),
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Phase;
    use crate::bench::data::Content;
    use crate::bench::side::Spec;

    fn outcome(pattern: Pattern, us: f64) -> Outcome {
        let slow = Slow { count: 10, p50: us, p99: us * 2.0, p999: us * 3.0, max: us * 4.0 };
        let phase = Phase {
            pattern,
            threads: 1,
            accesses: 1000,
            seconds: us / 1e3,
            major_faults: 43,
            minor_faults: 0,
            slow,
            rss_anon: 0,
            idle_cpu_ms: 0.0,
        };
        Outcome { phase, rss_peak: 100 << 20, stats: Some(json!({"faults_device": 5})) }
    }

    fn row(pattern: Pattern, must: Must, theirs: &[f64], ours: &[f64]) -> Row {
        let spec = Spec {
            pattern,
            ratio: Content::Ratio(2.0),
            threads: 1,
            size: 512 << 20,
            dram: 128 << 20,
            hot: 64 << 20,
            ops: 1000,
            warm: 0,
            verify: 0,
            sleep_ms: 0,
            inline: false,
        };
        let mut row = Row::new(Case { spec, name: "name@2".into(), within_budget: false, must: Some(must) });
        row.theirs = theirs.iter().map(|us| outcome(pattern, *us)).collect();
        row.ours = ours.iter().map(|us| outcome(pattern, *us)).collect();
        row
    }

    #[test]
    fn requirements_are_judged_by_the_medians() {
        let seq = |ours: &[f64]| row(Pattern::Seq, Must::Faster(2.0), &[10.0, 12.0, 50.0], ours).met();
        assert_eq!(seq(&[6.0, 1.0, 100.0]), Some(true));
        assert_eq!(seq(&[6.1, 1.0, 100.0]), Some(false));
        assert_eq!(seq(&[]), None);
        let touch = |ours| row(Pattern::FirstTouch, Must::AtMostTimes(1.2), &[1.0], &[ours]).met();
        assert_eq!((touch(1.19), touch(1.21)), (Some(true), Some(false)));
        let no_slower = |ours| row(Pattern::Malloc, Must::AtMostTimes(1.0), &[1.0], &[ours]).met();
        assert_eq!((no_slower(1.04), no_slower(1.06)), (Some(true), Some(false)));
        let mut hot = row(Pattern::Hot, Must::MissPercent(4.5), &[1.0], &[1.0]);
        assert_eq!(hot.met(), None);
        hot.miss = Some(0.044);
        assert_eq!(hot.met(), Some(true));
        hot.miss = Some(0.046);
        assert_eq!(hot.met(), Some(false));
    }

    #[test]
    fn too_much_dram_meets_nothing() {
        let mut row = row(Pattern::Seq, Must::Faster(2.0), &[10.0], &[1.0]);
        assert_eq!(row.met(), Some(true));
        row.ours[0].rss_peak = (128 << 20) + UNMANAGED + 1;
        assert_eq!(row.met(), Some(false));
        assert!(table(&[&row], "swap").contains("OVER BUDGET"));
    }

    #[test]
    fn table_and_json_say_the_same() {
        let mut hot = row(Pattern::Hot, Must::MissPercent(4.5), &[10.0, 12.0], &[5.0, 6.0]);
        hot.miss = Some(0.05);
        let report = Report { machine: Machine::default(), rows: vec![hot] };
        let table = report.table();
        for part in
            ["11.000", "5.500", "2.00×", "5.5/11.0/16.5", "4.30%", "5.00%", "miss ≤4.5% MISSED", "100.0 MiB"]
        {
            assert!(table.contains(part), "{part} in\n{table}");
        }
        let json: Value = serde_json::from_str(&report.json()).unwrap();
        let row = &json["results"][0];
        assert_eq!(row["times_faster"]["of_medians"], 2.0);
        assert_eq!(row["times_faster"]["rounds"], json!([2.0, 2.0]));
        assert_eq!(row["theirs"]["us_per_access"], 11.0);
        assert_eq!((&row["met"], &row["farpage_miss_share"]), (&json!(false), &json!(0.05)));
    }

    #[test]
    fn a_side_that_did_not_run_leaves_gaps() {
        let report = Report {
            machine: Machine::default(),
            rows: vec![row(Pattern::Seq, Must::Faster(2.0), &[], &[3.0])],
        };
        assert!(report.table().contains("not measured"));
        let json: Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["results"][0]["theirs"], Value::Null);
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_string(), "µs".into()], vec!["bbb".into(), "1".into()]];
        assert_eq!(align(&rows), "a    µs\nbbb   1\n");
    }
}
