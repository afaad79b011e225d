//! Other processes, which do what they are told, line by line: this program again.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxFile, DaxMapping, DaxPin, Wait};
use rustix::process::{Pid, Signal};

use crate::place::{LONG, Place};
use crate::{Outcome, device, ensure, pages, storm};

/// Another process.
pub struct Peer {
    child: Child,
    to: ChildStdin,
    from: Receiver<String>,
}

impl Peer {
    /// One that has opened nothing yet.
    pub fn new(place: &Place) -> Outcome<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("peer")
            .args(place.args())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().ok_or("no pipe")?;
        let out = child.stdout.take().ok_or("no pipe")?;
        let (send, from) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let peer = Self { child, to, from };
        // It is up.
        ensure!(peer.reply()? == "up", "the helper says nonsense");
        Ok(peer)
    }

    /// One that has opened the case's file.
    pub fn with_file(place: &Place) -> Outcome<Self> {
        let mut peer = Self::new(place)?;
        peer.ask("open file")?;
        Ok(peer)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it something; the answer comes later.
    pub fn tell(&mut self, line: &str) -> Outcome {
        writeln!(self.to, "{line}").map_err(|e| format!("the helper does not listen to '{line}': {e}"))?;
        Ok(())
    }

    /// Its next answer; an error if it says one, or nothing.
    pub fn reply(&self) -> Outcome<String> {
        self.reply_within(LONG + LONG)?.ok_or_else(|| "the helper does not answer".into())
    }

    /// `None`: no answer for so long.
    pub fn reply_within(&self, time: Duration) -> Outcome<Option<String>> {
        match self.from.recv_timeout(time) {
            Ok(line) => match line.strip_prefix("ok ") {
                Some(answer) => Ok(Some(answer.to_owned())),
                None => Err(line.into()),
            },
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err("the helper has ended".into()),
        }
    }

    /// Tells it something and waits for the answer.
    pub fn ask(&mut self, line: &str) -> Outcome<String> {
        self.tell(line)?;
        self.reply().map_err(|e| format!("'{line}': {e}").into())
    }

    pub fn signal(&self, signal: Signal) -> Outcome {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).ok_or("no process")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Stops it, and waits until all of its threads have.
    pub fn stop(&self) -> Outcome {
        self.signal(Signal::STOP)?;
        let until = Instant::now() + LONG;
        while self.states()?.iter().any(|state| *state != b'T') {
            ensure!(Instant::now() < until, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn states(&self) -> Outcome<Vec<u8>> {
        let state = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().and_then(|rest| rest.trim_start().bytes().next()).unwrap_or(b'?')
        };
        Ok(std::fs::read_dir(format!("/proc/{}/task", self.pid()))?.flatten().map(state).collect())
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end: which signal ended it, if one did.
    pub fn ended_by(mut self) -> Outcome<Option<i32>> {
        let status = crate::run::wait(&mut self.child, LONG)?.ok_or("the helper does not end")?;
        Ok(status.signal())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Gone already, perhaps.
        let _killed = self.child.kill();
        let _status = self.child.wait();
    }
}

enum Thing {
    Map(DaxMapping),
    Pin(#[allow(dead_code, reason = "it is held")] DaxPin),
}

/// Pins that are given up when somebody asks for them, and for which bytes he has.
#[derive(Default)]
struct Leased {
    pins: Vec<DaxPin>,
    asked: Vec<Range<u64>>,
}

struct Server<'p> {
    place: &'p Place,
    file: Option<DaxFile>,
    things: BTreeMap<u64, Thing>,
    next: u64,
    leased: Arc<Mutex<Leased>>,
    devices: device::Things,
}

/// The helper's side.
pub fn serve(place: &Place) -> ExitCode {
    // It does not outlive the case, whatever becomes of that.
    let _set = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let mut server = Server {
        place,
        file: None,
        things: BTreeMap::new(),
        next: 0,
        leased: Arc::default(),
        devices: device::Things::default(),
    };
    answer("ok up");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match server.act(&words) {
            Ok(text) => answer(&format!("ok {text}")),
            Err(e) => answer(&format!("err {e}")),
        }
    }
    ExitCode::SUCCESS
}

fn answer(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody listens any more: the end of the input says so, too.
    let _told = writeln!(out, "{}", line.replace('\n', " "));
    let _told = out.flush();
}

impl Server<'_> {
    fn file(&self) -> Outcome<&DaxFile> {
        Ok(self.file.as_ref().ok_or("no file is open")?)
    }

    fn keep(&mut self, thing: Thing) -> String {
        self.next += 1;
        self.things.insert(self.next, thing);
        self.next.to_string()
    }

    fn map(&self, id: u64) -> Outcome<&DaxMapping> {
        match self.things.get(&id) {
            Some(Thing::Map(map)) => Ok(map),
            _ => Err(format!("{id} is no mapping").into()),
        }
    }

    /// Ranges are in pages, addresses within mappings in bytes.
    fn act(&mut self, words: &[&str]) -> Outcome<String> {
        let n = |i: usize| -> Outcome<u64> { Ok(words.get(i).ok_or("a number is missing")?.parse()?) };
        let range = |i: usize| -> Outcome<Range<u64>> { Ok(pages::bytes(n(i)?..n(i + 1)?)) };
        match words.first().copied().unwrap_or("") {
            "open" => {
                self.file = Some(self.place.options().open(self.place.path(words[1]))?);
                Ok(String::new())
            }
            // With a layout lease: long-term pins, which go when they are asked for.
            "lease" => {
                let leased = self.leased.clone();
                let options = self.place.options().on_revoke(move |range| {
                    let mut leased = leased.lock().unwrap_or_else(PoisonError::into_inner);
                    leased.asked.push(range);
                    leased.pins.clear();
                });
                self.file = Some(options.open(self.place.path(words[1]))?);
                Ok(String::new())
            }
            "long-pin" => {
                let pin = self.file()?.pin(range(1)?, Pin::LongTerm)?;
                self.leased.lock().unwrap_or_else(PoisonError::into_inner).pins.push(pin);
                Ok(String::new())
            }
            "asked" => {
                let leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(format!("{:?}", leased.asked))
            }
            "map" => {
                let map = self.file()?.map(range(1)?)?;
                Ok(self.keep(Thing::Map(map)))
            }
            "pin" => {
                let pin = self.file()?.pin(range(1)?, Pin::Short)?;
                Ok(self.keep(Thing::Pin(pin)))
            }
            "drop" => {
                self.things.remove(&n(1)?).ok_or("no such thing")?;
                Ok(String::new())
            }
            "close" => {
                self.things.clear();
                self.file = None;
                Ok(String::new())
            }
            // A plain load: what a touch does to a process.
            "touch" => {
                let (map, at) = (self.map(n(1)?)?, n(2)? as usize);
                ensure!(at < map.len(), "outside");
                // SAFETY: inside the mapping.
                Ok(unsafe { map.as_ptr().add(at).read_volatile() }.to_string())
            }
            // All pages of a mapping, by plain loads: the first one, and their generation.
            "verify" => {
                let map = self.map(n(1)?)?;
                // SAFETY: the mapping lives.
                let memory = unsafe { pages::copy(map.as_ptr(), map.len()) };
                pages::verify(&memory, n(2)?, n(3)?)?;
                Ok(String::new())
            }
            "fill" => {
                pages::write(self.file()?, n(1)?..n(2)?, n(3)?)?;
                Ok(String::new())
            }
            // Files can be so many pages long and no longer; then it says what it is told.
            "append-half" => {
                // SAFETY: no handler: a write beyond the limit is an error instead of the end.
                unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
                let limit = Some(n(1)? * pages::PAGE);
                let limit = rustix::process::Rlimit { current: limit, maximum: None };
                rustix::process::setrlimit(rustix::process::Resource::Fsize, limit)?;
                match self.file()?.append(&vec![5; (2 * n(1)? * pages::PAGE) as usize]) {
                    Ok(at) => Err(format!("appended at {at}").into()),
                    Err(e) => Ok(e.to_string()),
                }
            }
            word @ ("truncate" | "punch" | "zero" | "collapse") => {
                let change = match word {
                    "truncate" => Change::Truncate(n(1)? * pages::PAGE),
                    "punch" => Change::PunchHole(range(1)?),
                    "zero" => Change::ZeroRange(range(1)?),
                    _ => Change::CollapseRange(range(1)?),
                };
                // The last number: milliseconds.
                let millis = if word == "truncate" { n(2) } else { n(3) };
                let timeout = millis.map_or(LONG, Duration::from_millis);
                self.file()?.change(change, &Wait { timeout, stop: None })?;
                Ok(String::new())
            }
            "users" => Ok(self.file()?.users().len().to_string()),
            // What a program does that knows nothing of farpage.
            "plain-open" => {
                std::fs::File::open(self.place.path(words[1]))?;
                Ok(String::new())
            }
            "plain-truncate" => {
                let file = std::fs::OpenOptions::new().write(true).open(self.place.path(words[1]))?;
                file.set_len(n(2)?)?;
                Ok(String::new())
            }
            // Becomes another program, which has nothing of what it had.
            "exec" => {
                let error = Command::new("/proc/self/exe").arg("peer").args(self.place.args()).exec();
                Err(error.into())
            }
            "storm" => {
                // From now on it goes on until it is killed.
                answer("ok ");
                storm::run(self.place, words[1], n(2)?)
            }
            "dev-storm" => {
                answer("ok ");
                device::storm(self.place, words[1], n(2)?)
            }
            word if word.starts_with("dev-") => self.devices.act(self.place, words),
            "race" => storm::race(self.place, words[1], n(2)?),
            word => Err(format!("{word}?").into()),
        }
    }
}
