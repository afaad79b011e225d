//! Runs cases, each in a process of its own and with a time limit, and looks afterwards at what they have left.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use farpage_tests::Verdict;
use rustix::process::{Pid, Signal};

use crate::cases::{self, Case};
use crate::place::Place;
use crate::{Outcome, ensure};

/// A case that cannot run here.
const SKIP: u8 = 77;
/// A case may take so long beyond the time for which it tries random moments.
const LIMIT: Duration = Duration::from_secs(240);

/// Runs all cases that are meant for what is expected, in turn, and says how each ended.
pub fn run(place: &Place, only: Option<&str>) -> ExitCode {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let chosen = cases::chosen(place.expect, only);
    for case in chosen {
        match one(place, case) {
            Ok(Verdict::Passed) => {
                passed += 1;
                say(&format!("ok {}", case.name));
            }
            Ok(Verdict::Skipped(why)) => {
                skipped += 1;
                say(&format!("SKIPPED {}: {why}", case.name));
            }
            Err(e) => {
                failed += 1;
                say(&format!("FAILED {}: {e}", case.name));
            }
        }
    }
    say(&format!("suite: {passed} passed, {failed} failed, {skipped} skipped"));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A line, at once: the power may go. Who does not listen any more is not told.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _told = out.write_all(format!("{}\n", line.trim().replace('\n', " | ")).as_bytes());
    let _told = out.flush();
}

/// A directory that goes when this does.
struct OwnDir(PathBuf);

impl OwnDir {
    fn new(parent: &Path, name: &str) -> Outcome<Self> {
        let dir = parent.join(format!("farpage-suite-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for OwnDir {
    fn drop(&mut self) {
        // What cannot be removed has been said to be wrong before.
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn one(place: &Place, case: &Case) -> Outcome<Verdict> {
    let dir = OwnDir::new(&place.dir, &format!("{}-files", case.name))?;
    let tables = OwnDir::new(&place.tables, &format!("{}-tables", case.name))?;
    let place = Place { dir: dir.0.clone(), tables: tables.0.clone(), ..place.clone() };
    let mut child = Command::new("/proc/self/exe")
        .arg("case")
        .args(place.args())
        .arg(case.name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its helpers are in its group, so that nobody stays behind.
        .process_group(0)
        .spawn()?;
    let out = collect(child.stdout.take());
    let err = collect(child.stderr.take());
    let ended = wait(&mut child, LIMIT + Duration::from_secs(place.seconds));
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Mostly there is nobody left.
        let _killed = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let ended = match ended? {
        Some(status) => Some(status),
        None => {
            child.wait()?;
            None
        }
    };
    // A case that was cut short has left its mounts.
    for mount in
        [Some(place.path("mount")), Some(place.path("small")), place.mount.clone()].into_iter().flatten()
    {
        let _gone = rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH);
    }
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    let said = format!("{out} {err}");
    let Some(status) = ended else { return Err(format!("not done in time. {said}").into()) };
    match status.code() {
        Some(0) => {
            nothing_left(&tables.0)?;
            if place.device.is_some() {
                let device = crate::device::open(&place)?;
                ensure!(device.audit().is_empty() && device.in_use() == 0, "the device is still used");
            }
            Ok(Verdict::Passed)
        }
        Some(n) if n == i32::from(SKIP) => Ok(Verdict::Skipped(out)),
        _ => Err(format!("{} {said}", how(status)).into()),
    }
}

fn how(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("killed by signal {signal}."),
        None => String::new(),
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            // What could be read is what there is to say.
            let _read = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).trim().to_owned()
    })
}

/// `None`: it did not end in time.
pub fn wait(child: &mut Child, limit: Duration) -> Outcome<Option<ExitStatus>> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > until {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Nobody uses a file any more, all counts are as they are recorded, and no table stays behind.
fn nothing_left(tables: &Path) -> Outcome {
    for info in farpage::dax::tables_in(tables)? {
        let info = info.map_err(|(path, e)| format!("{}: {e}", path.display()))?;
        ensure!(info.users.is_empty(), "{} is still used: {:?}", info.file.display(), info.users);
        ensure!(info.differences.is_empty(), "wrong counts: {:?}", info.differences);
    }
    let left: Vec<_> = std::fs::read_dir(tables)?.flatten().map(|e| e.path()).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// One case, in this process.
pub fn case(place: &Place, name: &str) -> ExitCode {
    let Some(case) = cases::all(place.expect).find(|case| case.name == name) else {
        say("no such case");
        return ExitCode::FAILURE;
    };
    match (case.body)(place) {
        Ok(Verdict::Passed) => ExitCode::SUCCESS,
        Ok(Verdict::Skipped(why)) => {
            say(&why);
            ExitCode::from(SKIP)
        }
        Err(e) => {
            say(&e.to_string());
            ExitCode::FAILURE
        }
    }
}
