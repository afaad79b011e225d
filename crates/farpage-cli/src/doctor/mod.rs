//! `farpage doctor`: what this machine offers and lacks, one line each, with the remedy.

mod checks;
mod dax;

use std::io::Write;

use crate::error::CliError;

/// Arguments of `farpage doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Prints the checks as JSON.
    #[arg(long)]
    json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// `farpage run` works, but something is slower, or missing for another command.
    Warning,
    /// `farpage run` does not work.
    Failure,
}

/// One line.
#[derive(Debug, serde::Serialize)]
pub struct Check {
    /// What was looked at.
    name: &'static str,
    /// How it came out.
    outcome: Outcome,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok, found: found.into(), remedy: None }
    }

    /// Something could be better.
    pub fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// `farpage run` does not work. The message may hold the remedy behind a colon, as error messages do.
    pub fn failure(name: &'static str, message: &str) -> Self {
        let (found, remedy) = message.split_once(": ").unwrap_or((message, "see above"));
        Self { name, outcome: Outcome::Failure, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Prints the checks; 0 if `farpage run` works here, else 1.
pub fn run(args: Args) -> Result<u8, CliError> {
    let checks = checks::all();
    let works = checks.iter().all(|c| c.outcome != Outcome::Failure);
    let text = if args.json {
        let value = serde_json::json!({ "works": works, "checks": checks });
        format!("{value:#}\n")
    } else {
        readable(&checks, works)
    };
    // A closed pipe is no reason to fail: the exit status says what matters.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(u8::from(!works))
}

fn readable(checks: &[Check], works: bool) -> String {
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        let mark = match check.outcome {
            Outcome::Ok => "ok   ",
            Outcome::Warning => "note ",
            Outcome::Failure => "FAIL ",
        };
        let remedy = check.remedy.as_ref().map(|r| format!(" -> {r}")).unwrap_or_default();
        out += &format!("{mark} {:<width$}  {}{remedy}\n", check.name, check.found);
    }
    out += if works {
        "'farpage run' works here.\n"
    } else {
        "'farpage run' does not work here: see the lines marked FAIL.\n"
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_marked_with_their_remedy() {
        let checks = [Check::ok("a", "fine"), Check::failure("longer", "not there: do this")];
        let text = readable(&checks, false);
        assert!(text.contains("ok    a       fine\n"), "{text}");
        assert!(text.contains("FAIL  longer  not there -> do this\n"), "{text}");
        assert!(text.ends_with("see the lines marked FAIL.\n"));
    }

    #[test]
    fn every_check_that_is_not_ok_has_a_remedy() {
        for check in checks::all() {
            assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
            assert_eq!(check.remedy.is_none(), check.outcome == Outcome::Ok, "{check:?}");
        }
    }
}
