//! What `farpage demo` shows while the job runs: one line that is redrawn on a terminal, else a line
//! now and then.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// What is to be seen.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// What the job does.
    pub phase: &'static str,
    /// The share of it that is done.
    pub share: f64,
    /// Bytes of DRAM used and allowed.
    pub dram: u64,
    /// Bytes of DRAM allowed.
    pub budget: u64,
    /// Bytes that the job has filled so far.
    pub filled: u64,
    /// Pages that went out and came in so far, where farpage tells before the end.
    pub pages: Option<(u64, u64)>,
    /// Page faults of the program, of any kind.
    pub faults: u64,
    /// Since the start.
    pub elapsed: Duration,
}

impl View {
    fn line(&self) -> String {
        const WIDTH: usize = 24;
        let traffic = match self.pages {
            Some((out, back)) => format!("pages out {out}, in {back}"),
            None => format!("faults {}", self.faults),
        };
        let done = (self.share.clamp(0.0, 1.0) * WIDTH as f64) as usize;
        format!(
            "{:8}[{}{}] {:3.0}%  DRAM {} of {} MiB  away {} MiB  {traffic}  {:.1} s",
            self.phase,
            "#".repeat(done),
            "-".repeat(WIDTH - done),
            self.share * 100.0,
            self.dram / MIB,
            self.budget / MIB,
            self.filled.saturating_sub(self.dram) / MIB,
            self.elapsed.as_secs_f64(),
        )
    }
}

/// The terminal, or what takes its place.
pub struct Screen {
    tty: bool,
    last: Option<(Instant, &'static str)>,
}

impl Screen {
    /// Standard output.
    pub fn new() -> Screen {
        Screen { tty: io::stdout().is_terminal(), last: None }
    }

    /// Shows how things are; without a terminal once a phase and every two seconds.
    pub fn show(&mut self, view: &View) -> io::Result<()> {
        if self.tty {
            let mut out = io::stdout();
            write!(out, "\r\x1b[K{}", view.line())?;
            return out.flush();
        }
        let due = self
            .last
            .is_none_or(|(when, phase)| phase != view.phase || when.elapsed() > Duration::from_secs(2));
        if due {
            self.last = Some((Instant::now(), view.phase));
            writeln!(io::stdout(), "{}", view.line())?;
        }
        Ok(())
    }

    /// Leaves an empty line to write on.
    pub fn end(&self) -> io::Result<()> {
        if self.tty { write!(io::stdout(), "\r\x1b[K") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_all() {
        let mut view = View {
            phase: "sort",
            share: 0.5,
            dram: 120 * MIB,
            budget: 128 * MIB,
            filled: 512 * MIB,
            pages: Some((70, 7)),
            faults: 77,
            elapsed: Duration::from_millis(2340),
        };
        let bar = "############------------";
        assert_eq!(
            view.line(),
            format!("sort    [{bar}]  50%  DRAM 120 of 128 MiB  away 392 MiB  pages out 70, in 7  2.3 s")
        );
        view.pages = None;
        view.share = 7.0;
        view.filled = 0;
        assert!(
            view.line().contains("########################]")
                && view.line().contains("away 0 MiB  faults 77")
        );
    }
}
