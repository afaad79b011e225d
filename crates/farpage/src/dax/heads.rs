//! The first pages of tables, at addresses that stay readable for ever: a signal handler may be looking at one while its
//! table goes. What is in them.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fd::BorrowedFd;

use super::error::TableError;
use crate::PAGE_SIZE;
use crate::frame::cuts::{CUTS, Cuts};
use crate::sys::{ForkMutex, SharedArea, SharedMap, pid};

/// Tables that a process can have at once.
const MAX: usize = 1024;

/// The first page: what a signal handler reads as well.
pub(super) const HEAD: usize = PAGE_SIZE;
pub(super) const MAGIC: u32 = 0xfa5d_0002;
/// Words of the head.
pub(super) mod word {
    pub const MAGIC: usize = 0;
    pub const PAGES: usize = 1;
    /// More than pages if huge pages have frames, too.
    pub const FRAMES: usize = 9;
    pub const LOCK: usize = 2;
    pub const EVENT: usize = 3;
    pub const SIZE_LOCK: usize = 4;
    pub const PATH_LEN: usize = 5;
    pub const WAITERS: usize = 6;
    pub const GAPS: usize = 7;
    pub const SLOTS_USED: usize = 8;
}
/// The file's name, for people.
const PATH: std::ops::Range<usize> = 64..1024;
const STATES: usize = 1024;
const BOUNDS: usize = STATES + CUTS * 8;

static PLACES: [OnceLock<SharedMap>; MAX] = [const { OnceLock::new() }; MAX];
/// A forked child has no table of its own at first, and uses none of its parent's.
static TAKEN: ForkMutex<[bool; MAX]> = ForkMutex::new([false; MAX], || [false; MAX]);

/// One of them, to look at.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    number: usize,
    place: SharedMap,
}

/// One of them, of one table; afterwards zeros are there, until it is another's.
#[derive(Debug)]
pub struct OwnHead {
    head: Head,
    pid: u32,
}

impl Head {
    /// The place of this number, for the signal handler, who has found it in a mapping's record.
    pub fn numbered(number: usize) -> Option<Self> {
        PLACES.get(number)?.get().map(|place| Self { number, place: *place })
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The page.
    pub fn area(&self) -> SharedArea {
        self.place.area(0, HEAD)
    }

    /// Its words.
    pub fn words(&self) -> &'static [AtomicU32] {
        self.area().atomics32()
    }
}

impl OwnHead {
    /// The first page of `file`.
    ///
    /// # Errors
    /// No place, or it cannot be mapped.
    pub fn map(file: BorrowedFd<'_>) -> Result<Self, TableError> {
        let mut taken = TAKEN.lock();
        let number = taken.iter().position(|taken| !taken).ok_or(TableError::TooMany)?;
        let place = match PLACES[number].get() {
            Some(place) => {
                place.replace(Some(file))?;
                *place
            }
            None => {
                let place = SharedMap::new(file, 0, HEAD)?;
                *PLACES[number].get_or_init(|| place)
            }
        };
        taken[number] = true;
        Ok(Self { head: Head { number, place }, pid: pid() })
    }
}

impl Deref for OwnHead {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

impl Drop for OwnHead {
    fn drop(&mut self) {
        // In a forked child the place may be another's by now.
        let ours = self.pid == pid();
        // If that fails it stays taken: nobody is harmed by an old table's page.
        if ours && self.head.place.replace(None).is_ok() {
            TAKEN.lock()[self.head.number] = false;
        }
    }
}

/// The parts of a head.
impl Head {
    pub fn word(&self, i: usize) -> u32 {
        self.words()[i].load(Ordering::Acquire)
    }

    pub fn begin(&self, file: &Path, pages: u32, frames: u32) {
        use std::os::unix::ffi::OsStrExt;
        let name = file.as_os_str().as_bytes();
        let name = &name[..name.len().min(PATH.len())];
        self.area().write(PATH.start, name);
        self.words()[word::PATH_LEN].store(name.len() as u32, Ordering::Relaxed);
        self.words()[word::PAGES].store(pages, Ordering::Relaxed);
        self.words()[word::FRAMES].store(frames, Ordering::Relaxed);
    }

    /// All is in place.
    pub fn publish(&self) {
        self.words()[word::MAGIC].store(MAGIC, Ordering::Release);
    }

    /// The file's name, as whoever made the table knew it.
    pub fn file_name(&self) -> PathBuf {
        file_name(self.area())
    }

    /// The cuts under way.
    pub fn cuts(&self) -> Cuts {
        let words = self.area().atomics64();
        Cuts::new(&words[STATES / 8..], &words[BOUNDS / 8..])
    }

    /// See [`super::table::Table::announce`].
    pub fn event(&self) -> &'static AtomicU32 {
        &self.words()[word::EVENT]
    }
}

/// The file's name in a head.
pub fn file_name(head: SharedArea) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let len = head.atomics32()[word::PATH_LEN].load(Ordering::Relaxed) as usize;
    let mut name = vec![0; len.min(PATH.len())];
    head.read(PATH.start, &mut name);
    std::ffi::OsString::from_vec(name).into()
}
