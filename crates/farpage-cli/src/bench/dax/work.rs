//! Doing it: each act on both sides, timed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Access, Change, DaxError, DaxFile, DaxMapping, Wait};
use farpage::sys::populate;
use rustix::fs::FallocateFlags;

use super::case::{Act, Case, OtherAct, range_of};
use super::memory::{Bare, Mapped};
use super::{DATA, ELSEWHERE, PART};
use crate::bench::side::Running;

/// For how long a page elsewhere is in use.
const USE: Duration = Duration::from_millis(100);

const MLOCK: &str = "mlock (see ulimit -l)";

/// Does it when the page elsewhere was in use for long enough, in a thread that runs already.
fn after_a_while<T: Send + 'static>(end: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let (up, is_up) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _who_waits = up.send(());
        std::thread::sleep(USE);
        end()
    });
    let _up = is_up.recv();
    thread
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// System calls.
    Bare,
    /// The library.
    Farpage,
}

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// On the bare side.
    #[error("{what}: {source}")]
    Bare {
        /// Which call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// On ours.
    #[error(transparent)]
    Dax(#[from] DaxError),
}

fn bare<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> WorkError {
    move |e| WorkError::Bare { what, source: e.into() }
}

/// A second process, which is this command; it ends when this is dropped.
pub struct Other {
    _process: Running,
}

impl Other {
    /// Starts it, and returns when it does what it is to do.
    pub fn start(act: OtherAct, path: &Path, page_cache: bool) -> io::Result<Self> {
        let what = if act == OtherAct::PinsElsewhere { "hold" } else { "map" };
        let Range { start, end } = range_of(act);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["dax", what]).arg(path);
        command.args(["--range", &format!("{start}:{}", end - start), "--for", "1h"]);
        command.args(page_cache.then_some("--page-cache"));
        let mut process = Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        if let Some(output) = &mut process.0.stdout {
            BufReader::new(output).read_line(&mut line)?;
        }
        if line.is_empty() {
            Err(io::Error::other("it ended at once"))
        } else {
            Ok(Self { _process: process })
        }
    }
}

/// What both sides work on.
pub struct Work {
    dax: DaxFile,
    plain: File,
    sync: bool,
    buffer: Vec<u8>,
    /// Of the data, both touched; made when they are needed.
    data: Option<(Bare, DaxMapping)>,
    /// Of the part that is pinned.
    part: Option<(Bare, DaxMapping)>,
}

impl Work {
    /// On one file.
    pub fn new(dax: DaxFile, plain: File) -> Self {
        let sync = dax.access() == Access::Direct { map_sync: true };
        Self { dax, plain, sync, buffer: vec![0xa5; 1 << 20], data: None, part: None }
    }

    /// Does it once, and takes the time.
    pub fn time(&mut self, side: Side, case: &Case) -> Result<Duration, WorkError> {
        self.prepare(case)?;
        if let Some(range) = case.punched() {
            self.refill(&range)?;
        }
        if case.other == Some(OtherAct::MapsIt) {
            self.wait_until_mapped()?;
        }
        if let Some(map) = self.data(side) {
            // The kernel takes write permission away when it writes pages back: a fault would be part of the time.
            populate(map.addr(), DATA as usize, true).map_err(bare("madvise"))?;
        }
        self.once(side, &case.act)
    }

    /// The second process has its mapping again, which it gave up for the last punch.
    fn wait_until_mapped(&self) -> Result<(), WorkError> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.dax.users().iter().flat_map(|user| &user.holds).any(|hold| hold.range == PART) {
            if Instant::now() > deadline {
                return Err(bare("the second process")(io::Error::from(io::ErrorKind::TimedOut)));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// The mapping of this side that is read and written.
    fn data(&self, side: Side) -> Option<Mapped<'_>> {
        let (bare, ours) = self.data.as_ref()?;
        Some(if side == Side::Bare { Mapped::Bare(bare) } else { Mapped::Farpage(ours) })
    }

    fn once(&mut self, side: Side, act: &Act) -> Result<Duration, WorkError> {
        let began;
        match (act, side) {
            (Act::Read | Act::Write, side) => {
                let mut buffer = std::mem::take(&mut self.buffer);
                began = Instant::now();
                match (act, self.data(side)) {
                    (Act::Read, Some(map)) => map.copy_out(&mut buffer),
                    (_, Some(map)) => map.copy_in(&buffer),
                    (_, None) => {}
                }
                let took = began.elapsed();
                self.buffer = buffer;
                return Ok(took);
            }
            (Act::Map { touch }, Side::Bare) => {
                began = Instant::now();
                let map = Bare::map(&self.plain, &PART, self.sync).map_err(bare("mmap"))?;
                if *touch {
                    populate(map.addr(), (PART.end - PART.start) as usize, false).map_err(bare("madvise"))?;
                }
            }
            (Act::Map { touch }, Side::Farpage) => {
                began = Instant::now();
                let map = self.dax.map(PART)?;
                if *touch {
                    populate(map.as_ptr() as usize, map.len(), false).map_err(bare("madvise"))?;
                }
            }
            (Act::Pin, side) => {
                let Some((theirs, ours)) = &self.part else { return Ok(Duration::ZERO) };
                began = Instant::now();
                match side {
                    Side::Bare => theirs.lock_and_unlock().map_err(bare(MLOCK))?,
                    Side::Farpage => drop(ours.pin(0..ours.len(), Pin::Short)?),
                }
            }
            (Act::MapPin, Side::Bare) => {
                began = Instant::now();
                let map = Bare::map(&self.plain, &PART, self.sync).map_err(bare("mmap"))?;
                map.lock_and_unlock().map_err(bare(MLOCK))?;
            }
            (Act::MapPin, Side::Farpage) => {
                began = Instant::now();
                let map = self.dax.map(PART)?;
                drop(map.pin(0..map.len(), Pin::Short)?);
            }
            (Act::Punch(range), side) => {
                began = Instant::now();
                self.punch(side, range)?;
            }
            (Act::PunchBeside(range), Side::Bare) => {
                let page = ELSEWHERE.start..ELSEWHERE.start + farpage::PAGE_SIZE as u64;
                let map = Bare::map(&self.plain, &page, self.sync).map_err(bare("mmap"))?;
                let (mut reader, writer) = io::pipe().map_err(bare("pipe"))?;
                map.splice_into(&writer).map_err(bare("vmsplice"))?;
                let user = after_a_while(move || reader.read_exact(&mut [0; farpage::PAGE_SIZE]));
                began = Instant::now();
                let punched = self.punch(Side::Bare, range).map(|()| began.elapsed());
                user.join().unwrap_or(Ok(())).map_err(bare("read from the pipe"))?;
                return punched;
            }
            (Act::PunchBeside(range), Side::Farpage) => {
                let pin = self.dax.pin(ELSEWHERE.start..ELSEWHERE.start + 1, Pin::Short)?;
                let user = after_a_while(move || drop(pin));
                began = Instant::now();
                let punched = self.punch(Side::Farpage, range).map(|()| began.elapsed());
                let _ended = user.join();
                return punched;
            }
        }
        Ok(began.elapsed())
    }

    fn punch(&self, side: Side, range: &Range<u64>) -> Result<(), WorkError> {
        match side {
            Side::Bare => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.plain, flags, range.start, range.end - range.start)
                    .map_err(bare("fallocate"))
            }
            Side::Farpage => {
                let wait = Wait { timeout: Duration::from_secs(10), stop: None };
                Ok(self.dax.change(Change::PunchHole(range.clone()), &wait)?)
            }
        }
    }

    /// What is punched has data before.
    fn refill(&self, range: &Range<u64>) -> Result<(), WorkError> {
        let bytes = &self.buffer[..self.buffer.len().min((range.end - range.start) as usize)];
        for at in range.clone().step_by(bytes.len()) {
            self.plain.write_all_at(bytes, at).map_err(bare("write"))?;
        }
        Ok(())
    }

    /// Mappings, which are no part of what is measured, with all pages there, and only as long as the case needs them.
    fn prepare(&mut self, case: &Case) -> Result<(), WorkError> {
        let (data, part) = (matches!(case.act, Act::Read | Act::Write), case.act == Act::Pin);
        for (wanted, range, maps) in [(data, 0..DATA, &mut self.data), (part, PART, &mut self.part)] {
            if !wanted {
                *maps = None;
            } else if maps.is_none() {
                let theirs = Bare::map(&self.plain, &range, self.sync).map_err(bare("mmap"))?;
                let ours = self.dax.map(range)?;
                for addr in [theirs.addr(), ours.as_ptr() as usize] {
                    populate(addr, ours.len(), true).map_err(bare("madvise"))?;
                }
                *maps = Some((theirs, ours));
            }
        }
        Ok(())
    }
}
