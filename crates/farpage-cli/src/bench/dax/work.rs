//! Doing it: each act on both sides, timed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
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

    /// Microseconds of one act, the mean of one round.
    pub fn time(&mut self, side: Side, case: &Case) -> Result<f64, WorkError> {
        let mut total = Duration::ZERO;
        self.prepare(case)?;
        for _ in 0..case.times {
            if let Some(range) = case.punched() {
                self.refill(&range)?;
            }
            total += self.once(side, &case.act)?;
        }
        Ok(total.as_secs_f64() * 1e6 / f64::from(case.times))
    }

    fn once(&mut self, side: Side, act: &Act) -> Result<Duration, WorkError> {
        let began;
        match (act, side) {
            (Act::Read | Act::Write, side) => {
                let Some((bare, ours)) = &self.data else { return Ok(Duration::ZERO) };
                let map = if side == Side::Bare { Mapped::Bare(bare) } else { Mapped::Farpage(ours) };
                began = Instant::now();
                match act {
                    Act::Read => map.copy_out(&mut self.buffer),
                    _ => map.copy_in(&self.buffer),
                }
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
                    Side::Bare => theirs.lock_and_unlock().map_err(bare("mlock (see ulimit -l)"))?,
                    Side::Farpage => drop(ours.pin(0..ours.len(), Pin::Short)?),
                }
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
                began = Instant::now();
                return std::thread::scope(|scope| {
                    let used = scope.spawn(move || {
                        std::thread::sleep(USE);
                        reader.read_exact(&mut [0; farpage::PAGE_SIZE])
                    });
                    let punched = self.punch(Side::Bare, range).map(|()| began.elapsed());
                    if let Ok(read) = used.join() {
                        read.map_err(bare("read from the pipe"))?;
                    }
                    punched
                });
            }
            (Act::PunchBeside(range), Side::Farpage) => {
                let pin = self.dax.pin(ELSEWHERE.start..ELSEWHERE.start + 1, Pin::Short)?;
                began = Instant::now();
                return std::thread::scope(|scope| {
                    scope.spawn(move || {
                        std::thread::sleep(USE);
                        drop(pin);
                    });
                    self.punch(Side::Farpage, range).map(|()| began.elapsed())
                });
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
