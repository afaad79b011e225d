//! A touch of a page that is being cut: it waits, in the thread that made it, and goes on when the cut is over; if the page
//! is gone then it is the SIGBUS that it is without us.
//!
//! While a cut takes a mapping's pages away, pages of an empty file lie there, which raise SIGBUS. This runs in the signal
//! handler: it reads records that are never freed, and takes no lock.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};
use std::time::Duration;

use super::error::TableError;
use super::heads::Head;
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::frame::cuts::Phase;
use crate::sys::{ForkMutex, futex_wait, futex_wake, pid};

/// Mappings that a process can have at once.
const MAX: usize = 8192;

/// What the handler knows of one mapping.
struct Record {
    /// Odd while it changes.
    version: AtomicU32,
    /// The process: a forked child has the record, but neither the mapping nor an agent.
    pid: AtomicU32,
    /// 0: no mapping.
    start: AtomicUsize,
    len: AtomicUsize,
    /// The file's page at `start`.
    first: AtomicU32,
    /// Number of the table's head.
    head: AtomicUsize,
    /// The file.
    fd: AtomicI32,
    /// The event that this process's agent has dealt with.
    seen: AtomicU32,
}

static RECORDS: [Record; MAX] = [const {
    Record {
        version: AtomicU32::new(0),
        pid: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        first: AtomicU32::new(0),
        head: AtomicUsize::new(0),
        fd: AtomicI32::new(-1),
        seen: AtomicU32::new(0),
    }
}; MAX];
/// Records from this one on were never used.
static HIGH: AtomicUsize = AtomicUsize::new(0);
static CHANGING: ForkMutex<()> = ForkMutex::new((), || ());

/// A mapping that the handler knows while this lives.
#[derive(Debug)]
pub struct Watched {
    record: usize,
    pid: u32,
}

/// What a mapping is, for [`watch`].
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// Its first address.
    pub start: usize,
    /// Its length in bytes.
    pub len: usize,
    /// The file's page that lies there.
    pub first: Pfn,
    /// Number of the table's head.
    pub head: usize,
    /// The file, which stays open as long as it is watched.
    pub fd: i32,
    /// What has happened before it was mapped.
    pub event: u32,
}

/// Has touches of the mapping wait for cuts.
///
/// # Errors
/// The handler cannot be installed; too many mappings.
pub fn watch(mapping: Watch) -> Result<Watched, TableError> {
    crate::sys::on_sigbus(resolve)?;
    let _changing = CHANGING.lock();
    // In a forked child, also those of its parent.
    let free = |r: &Record| r.start.load(Ordering::Relaxed) == 0 || r.pid.load(Ordering::Relaxed) != pid();
    let i = RECORDS.iter().position(free).ok_or(TableError::TooMany)?;
    RECORDS[i].set(mapping);
    HIGH.fetch_max(i + 1, Ordering::Release);
    Ok(Watched { record: i, pid: pid() })
}

/// The agent of this process has done what this event asks for, for mappings of the table with this head.
pub fn caught_up(head: usize, event: u32) {
    for r in &RECORDS[..HIGH.load(Ordering::Acquire)] {
        if r.start.load(Ordering::Acquire) != 0 && r.head.load(Ordering::Relaxed) == head {
            // Never back: another thread may have done more meanwhile. Release: who sees it sees the mappings as they are.
            let later = |seen: u32| (event.wrapping_sub(seen) as i32 > 0).then_some(event);
            if r.seen.fetch_update(Ordering::Release, Ordering::Relaxed, later).is_ok() {
                futex_wake(&r.seen, i32::MAX);
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.pid != pid() {
            return; // a forked child, where the record may be another mapping's by now
        }
        let _changing = CHANGING.lock();
        RECORDS[self.record].set(Watch { start: 0, len: 0, first: 0, head: usize::MAX, fd: -1, event: 0 });
    }
}

impl Record {
    /// One thread at a time.
    fn set(&self, mapping: Watch) {
        // Odd first, even last, each a full fence for the words in between: a reader who sees one even version twice has
        // read the words of one mapping.
        // (A parent's thread may have left it odd.)
        self.version.fetch_or(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.pid.store(pid(), Ordering::Relaxed);
        self.start.store(mapping.start, Ordering::Relaxed);
        self.len.store(mapping.len, Ordering::Relaxed);
        self.first.store(mapping.first, Ordering::Relaxed);
        self.head.store(mapping.head, Ordering::Relaxed);
        self.fd.store(mapping.fd, Ordering::Relaxed);
        self.seen.store(mapping.event, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    fn get(&self) -> Option<Watch> {
        let before = self.version.load(Ordering::SeqCst);
        let mapping = Watch {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            first: self.first.load(Ordering::Relaxed),
            head: self.head.load(Ordering::Relaxed),
            fd: self.fd.load(Ordering::Relaxed),
            event: 0,
        };
        let ours = self.pid.load(Ordering::Relaxed) == pid();
        fence(Ordering::SeqCst);
        let same = before.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == before;
        (same && ours && mapping.start != 0).then_some(mapping)
    }
}

thread_local! {
    /// The last access that was let try again: its address, the event as of which it was, and how often it was.
    static TRIED: Cell<(usize, u32, u32)> = const { Cell::new((0, 0, 0)) };
}

/// In the signal handler. True: the access is to be made again.
fn resolve(addr: usize) -> bool {
    // Nobody wakes us who dies, so look again.
    const ROUND: Duration = Duration::from_millis(20);
    let known = RECORDS[..HIGH.load(Ordering::Acquire)].iter().find_map(|r| {
        let mapping = r.get().filter(|m| addr.wrapping_sub(m.start) < m.len)?;
        Some((r, mapping))
    });
    let Some((record, mapping)) = known else { return false };
    let Some(head) = Head::numbered(mapping.head) else { return false };
    let page = mapping.first + ((addr - mapping.start) / PAGE_SIZE) as Pfn;
    loop {
        let event = head.event().load(Ordering::SeqCst);
        let cut = head.cuts().overlapping(&(page..page + 1));
        if cut.is_some_and(|cut| cut.phase == Phase::Mappings) {
            futex_wait(head.event(), event, Some(ROUND));
            continue;
        }
        let seen = record.seen.load(Ordering::Acquire);
        if seen != event && record.get().is_some_and(|m| m.start == mapping.start) {
            futex_wait(&record.seen, seen, Some(ROUND));
            continue;
        }
        if !is_inside(mapping.fd, page) {
            return false; // cut off
        }
        return once_more(addr, event, head);
    }
}

/// The page is there, so the access is to be made again. Should it raise SIGBUS again, a cut may just have ended of which
/// nobody has heard yet. If nothing is heard for a while it is not for a cut (no space on the file system, a memory error).
fn once_more(addr: usize, event: u32, head: Head) -> bool {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(2);
    let (last, as_of, tries) = TRIED.get();
    let tries = if (last, as_of) == (addr, event) { tries + 1 } else { 0 };
    TRIED.set((addr, event, tries));
    if tries > 0 {
        futex_wait(head.event(), event, Some(PAUSE));
    }
    tries < TRIES
}

fn is_inside(fd: i32, page: Pfn) -> bool {
    let Some(fd) = crate::sys::dax::borrowed(fd) else { return false };
    let size = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| stat.st_size as u64);
    size(fd).is_ok_and(|size| u64::from(page) * (PAGE_SIZE as u64) < size)
}
