//! `file:DIR[:SIZE]`: pages in an unlinked file, the page of frame `n` at `n × 4096`.
//!
//! The launcher creates the file at its full, sparse length, so that no write ever extends it. Every process opens
//! it again by the launcher's `/proc/PID/fd/N`. Checksums (12 bytes a frame) lie in the shared area.
//!
//! Frames that follow each other in a batch go in one transfer; several transfers go to the kernel at once by
//! io_uring, where it is allowed, else one after the other.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{Attach, Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};
use crate::sys::{Ring, Slots, SteadyFile, Transfer};
use crate::{PAGE_SIZE, Page};

/// The smallest `file` device, in bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// The largest.
pub const MAX_SIZE: u64 = 8 << 40;

const BATCH: usize = Ring::MAX;
/// Rings of a process; more threads transfer without one.
const RINGS: usize = 4;
/// Bytes of the shared area before the checksums.
const HEAD: usize = 64;

/// Number of frames in `size` bytes.
pub fn frames(size: u64) -> u32 {
    (size.min(MAX_SIZE) / PAGE_SIZE as u64) as u32
}

/// Bytes of shared memory for a file of `size` bytes.
pub fn shared_len(size: u64) -> usize {
    HEAD + frames(size) as usize * 12
}

/// Creates the backing file in `dir`: mode 0600, without a name, sparse, of its full length.
pub fn create_backing(dir: &Path, size: u64) -> Result<OwnedFd, Errno> {
    let len = u64::from(frames(size)) * PAGE_SIZE as u64;
    let limit = getrlimit(Resource::Fsize).current;
    if limit.is_some_and(|limit| limit < len) {
        return Err(Errno::FBIG); // ftruncate would end us with SIGXFSZ
    }
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let file = match rustix::fs::open(dir, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
            named_then_unlinked(dir, flags, mode)?
        }
        other => other?,
    };
    rustix::fs::ftruncate(&file, len)?;
    Ok(file)
}

/// For file systems without O_TMPFILE.
fn named_then_unlinked(dir: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let pid = rustix::process::getpid().as_raw_nonzero();
    for n in 0.. {
        let path = dir.join(format!(".farpage-{pid}-{n}"));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode) {
            Err(Errno::EXIST) if n < 1000 => {}
            other => {
                let file = other?;
                fs::remove_file(&path).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
                return Ok(file);
            }
        }
    }
    Err(Errno::EXIST)
}

/// The device; see the module's description.
pub struct File {
    name: String,
    frames: u32,
    file: SteadyFile,
    /// Three words a frame; all 0 for a frame that has nothing stored.
    sums: &'static [AtomicU32],
    /// Frames stored: exact but for what dying processes leave off by one.
    stored: &'static AtomicU32,
    /// The most that there were.
    peak: &'static AtomicU32,
    rings: Slots<Option<Ring>, RINGS>,
    ring_allowed: AtomicBool,
}

impl File {
    /// The device over its shared area, whose backing file is at `attach.path`.
    pub fn attach(name: String, size: u64, attach: &Attach) -> Result<Self, Errno> {
        let path = attach.path.as_deref().ok_or(Errno::NOENT)?;
        let (head, sums) = attach.area.split(HEAD);
        Ok(Self {
            name,
            frames: frames(size),
            file: open_backing(path)?,
            sums: sums.part(0, frames(size) as usize * 12).atomics32(),
            stored: &head.atomics32()[0],
            peak: &head.atomics32()[1],
            rings: Slots::new([const { None }; RINGS]),
            ring_allowed: AtomicBool::new(true),
        })
    }

    fn sum_words(&self, pfn: Pfn) -> &[AtomicU32] {
        &self.sums[pfn as usize * 3..][..3]
    }

    /// The checksum words carry no order of their own: the frame is published, with a Release, after they are
    /// written, and is freed, with one, after they were last read.
    fn set_sum(&self, pfn: Pfn, sum: Sum) {
        let had = self.sum(pfn) != Sum::default();
        self.sum_words(pfn).iter().zip(sum.0).for_each(|(word, part)| word.store(part, Relaxed));
        match (had, sum != Sum::default()) {
            (false, true) => {
                let stored = self.stored.fetch_add(1, Relaxed) + 1;
                self.peak.fetch_max(stored, Relaxed);
            }
            (true, false) => drop(self.stored.fetch_sub(1, Relaxed)),
            _ => {}
        }
    }

    /// Runs transfers, by a ring if there are several and one can be had. False: none was run.
    fn try_ring(
        &self,
        file: BorrowedFd<'_>,
        transfers: &mut [Transfer<'_, '_>],
        results: &mut [i32],
    ) -> bool {
        if transfers.len() < 2 || !self.ring_allowed.load(Relaxed) {
            return false;
        }
        let usable = |ring: &Option<Ring>| ring.as_ref().is_none_or(|ring| !ring.is_anothers());
        let Some(mut slot) = self.rings.try_take_if(usable) else { return false };
        if slot.stale || slot.as_ref().is_none_or(|ring| !ring.is_ours()) {
            match Ring::new(file) {
                Ok(ring) => *slot = Some(ring),
                Err(_) => {
                    *slot = None;
                    self.ring_allowed.store(false, Relaxed);
                    return false;
                }
            }
        }
        let ran = slot.as_mut().is_some_and(|ring| ring.run(transfers, results).is_ok());
        if !ran {
            *slot = None;
        }
        ran
    }

    /// Runs transfers; each result is a number of bytes or a negated errno.
    fn transfer(&self, transfers: &mut [Transfer<'_, '_>], results: &mut [i32]) {
        let file = match self.file.get() {
            Ok(file) => file,
            Err(e) => return results.fill(-e.raw_os_error()),
        };
        if self.try_ring(file, transfers, results) {
            return;
        }
        for (transfer, result) in transfers.iter_mut().zip(results) {
            let done = rustix::io::retry_on_intr(|| match transfer {
                Transfer::Write(at, bufs) => rustix::io::pwritev(file, bufs, *at),
                Transfer::Read(at, bufs) => rustix::io::preadv(file, bufs, *at),
            });
            *result = done.map_or_else(|e| -e.raw_os_error(), |n| n as i32);
        }
    }

    fn store_batch(&self, ops: &mut [StoreOp<'_>]) {
        let mut bufs = [IoSlice::new(&[]); BATCH];
        ops.iter().zip(&mut bufs).for_each(|(op, buf)| *buf = IoSlice::new(&op.page.0));
        let mut rest = &bufs[..ops.len()];
        let runs = Runs::of(ops.iter().map(|op| op.pfn));
        let mut transfers = [const { Transfer::Write(0, &[]) }; BATCH];
        for (run, transfer) in runs.iter().zip(&mut transfers) {
            let (these, others) = rest.split_at(run.len);
            *transfer = Transfer::Write(offset(run.first), these);
            rest = others;
        }
        let mut results = [0; BATCH];
        let count = runs.iter().len();
        self.transfer(&mut transfers[..count], &mut results[..count]);
        let mut at = 0;
        for (run, done) in runs.iter().zip(results) {
            for (i, op) in ops[at..at + run.len].iter_mut().enumerate() {
                op.result = match run.page_result(i, done) {
                    Some(result) => result,
                    None => self.single(&mut Transfer::Write(offset(op.pfn), &[IoSlice::new(&op.page.0)])),
                };
            }
            at += run.len;
        }
    }

    fn load_batch(&self, ops: &mut [LoadOp<'_>]) {
        let runs = Runs::of(ops.iter().map(|op| op.pfn));
        let count = runs.iter().len();
        let mut results = [0; BATCH];
        {
            let mut bufs: [_; BATCH] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
            ops.iter_mut().zip(&mut bufs).for_each(|(op, buf)| *buf = IoSliceMut::new(&mut op.page.0));
            let mut rest = &mut bufs[..];
            let mut transfers: [_; BATCH] = std::array::from_fn(|_| Transfer::Read(0, &mut []));
            for (run, transfer) in runs.iter().zip(&mut transfers) {
                let (these, others) = rest.split_at_mut(run.len);
                *transfer = Transfer::Read(offset(run.first), these);
                rest = others;
            }
            self.transfer(&mut transfers[..count], &mut results[..count]);
        }
        let mut at = 0;
        for (run, done) in runs.iter().zip(results) {
            for (i, op) in ops[at..at + run.len].iter_mut().enumerate() {
                let result = match run.page_result(i, done) {
                    Some(result) => result,
                    None => self
                        .single(&mut Transfer::Read(offset(op.pfn), &mut [IoSliceMut::new(&mut op.page.0)])),
                };
                op.result = result.map(|()| self.sum(op.pfn));
            }
            at += run.len;
        }
    }

    /// One page by itself, after its run was cut short or failed: the pages of a run fail one by one.
    fn single(&self, transfer: &mut Transfer<'_, '_>) -> Result<(), DeviceError> {
        let mut results = [0];
        self.transfer(std::slice::from_mut(transfer), &mut results);
        match results[0] {
            n if n == PAGE_SIZE as i32 => Ok(()),
            n if n < 0 => Err(error(-n)),
            _ => Err(DeviceError::Io(libc::EIO)),
        }
    }

    /// Frames above the program's RLIMIT_FSIZE: writing there, even inside the file, would send it SIGXFSZ.
    fn writable_frames(&self) -> u64 {
        getrlimit(Resource::Fsize).current.map_or(u64::MAX, |limit| limit / PAGE_SIZE as u64)
    }
}

/// Opens the backing file, past the page cache if its file system lets us.
fn open_backing(path: &str) -> Result<SteadyFile, Errno> {
    let direct = SteadyFile::open(path, OFlags::RDWR | OFlags::DIRECT).and_then(|file| {
        // Some file systems accept the flag and refuse the transfers (a block larger than a page).
        let mut page = Page([0; PAGE_SIZE]);
        rustix::io::pread(file.get()?, &mut page.0, 0).map(|_| file)
    });
    match direct {
        Err(Errno::INVAL) => SteadyFile::open(path, OFlags::RDWR),
        other => other,
    }
}

fn offset(pfn: Pfn) -> u64 {
    u64::from(pfn) * PAGE_SIZE as u64
}

fn error(errno: i32) -> DeviceError {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => DeviceError::Full,
        other => DeviceError::Io(other),
    }
}

/// Frames of a batch that follow each other.
#[derive(Clone, Copy, Default)]
struct Run {
    first: Pfn,
    len: usize,
}

impl Run {
    /// The outcome for page `i` of a transfer that returned `done`, if it says one.
    fn page_result(&self, i: usize, done: i32) -> Option<Result<(), DeviceError>> {
        if done >= ((i + 1) * PAGE_SIZE) as i32 {
            Some(Ok(()))
        } else if done < 0 && self.len == 1 {
            Some(Err(error(-done)))
        } else {
            None
        }
    }
}

struct Runs {
    runs: [Run; BATCH],
    count: usize,
}

impl Runs {
    /// In the order of the batch, which is the caller's: only neighbours are joined.
    fn of(pfns: impl Iterator<Item = Pfn>) -> Self {
        let mut this = Self { runs: [Run::default(); BATCH], count: 0 };
        for pfn in pfns {
            match this.count.checked_sub(1).map(|last| &mut this.runs[last]) {
                Some(run) if u64::from(run.first) + run.len as u64 == u64::from(pfn) => run.len += 1,
                _ => {
                    this.runs[this.count] = Run { first: pfn, len: 1 };
                    this.count += 1;
                }
            }
        }
        this
    }

    fn iter(&self) -> std::slice::Iter<'_, Run> {
        self.runs[..self.count].iter()
    }
}

impl Device for File {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        let limit = self.writable_frames();
        for batch in ops.chunks_mut(BATCH) {
            // Mostly one piece: all can be written.
            for piece in batch.chunk_by_mut(|a, b| (u64::from(a.pfn) < limit) == (u64::from(b.pfn) < limit)) {
                if piece.iter().any(|op| op.pfn >= self.frames) {
                    piece.iter_mut().for_each(|op| op.result = Err(DeviceError::Io(libc::EINVAL)));
                } else if piece.iter().any(|op| u64::from(op.pfn) >= limit) {
                    piece.iter_mut().for_each(|op| op.result = Err(DeviceError::Full));
                } else {
                    self.store_batch(piece);
                }
            }
            for op in batch.iter().filter(|op| op.result.is_ok()) {
                self.set_sum(op.pfn, op.sum);
            }
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        for batch in ops.chunks_mut(BATCH) {
            if batch.iter().any(|op| op.pfn >= self.frames) {
                batch.iter_mut().for_each(|op| op.result = Err(DeviceError::Io(libc::EINVAL)));
            } else {
                self.load_batch(batch);
            }
        }
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        if pfn >= self.frames {
            return Sum::default();
        }
        let words = self.sum_words(pfn);
        Sum([words[0].load(Relaxed), words[1].load(Relaxed), words[2].load(Relaxed)])
    }

    fn free(&self, pfns: &[Pfn], _owner: Owner) {
        pfns.iter().filter(|&&pfn| pfn < self.frames).for_each(|&pfn| self.set_sum(pfn, Sum::default()));
    }

    fn remove(&self, _owner: Owner) -> Result<(), Errno> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.file.get()?, hole, 0, offset(self.frames))
    }

    fn usage(&self) -> Usage {
        let stored = u64::from(self.stored.load(Relaxed)) * PAGE_SIZE as u64;
        let peak = u64::from(self.peak.load(Relaxed)) * PAGE_SIZE as u64;
        Usage { capacity: offset(self.frames), used: stored, payload: stored, peak }
    }
}

#[cfg(test)]
mod tests;
