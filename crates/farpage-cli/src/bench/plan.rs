//! What `farpage bench swap` runs: its options, and the cases that follow from them.

use std::str::FromStr;

use clap::ValueEnum;
use serde::Serialize;

use super::BenchError;
use super::data::Content;
use super::side::Spec;
use crate::access::Pattern;
use farpage::size::parse_size;

/// Options of `farpage bench swap`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// DRAM for the memory that is paged.
    #[arg(long, default_value = "128M", value_parser = parse_size)]
    pub dram: u64,
    /// Memory that the program works on.
    #[arg(long, default_value = "512M", value_parser = parse_size)]
    pub size: u64,
    /// How compressible the data are: a ratio from 1 to 200, or `text`.
    #[arg(long, default_value = "2")]
    pub ratio: Content,
    /// Numbers of threads to run with.
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    /// What to measure, each with a ratio of its own where one is given (PATTERN@RATIO).
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "fill,seq,seq@4,rand-read,rand-write,hot,first-touch,resident,malloc,idle"
    )]
    pub patterns: Vec<Choice>,
    /// The part that `hot` prefers.
    #[arg(long, default_value = "64M", value_parser = parse_size)]
    pub hot: u64,
    /// Rounds; the medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Where farpage keeps pages (default: `ram` of twice the memory).
    #[arg(long)]
    pub device: Option<String>,
    /// Measure inline regions of the library instead of `farpage run`.
    #[arg(long)]
    pub inline: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// One round of a quarter of the accesses.
    #[arg(long)]
    pub quick: bool,
}

/// A pattern, and the ratio it is to run with.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// What to do.
    pub pattern: Pattern,
    /// Instead of `--ratio`.
    pub ratio: Option<Content>,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(s: &str) -> Result<Choice, String> {
        let (name, ratio) = s.split_once('@').map_or((s, None), |(name, ratio)| (name, Some(ratio)));
        let pattern = Pattern::from_str(name, false).map_err(|_| {
            let all: Vec<_> = Pattern::value_variants().iter().map(|p| pattern_name(*p)).collect();
            format!("'{name}' is not one of {}", all.join(", "))
        })?;
        Ok(Choice { pattern, ratio: ratio.map(str::parse).transpose()? })
    }
}

/// The pattern as it is written on the command line.
pub fn pattern_name(pattern: Pattern) -> String {
    pattern.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
}

/// One comparison.
#[derive(Debug, Clone)]
pub struct Case {
    /// What to run on both sides.
    pub spec: Spec,
    /// The pattern with its ratio.
    pub name: String,
    /// Compares with plain DRAM, not with swap.
    pub within_budget: bool,
    /// The figure that must be reached.
    pub must: Option<Must>,
}

/// A requirement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Must {
    /// The other side's time over ours, at least.
    Faster(f64),
    /// Our time over the other side's, at most.
    AtMostTimes(f64),
    /// Share of the accesses that miss, at most, in percent.
    MissPercent(f64),
}

impl Args {
    /// Rounds to run.
    pub fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }

    /// Refuses sizes that do not fit together; else every comparison to make, in order.
    pub fn cases(&self) -> Result<Vec<Case>, BenchError> {
        if self.dram < 1 << 20 || self.size < 2 << 20 {
            return Err(BenchError::Usage("--dram must be 1M or more and --size 2M or more".into()));
        }
        if self.dram >= self.size {
            return Err(BenchError::Usage(
                "--dram must be smaller than --size, else nothing is paged".into(),
            ));
        }
        if self.size > 1 << 40 || self.hot > self.size {
            return Err(BenchError::Usage("--size can be 1T at most, and --hot no more than --size".into()));
        }
        let case = |choice: &Choice, threads: &u16| self.case(choice, *threads);
        Ok(self
            .patterns
            .iter()
            .flat_map(|choice| self.threads.iter().map(move |threads| (choice, threads)))
            // One idle program is as idle as two of them.
            .filter(|(choice, threads)| choice.pattern != Pattern::Idle || **threads == self.threads[0])
            // A region is no heap.
            .filter(|(choice, _)| choice.pattern != Pattern::Malloc || !self.inline)
            .map(|(choice, threads)| case(choice, threads))
            .collect())
    }

    fn case(&self, choice: &Choice, threads: u16) -> Case {
        use Pattern::*;
        let pages = (self.size / 4096) as usize;
        let dram_pages = (self.dram / 4096) as usize;
        let scale = if self.quick { 4 } else { 1 };
        let (warm, ops) = match choice.pattern {
            // What fits in DRAM is written first: the rest is what swap and farpage are for.
            Fill => (dram_pages, 0),
            Seq => (pages / 2 / scale, pages / scale),
            // Long enough for the DRAM to be exchanged once.
            Hot => (dram_pages * 20 / scale, 1_000_000 / scale),
            RandRead | RandWrite => (dram_pages / scale, 100_000 / scale),
            Resident => (100_000, 20_000_000 / scale),
            Malloc => (0, 4_000_000 / scale),
            FirstTouch => (0, 0),
            Idle => (20_000, 0),
        };
        let within_budget = matches!(choice.pattern, FirstTouch | Resident | Malloc);
        let size = if within_budget { self.size / 2 } else { self.size };
        let default_job = self.size >= 4 * self.dram;
        let must = match (choice.pattern, choice.ratio.unwrap_or(self.ratio)) {
            (Seq, Content::Ratio(4.0)) if self.inline => Some(Must::Faster(12.0)),
            (RandRead, _) if self.inline => Some(Must::Faster(2.4)),
            (RandWrite, _) if self.inline => Some(Must::Faster(1.6)),
            (Seq, Content::Ratio(4.0)) => Some(Must::Faster(10.0)),
            (Fill, _) => Some(Must::Faster(2.0)),
            (RandRead, _) => Some(Must::Faster(1.5)),
            (RandWrite, _) => Some(Must::Faster(1.25)),
            (Hot, _) => Some(Must::MissPercent(4.5)),
            (FirstTouch, _) => Some(Must::AtMostTimes(1.2)),
            (Resident | Malloc, _) => Some(Must::AtMostTimes(1.0)),
            _ => None,
        };
        let ratio = choice.ratio.unwrap_or(self.ratio);
        let plain = matches!(choice.pattern, FirstTouch | Malloc | Idle | Resident);
        Case {
            name: if plain {
                pattern_name(choice.pattern)
            } else {
                format!("{}@{ratio}", pattern_name(choice.pattern))
            },
            spec: Spec {
                pattern: choice.pattern,
                ratio,
                threads,
                size,
                dram: if within_budget { size * 2 } else { self.dram },
                hot: self.hot,
                ops,
                warm,
                verify: if choice.pattern == RandWrite { 1 } else { 16 },
                sleep_ms: if self.quick { 1000 } else { 3000 },
                inline: self.inline,
            },
            within_budget,
            must: must.filter(|_| within_budget || default_job),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        use clap::Parser;
        Line::try_parse_from(format!("x {line}").split_whitespace()).unwrap().args
    }

    #[test]
    fn the_default_covers_what_is_required() {
        let cases = args("").cases().unwrap();
        assert_eq!(cases.len(), 9 * 2 + 1);
        let must = |name: &str| cases.iter().find(|c| c.name == name).unwrap().must;
        assert_eq!(must("seq@4"), Some(Must::Faster(10.0)));
        assert_eq!(must("seq@2"), None);
        assert_eq!(must("hot@2"), Some(Must::MissPercent(4.5)));
        assert!(cases.iter().all(|c| c.spec.dram >= 2 * c.spec.size || !c.within_budget));
    }

    #[test]
    fn no_requirement_for_an_easier_job() {
        assert_eq!(args("--size 256M --patterns fill").cases().unwrap()[0].must, None);
    }

    #[test]
    fn bad_sizes_are_refused() {
        for line in ["--dram 4K", "--dram 512M", "--size 1M --dram 1M", "--hot 1G", "--size 2T"] {
            assert!(matches!(args(line).cases(), Err(BenchError::Usage(_))), "{line}");
        }
    }

    #[test]
    fn choices() {
        let seq = |ratio| Choice { pattern: Pattern::Seq, ratio };
        assert_eq!("seq".parse(), Ok(seq(None)));
        assert_eq!("seq@4".parse(), Ok(seq(Some(Content::Ratio(4.0)))));
        assert_eq!("seq@text".parse(), Ok(seq(Some(Content::Text))));
        for bad in ["", "seq@", "seq@0", "Seq", "nothing"] {
            assert!(bad.parse::<Choice>().is_err(), "{bad}");
        }
    }
}
