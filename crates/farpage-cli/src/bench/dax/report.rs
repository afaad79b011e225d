//! The report of `farpage bench dax`.

use std::fmt::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::case::Case;
use crate::bench::report::align;
use crate::bench::stats::{median, ratio};

/// Where it was measured.
#[derive(Debug, serde::Serialize)]
#[allow(missing_docs)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub dir: PathBuf,
    pub access: &'static str,
    /// The part that is mapped, pinned and punched is mapped by a page of 2 MiB, before it is punched.
    pub huge: bool,
    pub rounds: u32,
}

/// A case and what its rounds gave, in microseconds.
pub struct Row {
    /// What was measured.
    pub case: Case,
    bare: Vec<f64>,
    ours: Vec<f64>,
    missing: Option<String>,
}

/// Everything.
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// What.
    pub rows: Vec<Row>,
}

impl Row {
    /// Without any round yet.
    pub fn new(case: Case) -> Self {
        Self { case, bare: Vec::new(), ours: Vec::new(), missing: None }
    }

    /// One that cannot be measured here.
    pub fn missing(case: Case, why: String) -> Self {
        Self { missing: Some(why), ..Self::new(case) }
    }

    /// One round.
    pub fn add(&mut self, bare: f64, ours: f64) {
        self.bare.push(bare);
        self.ours.push(ours);
    }

    /// Ours as a multiple of the bare side in each round.
    fn rounds(&self) -> Vec<f64> {
        ratio(&self.ours, &self.bare).map(|r| r.rounds).unwrap_or_default()
    }

    /// The median of that: what disturbs a round disturbs both of its sides.
    fn costs(&self) -> Option<f64> {
        median(&self.rounds())
    }

    fn met(&self) -> Option<bool> {
        Some(self.costs()? <= self.case.at_most?)
    }

    fn json(&self) -> Value {
        json!({
            "name": self.case.name,
            "bare_us": median(&self.bare), "farpage_us": median(&self.ours),
            "bare_us_rounds": self.bare, "farpage_us_rounds": self.ours,
            "costs": self.costs(), "at_most": self.case.at_most, "met": self.met(),
            "missing": self.missing,
        })
    }

    fn cells(&self) -> Vec<String> {
        let time = |times: &[f64]| median(times).map(|us| format!("{us:.2}"));
        let rounds = self.rounds();
        let (low, high) = rounds.iter().fold((f64::MAX, 0.0f64), |(l, h), x| (l.min(*x), h.max(*x)));
        let required = self.case.at_most.map(|at_most| {
            let verdict = match self.met() {
                None => "not measured",
                Some(true) => "met",
                Some(false) => "MISSED",
            };
            format!("≤{at_most}× {verdict}")
        });
        let cells = [
            Some(self.case.name.to_owned()),
            time(&self.bare),
            time(&self.ours),
            self.costs().map(times),
            (!rounds.is_empty()).then(|| format!("{}–{}", times(low), times(high))),
            required,
        ];
        cells.into_iter().map(|cell| cell.unwrap_or_else(|| "–".into())).collect()
    }
}

/// A multiple, to two digits behind the point or at least one that is not 0.
fn times(costs: f64) -> String {
    let digits = if costs >= 0.1 || costs <= 0.0 { 2 } else { (1.0 - costs.log10()) as usize };
    format!("{costs:.digits$}×")
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
            "Linux {}, {} × {}; a file in {}: {}, pages of {}",
            m.kernel,
            m.cpus,
            m.cpu,
            m.dir.display(),
            m.access,
            if m.huge { "2M" } else { "4K" }
        );
        let _ = writeln!(text, "medians of {} round(s), in µs\n", m.rounds);
        let head = ["act", "bare", "farpage", "costs", "rounds", "required"].map(String::from).to_vec();
        let rows = self.rows.iter().map(Row::cells);
        text += &align(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
        for row in &self.rows {
            if let Some(why) = &row.missing {
                let _ = writeln!(text, "not measured: {}: {why}", row.case.name);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::dax::case;

    #[test]
    fn the_verdict_is_by_the_median_of_the_rounds() {
        let mut row = Row::new(case::all().remove(0));
        row.case.at_most = Some(1.5);
        assert_eq!((row.met(), row.cells()[5].as_str()), (None, "≤1.5× not measured"));
        for (bare, ours) in [(10.0, 14.0), (10.0, 90.0), (1000.0, 1100.0)] {
            row.add(bare, ours);
        }
        assert_eq!(row.met(), Some(true));
        assert_eq!(row.cells()[3..], ["1.40×", "1.10×–9.00×", "≤1.5× met"]);
        assert_eq!(times(0.0034), "0.003×");
        assert_eq!(times(0.1), "0.10×");
        row.case.at_most = Some(1.3);
        assert_eq!(row.cells()[5], "≤1.3× MISSED");
    }
}
