//! What came out of the cases.

use std::collections::BTreeSet;
use std::time::Instant;

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// A case, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    pub scenario: String,
    pub name: String,
    pub outcome: Outcome,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { scenario, name, outcome } = self;
        match outcome {
            Outcome::Passed => write!(f, "ok {scenario}: {name}"),
            Outcome::Failed(why) => write!(f, "FAILED {scenario}: {name}: {why}"),
            Outcome::Skipped(why) => write!(f, "SKIPPED {scenario}: {name}: {why}"),
        }
    }
}

/// Reads a line of the test program: `ok NAME`, `FAILED NAME: why` or `SKIPPED NAME: why`.
pub fn case(line: &str) -> Option<(String, Outcome)> {
    if let Some(name) = line.strip_prefix("ok ") {
        return Some((name.to_owned(), Outcome::Passed));
    }
    let (rest, outcome) = match (line.strip_prefix("FAILED "), line.strip_prefix("SKIPPED ")) {
        (Some(rest), _) => (rest, Outcome::Failed as fn(String) -> Outcome),
        (_, Some(rest)) => (rest, Outcome::Skipped as fn(String) -> Outcome),
        _ => return None,
    };
    let (name, why) = rest.split_once(": ").unwrap_or((rest, "no reason given"));
    Some((name.to_owned(), outcome(why.to_owned())))
}

/// Collects the cases of all boots.
#[derive(Debug, Default)]
pub struct Results {
    pub cases: Vec<Case>,
    /// Mount options, devices and what the kernel said, by scenario, in order.
    pub notes: Vec<(String, String)>,
}

impl Results {
    /// Adds a case and shows it.
    pub fn add(&mut self, scenario: &str, name: &str, outcome: Outcome) {
        let case = Case { scenario: scenario.to_owned(), name: name.to_owned(), outcome };
        println!("{case}");
        self.cases.push(case);
    }

    /// How many passed, failed and were skipped.
    pub fn count(&self) -> (usize, usize, usize) {
        let count = |is: fn(&Outcome) -> bool| self.cases.iter().filter(|case| is(&case.outcome)).count();
        (
            count(|o| *o == Outcome::Passed),
            count(|o| matches!(o, Outcome::Failed(_))),
            count(|o| matches!(o, Outcome::Skipped(_))),
        )
    }
}

/// Follows what the programs of one boot say.
#[derive(Debug)]
pub struct Boot<'a> {
    results: &'a mut Results,
    /// Scenarios that have not ended yet.
    waiting: BTreeSet<String>,
    scenario: String,
    began: Instant,
    suite: Option<Suite>,
    done: bool,
}

/// The run of the test program that is going on.
#[derive(Debug, Default)]
struct Suite {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Does it say how many cases there were? Then that has to be right.
    counts: bool,
    totals: Option<String>,
}

impl<'a> Boot<'a> {
    /// A boot in which these scenarios are run.
    pub fn new(results: &'a mut Results, scenarios: impl IntoIterator<Item = String>) -> Self {
        let waiting = scenarios.into_iter().collect();
        Self {
            results,
            waiting,
            scenario: "boot".to_owned(),
            began: Instant::now(),
            suite: None,
            done: false,
        }
    }

    /// Takes a line that a program of the machine said.
    pub fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("::") {
            let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
            self.told(word, rest);
        } else if let Some((name, outcome)) = case(line) {
            if let Some(suite) = &mut self.suite {
                *match outcome {
                    Outcome::Passed => &mut suite.passed,
                    Outcome::Failed(_) => &mut suite.failed,
                    Outcome::Skipped(_) => &mut suite.skipped,
                } += 1;
            }
            self.results.add(&self.scenario, &name, outcome);
        } else if line.starts_with("/init: ") {
            // The shell cannot do what a script asks of it.
            self.results.add(&self.scenario, "script", Outcome::Failed(line.to_owned()));
        } else {
            if let (Some(suite), true) = (&mut self.suite, line.starts_with("suite: ")) {
                suite.totals = Some(line.to_owned());
            }
            println!("   {}| {line}", self.scenario);
        }
    }

    fn told(&mut self, word: &str, rest: &str) {
        match word {
            "begin" => {
                println!("\n--- {rest}");
                self.scenario = rest.to_owned();
                self.began = Instant::now();
            }
            "end" => {
                println!("--- {rest}: {:.1} s", self.began.elapsed().as_secs_f32());
                self.waiting.remove(rest);
                self.scenario = "boot".to_owned();
            }
            // A power loss is one case, which has no totals.
            "suite" => self.suite = Some(Suite { counts: rest != "powerloss", ..Suite::default() }),
            "status" => self.suite_ended(rest),
            "mounted" => {
                println!("   {}| {rest}", self.scenario);
                self.results.notes.push((self.scenario.clone(), rest.to_owned()));
            }
            "done" => self.done = true,
            _ => self.results.add(&self.scenario, word, Outcome::Failed(rest.to_owned())),
        }
    }

    /// The test program's exit status and totals have to agree with its cases, and there has to be one.
    fn suite_ended(&mut self, status: &str) {
        let Some(Suite { passed, failed, skipped, counts, totals }) = self.suite.take() else { return };
        let expected = format!("suite: {passed} passed, {failed} failed, {skipped} skipped");
        let why = match status {
            "137" => "it was killed: it did not end in time".to_owned(),
            _ if counts && totals.as_deref() != Some(&expected) => {
                format!("`{expected}` was seen, it says `{}`; status {status}", totals.unwrap_or_default())
            }
            _ if (status == "0") != (failed == 0) => format!("status {status} with {failed} failed cases"),
            _ if passed + failed + skipped == 0 => "it ran no case".to_owned(),
            _ => return,
        };
        self.results.add(&self.scenario, "the test program ends well", Outcome::Failed(why));
    }

    /// The machine was cut off, as it was meant to be: nothing is missing.
    pub fn cut(self) -> bool {
        true
    }

    /// The machine has ended, and `how` says how. Scenarios that did not reach their end have failed. Did all?
    pub fn ended(mut self, how: &str) -> bool {
        if self.waiting.is_empty() && self.done {
            return true;
        }
        let why = format!("it did not reach its end ({how})");
        for scenario in std::mem::take(&mut self.waiting) {
            self.results.add(&scenario, "end", Outcome::Failed(why.clone()));
        }
        if !self.done {
            self.results.add("boot", "end", Outcome::Failed(how.to_owned()));
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &str, scenarios: &[&str]) -> (Vec<String>, (usize, usize, usize)) {
        let mut results = Results::default();
        let mut boot = Boot::new(&mut results, scenarios.iter().map(|s| (*s).to_owned()));
        lines.lines().for_each(|line| boot.line(line));
        boot.ended("powered off");
        (results.cases.iter().map(Case::to_string).collect(), results.count())
    }

    #[test]
    fn cases_are_counted_for_their_scenario() {
        let (cases, count) = after(
            "::begin a\nok mount\n::suite\nok x y\nSKIPPED z: no z here: none\nsuite: 1 passed, 0 failed, 1 skipped\n\
             ::status 0\n::end a\n::done\n",
            &["a"],
        );
        assert_eq!(cases, ["ok a: mount", "ok a: x y", "SKIPPED a: z: no z here: none"]);
        assert_eq!(count, (2, 0, 1));
    }

    #[test]
    fn a_failed_case_fails_once() {
        let lines = "::begin a\n::suite\nFAILED x: 1 != 2\nsuite: 0 passed, 1 failed, 0 skipped\n::status 1\n::end a\n::done\n";
        assert_eq!(after(lines, &["a"]), (vec!["FAILED a: x: 1 != 2".to_owned()], (0, 1, 0)));
    }

    #[test]
    fn totals_status_and_cases_have_to_agree() {
        for said in [
            "ok x\nsuite: 2 passed, 0 failed, 0 skipped\n::status 0",
            "ok x\n::status 0",
            "ok x\nsuite: 1 passed, 0 failed, 0 skipped\n::status 1",
            "suite: 0 passed, 0 failed, 0 skipped\n::status 0",
            "ok x\n::status 137",
        ] {
            let (_, (_, failed, _)) = after(&format!("::begin a\n::suite\n{said}\n::end a\n::done"), &["a"]);
            assert_eq!(failed, 1, "{said}");
        }
    }

    #[test]
    fn a_power_loss_has_no_totals_but_a_status() {
        for (status, expected) in [("0", 0), ("1", 1)] {
            let lines = format!("::begin a\n::suite powerloss\nok x\n::status {status}\n::end a\n::done");
            assert_eq!(after(&lines, &["a"]).1, (1, expected, 0), "{status}");
        }
    }

    #[test]
    fn a_script_that_calls_what_there_is_not_has_failed() {
        let (cases, _) = after("::begin a\n/init: line 3: mont: not found\n::end a\n::done\n", &["a"]);
        assert_eq!(cases, ["FAILED a: script: /init: line 3: mont: not found"]);
    }

    #[test]
    fn what_is_not_reached_has_failed() {
        let (cases, _) = after("::begin a\nok x\n::end a\n::begin b\nok y\n", &["a", "b", "c"]);
        let missing: Vec<&String> = cases.iter().filter(|c| c.contains("did not reach")).collect();
        assert_eq!(missing.len(), 2, "{cases:?}");
        assert!(cases.iter().any(|c| c.starts_with("FAILED boot: end")), "{cases:?}");
    }
}
