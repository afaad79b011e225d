//! One run of the access program on one side of the comparison.

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;

use super::BenchError;
use super::data::Content;
use super::proc::PeakRss;
use crate::access::{Pattern, Phase};

/// Which memory manager pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// None: all memory is DRAM.
    Plain,
    /// The kernel's, on zram.
    Swap,
    /// Ours.
    Farpage,
}

/// What to run.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Spec {
    pub pattern: Pattern,
    pub ratio: Content,
    pub threads: u16,
    pub size: u64,
    /// DRAM that farpage may use, in bytes.
    pub dram: u64,
    pub hot: u64,
    pub ops: usize,
    pub warm: usize,
    pub verify: usize,
    pub sleep_ms: u64,
    /// Our side is an inline region of the library, not `farpage run`.
    pub inline: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What the access program measured.
    pub phase: Phase,
    /// The most anonymous DRAM that samples saw in the tree, in bytes.
    pub rss_peak: u64,
    /// farpage's own counters.
    pub stats: Option<Value>,
}

/// How to run it: what is the same for all runs.
pub struct Runner {
    program: PathBuf,
    /// Where the swap side runs, if there is one.
    pub cgroup: Option<PathBuf>,
    /// Where farpage keeps the pages.
    pub device: String,
    stop: Arc<AtomicBool>,
}

impl Runner {
    /// Runs this very program. From now on an interrupt ends the benchmark in good order.
    pub fn new(device: String) -> Result<Runner, BenchError> {
        let stop = Arc::new(AtomicBool::new(false));
        use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM};
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGPIPE] {
            signal_hook::flag::register(signal, Arc::clone(&stop))
                .map_err(BenchError::io("handle signals"))?;
        }
        let program = std::env::current_exe().map_err(BenchError::io("find farpage's own program"))?;
        Ok(Runner { program, cgroup: None, device, stop })
    }

    /// Runs the access program once and waits for it.
    pub fn run(&self, side: Side, spec: &Spec) -> Result<Outcome, BenchError> {
        let stats = (side == Side::Farpage).then(StatsFile::new);
        let mut command = self.command(side, spec, stats.as_ref());
        let failed = |status: ExitStatus| BenchError::Failed { side, pattern: spec.pattern, status };
        if self.stopped() {
            return Err(BenchError::Interrupted);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut running = Running(child.map_err(BenchError::io("start the access program"))?);
        let mut rss = PeakRss::new(running.0.id());
        let mut polls = 0u32;
        let status = loop {
            // The result is one short line, which fits the pipe: it can be read after the end.
            if let Some(status) =
                running.0.try_wait().map_err(BenchError::io("wait for the access program"))?
            {
                break status;
            }
            if self.stopped() {
                return Err(BenchError::Interrupted);
            }
            if polls.is_multiple_of(10) {
                rss.sample();
            }
            polls += 1;
            std::thread::sleep(Duration::from_millis(10));
        };
        if self.stopped() {
            return Err(BenchError::Interrupted);
        }
        if !status.success() {
            return Err(failed(status));
        }
        let mut text = String::new();
        if let Some(stdout) = running.0.stdout.as_mut() {
            stdout.read_to_string(&mut text).map_err(BenchError::io("read the result"))?;
        }
        let phase: Phase =
            serde_json::from_str(&text).map_err(|source| BenchError::Result { side, source })?;
        let rss_peak = rss.peak.max(phase.rss_anon);
        Ok(Outcome { phase, rss_peak, stats: stats.and_then(|s| s.read()) })
    }

    fn stopped(&self) -> bool {
        // Relaxed: only the flag itself matters.
        self.stop.load(Ordering::Relaxed)
    }

    fn command(&self, side: Side, spec: &Spec, stats: Option<&StatsFile>) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(stats) = stats.filter(|_| !spec.inline) {
            command.args(["run", "--dram", &spec.dram.to_string(), "--device", &self.device]);
            command.arg("--stats-json").arg(&stats.0).arg("--").arg(&self.program);
        }
        command.arg("access");
        let pattern = spec.pattern.to_possible_value();
        for (option, value) in [
            ("--pattern", pattern.map(|v| v.get_name().to_string()).unwrap_or_default()),
            ("--ratio", spec.ratio.to_string()),
            ("--threads", spec.threads.to_string()),
            ("--size", spec.size.to_string()),
            ("--hot", spec.hot.to_string()),
            ("--ops", spec.ops.to_string()),
            ("--warm", spec.warm.to_string()),
            ("--verify", spec.verify.to_string()),
            ("--sleep-ms", spec.sleep_ms.to_string()),
            ("--below", std::process::id().to_string()),
        ] {
            command.args([option, &value]);
        }
        if let (Some(stats), true) = (stats, spec.inline) {
            command.args(["--inline", "--dram", &spec.dram.to_string(), "--device", &self.device]);
            command.arg("--stats-json").arg(&stats.0);
        }
        if let (Side::Swap, Some(dir)) = (side, &self.cgroup) {
            command.arg("--cgroup").arg(dir);
        }
        command
    }
}

/// A flag that Ctrl-C and other requests to end set from now on, instead of ending the process.
pub fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM};
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGPIPE] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// A child that does not outlive us: `farpage run` passes SIGTERM on to its program.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) else { return };
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let start = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) {
            if start.elapsed() > Duration::from_secs(3) {
                let _ = writeln!(io::stderr(), "farpage: ending the access program by force");
                let _ = self.0.kill();
                let _ = self.0.wait();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A file for farpage's counters, removed when dropped.
pub struct StatsFile(pub PathBuf);

impl StatsFile {
    /// A name of our own in the temporary directory.
    pub fn new() -> StatsFile {
        StatsFile(std::env::temp_dir().join(format!("farpage-stats-{}.json", std::process::id())))
    }

    /// What was written there.
    pub fn read(&self) -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(&self.0).ok()?).ok()
    }
}

impl Drop for StatsFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The number called `name` at any depth of farpage's counters.
pub fn counter(stats: &Value, name: &str) -> Option<u64> {
    match stats {
        Value::Object(map) => {
            map.get(name).and_then(Value::as_u64).or_else(|| map.values().find_map(|v| counter(v, name)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_at_any_depth() {
        let stats = serde_json::json!({"a": 1, "in": {"faults_device": 7}, "text": "x"});
        assert_eq!(counter(&stats, "faults_device"), Some(7));
        assert_eq!(counter(&stats, "a"), Some(1));
        assert_eq!(counter(&stats, "text"), None);
        assert_eq!(counter(&stats, "missing"), None);
    }
}
