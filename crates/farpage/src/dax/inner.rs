//! What all clones of a handle share: the file, its table, and how references to its pages are taken and given back.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use rustix::io::Errno;

use super::Wait;
use super::error::{DaxError, TableError};
use super::file::Access;
use super::lease::PinLease;
use super::options::DaxOptions;
use super::pin::DaxPin;
use super::refs::Refs;
use super::table::Table;
use super::users::bytes;
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::frame::cuts::{CUTS, Cut, Phase};
use crate::frame::ledger::HolderKind;
use crate::pagemap::HoldError;
use crate::space::pin::Pin;
use crate::sys::after;
use crate::sys::dax::How;

/// A handle of a file; see [`super::DaxFile`].
pub(super) struct Inner {
    pub path: PathBuf,
    pub fd: OwnedFd,
    pub table: Arc<Table>,
    pub access: Access,
    pub options: DaxOptions,
    pub lease: PinLease,
    /// Mappings and pins that were made through this handle.
    holds: AtomicUsize,
    closed: AtomicBool,
    /// The cut of which the owner of long-term pins was told last, for each place of one.
    revoked: [AtomicU64; CUTS],
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DaxFile")
            .field("path", &self.path)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl Inner {
    pub fn new(
        path: PathBuf,
        fd: OwnedFd,
        table: Arc<Table>,
        access: Access,
        options: DaxOptions,
    ) -> Arc<Self> {
        let inner = Arc::new(Self {
            path,
            fd,
            table,
            access,
            options,
            lease: PinLease::default(),
            holds: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            revoked: [const { AtomicU64::new(0) }; CUTS],
        });
        let mut files = inner.table.files.lock();
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(&inner));
        drop(files);
        inner
    }

    pub fn failed(&self, what: &'static str, errno: Errno) -> DaxError {
        DaxError::Sys { path: self.path.clone(), what, errno }
    }

    pub fn table_error(&self, why: TableError) -> DaxError {
        DaxError::Table { path: self.path.clone(), why }
    }

    pub fn bad_range(&self, range: &Range<u64>, what: &'static str) -> DaxError {
        DaxError::Range { start: range.start, end: range.end, what }
    }

    pub fn len(&self) -> Result<u64, DaxError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|e| self.failed("look at", e))?;
        Ok(stat.st_size as u64)
    }

    /// Its length in pages, the last one perhaps not full.
    pub fn pages(&self) -> Result<Pfn, DaxError> {
        let pages = self.len()?.div_ceil(PAGE_SIZE as u64);
        Ok(Pfn::try_from(pages).unwrap_or(Pfn::MAX))
    }

    /// The pages that these bytes touch, all of which the file has.
    pub fn pages_of(&self, range: &Range<u64>) -> Result<Range<Pfn>, DaxError> {
        if range.start >= range.end {
            return Err(self.bad_range(range, "is empty"));
        }
        let page = PAGE_SIZE as u64;
        let (start, end) = (range.start / page, range.end.div_ceil(page));
        if end > u64::from(self.pages()?) {
            return Err(self.bad_range(range, "goes beyond the end of the file"));
        }
        let frames = self.table.frames();
        if end > u64::from(frames) {
            return Err(DaxError::TooLarge { path: self.path.clone(), max: u64::from(frames) * page });
        }
        Ok(start as Pfn..end as Pfn)
    }

    /// The bytes of these pages that the file has, for people.
    pub fn bytes_of(&self, pages: &Range<Pfn>) -> Range<u64> {
        let range = bytes(pages);
        let end = self.len().unwrap_or(u64::MAX);
        range.start..range.end.min(end.max(range.start))
    }

    pub fn check_open(&self) -> Result<(), DaxError> {
        // SeqCst, with `close`.
        if self.table.is_ours() && !self.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(DaxError::Closed { path: self.path.clone() })
    }

    /// Makes something that [`Self::close`] waits for. Counted first, and then the handle is looked at
    /// ([`Self::try_take`]): either that sees that it is closed, or who closes sees the count. If it is made, whoever drops
    /// it calls [`Self::gone`].
    pub fn counted<T>(&self, make: impl FnOnce() -> Result<T, DaxError>) -> Result<T, DaxError> {
        // SeqCst, with `close`.
        self.holds.fetch_add(1, Ordering::SeqCst);
        make().inspect_err(|_| self.gone())
    }

    /// One less of those.
    pub fn gone(&self) {
        // SeqCst, with `close`: who finds none left finds that its pages are nobody's.
        self.holds.fetch_sub(1, Ordering::SeqCst);
        self.table.announce_to_waiters();
    }

    /// See [`super::DaxFile::close`].
    pub fn close(&self, wait: &Wait<'_>) -> Result<(), DaxError> {
        if !self.table.is_ours() {
            return Ok(()); // a forked child: nothing was made through it
        }
        // SeqCst, before the count: see `counted`.
        self.closed.store(true, Ordering::SeqCst);
        let deadline = after(Instant::now(), wait.timeout);
        loop {
            let event = self.table.event();
            // SeqCst: with `counted` and `gone`.
            if self.holds.load(Ordering::SeqCst) == 0 {
                return Ok(());
            }
            let interrupted = wait.is_stopped();
            if interrupted || !self.table.wait(event, deadline) {
                // SeqCst, as above.
                self.closed.store(false, Ordering::SeqCst);
                let (path, range) = (self.path.clone(), 0..u64::MAX);
                if interrupted {
                    return Err(DaxError::Interrupted { path, range });
                }
                let mut users = self.table.holders_of(&(0..Pfn::MAX));
                users.retain(|user| user.pid == std::process::id());
                return Err(DaxError::Held { path, range, users, waited: wait.timeout });
            }
        }
    }

    /// For what writes to or changes the file.
    pub fn check_writable(&self, what: &'static str) -> Result<(), DaxError> {
        if self.options.read_only {
            return Err(DaxError::ReadOnly { path: self.path.clone(), what });
        }
        Ok(())
    }

    pub fn how_to_map(&self) -> How {
        let sync = matches!(self.access, Access::Direct { map_sync: true });
        How { write: !self.options.read_only, sync }
    }

    /// References to pages, or the cut that is in their way.
    pub fn try_take(&self, kind: HolderKind, pages: &Range<Pfn>) -> Result<Result<Refs, Cut>, DaxError> {
        self.check_open()?;
        let refs = self.table.take(kind, pages).map_err(|why| self.hold_error(why))?;
        // Between the caller's look at the length and our references the file may have been cut.
        let result = match self.table.cuts().over(pages) {
            Some(cut) => Ok(Err(cut)),
            None => match self.pages() {
                Ok(end) if end >= pages.end => return Ok(Ok(refs)),
                Ok(_) => Err(self.bad_range(&bytes(pages), "goes beyond the end of the file")),
                Err(e) => Err(e),
            },
        };
        // A cutter may have seen ours.
        self.give_back(refs);
        result
    }

    pub fn hold_error(&self, why: HoldError) -> DaxError {
        DaxError::Hold { path: self.path.clone(), why }
    }

    /// Waits for a cut that is in the way to end, once `event` is past.
    pub fn wait_for_cut(&self, event: u32, deadline: Instant, pages: &Range<Pfn>) -> Result<(), DaxError> {
        if self.table.wait(event, deadline) {
            return Ok(());
        }
        let cutter = self.table.cuts().overlapping(pages).map(|cut| cut.owner);
        let users = self.table.user(cutter);
        Err(DaxError::Held {
            path: self.path.clone(),
            range: self.bytes_of(pages),
            users,
            waited: self.options.wait,
        })
    }

    /// Gives references back, and says so to those who wait.
    pub fn give_back(&self, refs: Refs) {
        self.table.give(refs);
        self.table.announce_to_waiters();
    }

    /// A pin for the length of a call.
    pub fn pin_bytes(self: &Arc<Self>, range: &Range<u64>) -> Result<DaxPin, DaxError> {
        self.pin_part(range, Pin::Short)
    }

    /// A pin of what a mapping has, or had.
    pub fn pin_part(self: &Arc<Self>, range: &Range<u64>, pin: Pin) -> Result<DaxPin, DaxError> {
        self.check_open()?;
        let pages = self.pages_of(range);
        // Beyond the end of the file, now or when the pages are pinned: what was there has been cut off.
        pages.and_then(|pages| DaxPin::new(self, pages, pin)).map_err(|e| match e {
            DaxError::Range { .. } => DaxError::Cut { path: self.path.clone(), range: range.clone() },
            e => e,
        })
    }

    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<usize, DaxError> {
        let mut read = 0;
        while read < buf.len() {
            match rustix::io::pread(&self.fd, &mut buf[read..], at + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed("read", e)),
            }
        }
        Ok(read)
    }

    pub fn write_some_at(&self, buf: &[u8], at: u64) -> Result<usize, DaxError> {
        let mut written = 0;
        while written < buf.len() {
            match rustix::io::pwrite(&self.fd, &buf[written..], at + written as u64) {
                Ok(n) if n > 0 => written += n,
                Err(Errno::INTR) => {}
                // What has been written is there: say so, as `pwrite` does.
                Ok(_) | Err(_) if written > 0 => break,
                Ok(_) => return Err(self.failed("write", Errno::IO)),
                Err(e) => return Err(self.failed("write", e)),
            }
        }
        Ok(written)
    }

    pub fn write_all_at(&self, buf: &[u8], at: u64) -> Result<(), DaxError> {
        let mut written = 0;
        while written < buf.len() {
            written += self.write_some_at(&buf[written..], at + written as u64)?;
        }
        Ok(())
    }

    /// Makes what was written by system calls durable.
    pub fn sync(&self) -> Result<(), DaxError> {
        rustix::fs::fdatasync(&self.fd).map_err(|e| self.failed("write back", e))
    }

    /// For the agent: has the owner of long-term pins told that they are in the way of a cut, once for each cut.
    pub fn revoke(&self) {
        let Some(revoke) = &self.options.revoke else { return };
        for cut in self.table.cuts().iter().filter(|cut| cut.phase == Phase::Pins) {
            let me = self.table.owner();
            let mine = self.table.pagemap().ledger.of(me).map(|(_, e)| e);
            let mine = mine.filter(|e| e.kind == HolderKind::LongPin).map(|e| self.table.pages_held(&e));
            let parts = mine.map(|held| held.start.max(cut.pages.start)..held.end.min(cut.pages.end));
            let parts: Vec<Range<Pfn>> = parts.filter(|part| !part.is_empty()).collect();
            // Relaxed: the agent's alone.
            if !parts.is_empty() && self.revoked[cut.place].swap(cut.id(), Ordering::Relaxed) != cut.id() {
                parts.iter().for_each(|part| revoke(bytes(part)));
            }
        }
    }
}
