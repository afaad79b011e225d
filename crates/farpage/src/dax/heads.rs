//! The first pages of tables, at addresses that stay readable for ever: a signal handler may be looking at one while its
//! table goes.

use std::ops::Deref;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;

use rustix::fd::BorrowedFd;

use super::error::TableError;
use super::table::HEAD;
use crate::sys::{ForkMutex, SharedArea, SharedMap, pid};

/// Tables that a process can have at once.
const MAX: usize = 1024;

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
