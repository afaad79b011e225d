//! Changes that take pages out of a file: break layout, in user space and for the affected range only.
//!
//! 1. A [cut](crate::frame::cuts) is entered: nobody takes a new reference to a page of the range, in no process.
//! 2. Pins are waited for. Mappings stay as they are meanwhile.
//! 3. Mappings are given up, by the agent of each process. (Who moves the end of the file, or frees its last page, has taken
//!    the lock of those who move it before: its holder may take his time, in which pages that are mapped can be used.)
//! 4. Every count of the range is 0. Then, and only then, the file is changed.
//! 5. The cut ends. Mappings of what is still there are made again.
//!
//! If a wait ends early the cut is taken back and nothing has happened. If the cutter is killed, whoever looks next
//! ends his cut, but not before the cutter's last thread has left the kernel (see [slots](super::slots)): the file is
//! changed by then, or it is not and never will be.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use super::error::DaxError;
use super::file::DaxFile;
use super::inner::Inner;
use super::users::User;
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::frame::cuts::Cut;
use crate::sys::{Locked, after};

/// A change that takes pages out of a file; offsets and lengths in bytes.
///
/// ```
/// use std::sync::atomic::AtomicBool;
/// use std::time::Duration;
///
/// use farpage::Pin;
/// use farpage::dax::{Change, DaxError, DaxOptions, Wait};
///
/// # let dir = tempfile::tempdir()?;
/// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// # let file = options.create(dir.path().join("file"))?;
/// file.write_at(&[1; 4 << 12], 0)?;
/// let pin = file.pin(3 << 12..4 << 12, Pin::Short)?;
///
/// // The pages before the pinned one go at once.
/// let wait = Wait { timeout: Duration::from_secs(5), stop: None };
/// file.change(Change::PunchHole(0..3 << 12), &wait)?;
/// // The pinned one does not, for as long as one likes to wait; another thread may end that.
/// let stop = AtomicBool::new(true);
/// let wait = Wait { stop: Some(&stop), ..wait };
/// let error = file.change(Change::Truncate(0), &wait).unwrap_err();
/// assert!(matches!(error, DaxError::Interrupted { .. }), "{error}");
/// drop(pin);
/// file.change(Change::Truncate(0), &wait)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// See [`DaxFile::truncate`].
    Truncate(u64),
    /// See [`DaxFile::punch_hole`].
    PunchHole(Range<u64>),
    /// See [`DaxFile::zero_range`].
    ZeroRange(Range<u64>),
    /// See [`DaxFile::collapse_range`].
    CollapseRange(Range<u64>),
}

/// How long those are waited for who are in the way.
///
/// See the example of [`Change`].
#[derive(Debug, Clone, Copy)]
pub struct Wait<'a> {
    /// At most so long.
    pub timeout: Duration,
    /// Set to true, by another thread or a signal handler, it ends the wait within 20 ms.
    pub stop: Option<&'a AtomicBool>,
}

impl Wait<'_> {
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

impl Change {
    /// The pages that must be nobody's, in a file of `len` bytes that can have `frames` pages. Bytes at the edges, of pages
    /// that stay, are only made zero. The last page does not stay if all that the file has of it goes: a file system
    /// may free its block (ext4 does).
    pub(super) fn pages(&self, frames: Pfn, len: u64) -> Range<Pfn> {
        let page = PAGE_SIZE as u64;
        let at_most = |n: u64| n.min(u64::from(frames)) as Pfn;
        match self {
            Self::Truncate(len) => at_most(len.div_ceil(page))..frames,
            Self::CollapseRange(range) => at_most(range.start / page)..frames,
            Self::PunchHole(range) | Self::ZeroRange(range) => {
                let start = at_most(range.start.div_ceil(page));
                let end = if range.end < len { range.end / page } else { range.end.div_ceil(page) };
                start..at_most(end).max(start)
            }
        }
    }

    /// Whether the file ends elsewhere afterwards.
    fn moves_end(&self) -> bool {
        matches!(self, Self::Truncate(_) | Self::CollapseRange(_))
    }

    /// Whether its pages depend on where the file ends.
    fn depends_on_end(&self) -> bool {
        match self {
            Self::PunchHole(range) | Self::ZeroRange(range) => !range.end.is_multiple_of(PAGE_SIZE as u64),
            Self::Truncate(_) | Self::CollapseRange(_) => false,
        }
    }

    /// As [`Self::pages`], for the file as it is now.
    fn pages_now(&self, file: &Inner) -> Result<Range<Pfn>, DaxError> {
        let len = if self.depends_on_end() { file.len()? } else { 0 };
        Ok(self.pages(file.table.frames(), len))
    }

    /// The caller has the file's size lock if it [moves the end](Self::moves_end) or [depends on it](Self::depends_on_end).
    fn apply(&self, file: &Inner) -> Result<(), DaxError> {
        let allocate = |flags, range: &Range<u64>, what| {
            rustix::fs::fallocate(&file.fd, flags, range.start, range.end - range.start)
                .map_err(|e| file.failed(what, e))
        };
        match self {
            Self::Truncate(len) => {
                rustix::fs::ftruncate(&file.fd, *len).map_err(|e| file.failed("truncate", e))
            }
            Self::PunchHole(range) => {
                allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range, "punch a hole in")
            }
            Self::ZeroRange(range) => {
                allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, range, "zero a part of")
            }
            Self::CollapseRange(range) => {
                allocate(FallocateFlags::COLLAPSE_RANGE, range, "take a part out of")
            }
        }
    }
}

impl Change {
    /// Changes the file once nobody uses the pages that go. False: it ends elsewhere by then, so that more of them go.
    fn try_once(&self, file: &Inner, patience: &mut Patience<'_>) -> Result<bool, DaxError> {
        let pages = self.pages_now(file)?;
        let mut under = enter(file, &pages, patience)?;
        if let Some(under) = &under {
            under.wait_for_pins(patience)?;
        }
        let locks = self.moves_end() || self.depends_on_end();
        let _size = locks.then(|| file.lock_size(patience, || file.bytes_of(&pages))).transpose()?;
        // Who makes the file shorter waits until we are through, or has been before us.
        if self.pages_now(file)?.end > pages.end {
            return Ok(false);
        }
        if let Some(under) = &mut under {
            under.wait_for_mappings(patience)?;
        }
        self.apply(file)?;
        Ok(true)
    }
}

/// A cut of this process; ends when it is dropped.
pub(super) struct Under<'f> {
    file: &'f Inner,
    cut: Cut,
    /// Mappings may have been given up for it.
    unmapped: bool,
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        let table = &self.file.table;
        table.cuts().end(&self.cut);
        if self.unmapped {
            table.announce();
        } else {
            table.announce_to_waiters();
        }
    }
}

impl DaxFile {
    /// Changes the file, once nobody uses the pages that go; see [`Change`]. Users of other pages are not disturbed.
    ///
    /// # Errors
    /// [`DaxError::Held`], with those who hold pages of it, if they are not given up in time; [`DaxError::Interrupted`]; what
    /// the file system says. The file is as it was then.
    pub fn change(&self, change: Change, wait: &Wait<'_>) -> Result<(), DaxError> {
        let file = &**self.inner();
        file.check_open()?;
        file.check_writable("change")?;
        if let Change::PunchHole(r) | Change::ZeroRange(r) | Change::CollapseRange(r) = &change
            && r.start >= r.end
        {
            return Err(file.bad_range(r, "is empty"));
        }
        let mut patience = Patience::new(wait);
        while !change.try_once(file, &mut patience)? {}
        if matches!(change, Change::Truncate(_)) {
            file.table.announce_growth();
        }
        Ok(())
    }
}

/// How long somebody has waited, from when he first had to: most never have to, and do not look at the clock.
pub(super) struct Patience<'w> {
    wait: &'w Wait<'w>,
    began: Option<Instant>,
}

impl<'w> Patience<'w> {
    /// Of one who has not waited yet.
    pub fn new(wait: &'w Wait<'w>) -> Self {
        Self { wait, began: None }
    }

    fn deadline(&mut self) -> Instant {
        after(*self.began.get_or_insert_with(Instant::now), self.wait.timeout)
    }

    fn is_over(&mut self) -> bool {
        self.wait.is_stopped() || Instant::now() >= self.deadline()
    }

    /// What to say when it is over.
    fn gave_up(&self, file: &Inner, range: Range<u64>, users: impl FnOnce() -> Vec<User>) -> DaxError {
        let path = file.path.clone();
        if self.wait.is_stopped() {
            return DaxError::Interrupted { path, range };
        }
        let waited = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        DaxError::Held { path, range, users: users(), waited }
    }
}

impl Inner {
    /// For whoever is about to move the file's end; `range` is what that is about.
    pub(super) fn lock_size(
        &self,
        patience: &mut Patience<'_>,
        range: impl FnOnce() -> Range<u64>,
    ) -> Result<Locked<'_>, DaxError> {
        self.table.lock_size(&mut || patience.is_over()).ok_or_else(|| {
            let [_, holder] = self.table.lock_holders();
            patience.gave_up(self, range(), || self.table.user(holder))
        })
    }
}

/// Enters a cut, after those that overlap with it; none for no pages.
pub(super) fn enter<'f>(
    file: &'f Inner,
    pages: &Range<Pfn>,
    patience: &mut Patience<'_>,
) -> Result<Option<Under<'f>>, DaxError> {
    if pages.is_empty() {
        return Ok(None);
    }
    let table = &file.table;
    loop {
        let event = table.event();
        let Some(locked) = table.lock(&mut || patience.is_over()) else {
            let [holder, _] = table.lock_holders();
            return Err(patience.gave_up(file, file.bytes_of(pages), || table.user(holder)));
        };
        if table.cuts().overlapping(pages).is_none()
            && let Some(cut) = table.cuts().begin(table.owner(), pages)
        {
            return Ok(Some(Under { file, cut, unmapped: false }));
        }
        drop(locked);
        if patience.wait.is_stopped() {
            return Err(DaxError::Interrupted { path: file.path.clone(), range: file.bytes_of(pages) });
        }
        file.wait_for_cut(event, patience.deadline(), pages)?;
    }
}

impl Under<'_> {
    /// Waits until mappings at most are in the way.
    fn wait_for_pins(&self, patience: &mut Patience<'_>) -> Result<(), DaxError> {
        let (table, pages) = (&self.file.table, &self.cut.pages);
        let mut told = false;
        self.wait_until(patience, || {
            if !table.is_used(pages) || !table.is_pinned(pages) {
                return true;
            }
            if !std::mem::replace(&mut told, true) {
                // Agents are to look at what was pinned for long.
                table.announce();
            }
            false
        })
    }

    /// Has mappings given up, and waits until every count is 0.
    fn wait_for_mappings(&mut self, patience: &mut Patience<'_>) -> Result<(), DaxError> {
        let table = &self.file.table;
        let event = table.event();
        if !table.is_used(&self.cut.pages) {
            return Ok(());
        }
        table.cuts().advance(&mut self.cut);
        self.unmapped = true;
        table.announce();
        // Our own at once.
        table.serve(event);
        self.wait_until(patience, || !table.is_used(&self.cut.pages))
    }

    fn wait_until(
        &self,
        patience: &mut Patience<'_>,
        mut over: impl FnMut() -> bool,
    ) -> Result<(), DaxError> {
        let table = &self.file.table;
        loop {
            let event = table.event();
            if over() {
                return Ok(());
            }
            if patience.wait.is_stopped() || !table.wait(event, patience.deadline()) {
                let pages = &self.cut.pages;
                return Err(
                    patience.gave_up(self.file, self.file.bytes_of(pages), || table.holders_of(pages))
                );
            }
        }
    }
}
