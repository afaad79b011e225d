//! Mappings of a DAX file. Each page of one has a reference, which goes when the page is cut and comes back when the page
//! does.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arrayvec::ArrayVec;

use super::error::DaxError;
use super::file::Access;
use super::inner::Inner;
use super::pin::DaxPin;
use super::refs::Refs;
use super::table::Table;
use super::touch::{self, Watch, Watched};
use super::users::bytes;
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::frame::cuts::{CUTS, Cut, Phase};
use crate::frame::ledger::HolderKind;
use crate::space::pin::Pin;
use crate::sys::{self, Mutex, after, dax};

/// Parts of a mapping that was cut often, before they are made one again.
const MANY_PARTS: usize = 16;

/// A part of a DAX file in memory; each page of it has one reference for this mapping. A forked child does not inherit it.
///
/// When somebody cuts pages (see [`super::Change`]) they are unmapped for as long as it takes; a thread that touches
/// one meanwhile waits, and goes on with what is there then. A touch of a page that has been cut off raises SIGBUS, as it
/// does without farpage; [`Self::read`] and [`Self::write`] give an error instead. What is handed to system calls or
/// to other hardware is to be pinned ([`Self::pin`]): a system call that meets a page that is being cut fails with EFAULT.
///
/// ```
/// use farpage::Pin;
/// use farpage::dax::{DaxError, DaxOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// # let file = options.create(dir.path().join("file"))?;
/// file.write_at(&[1; 4 << 12], 0)?;
/// let map = file.map(1 << 12..4 << 12)?;
/// assert_eq!((map.range(), map.len(), map.is_empty()), (4096..16384, 12288, false));
///
/// // A pin keeps the pages, and the addresses valid, for whoever works on them: here, this thread.
/// let pin = map.pin(0..4096, Pin::Short)?;
/// // SAFETY: pinned, inside the mapping; nobody else uses the file.
/// unsafe { std::ptr::write_bytes(map.as_ptr(), 2, 4096) };
/// map.flush(0..4096)?; // durable
/// drop(pin);
///
/// // Copies in and out need none, and never end in SIGBUS.
/// map.write(4000, &[3; 200])?;
/// let mut bytes = [0; 97];
/// map.read(3999, &mut bytes)?;
/// assert_eq!((bytes[0], bytes[1]), (2, 3));
/// file.truncate(2 << 12)?;
/// assert!(matches!(map.read(4000, &mut [0; 200]), Err(DaxError::Cut { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DaxMapping(Arc<Map>);

/// What mappings and their pins share. Unmaps with the last of them.
pub(super) struct Map {
    file: Arc<Inner>,
    addr: usize,
    pages: Range<Pfn>,
    state: Arc<Mutex<Mapped>>,
    /// Writes by system calls that are done, and how many of those are durable: the blocks that they have allocated.
    written: AtomicU64,
    durable: AtomicU64,
    _watched: Watched,
}

/// The references of a mapping.
pub(super) struct Mapped {
    file: Arc<Inner>,
    addr: usize,
    pages: Range<Pfn>,
    /// What is mapped, in no order.
    parts: Vec<Refs>,
    /// It lacks a part, and the table counts it among those that do.
    gap: bool,
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map").field("file", &self.file.path).field("range", &bytes(&self.pages)).finish()
    }
}

/// The parts of `range` that are in none of the others.
fn without(range: Range<Pfn>, others: impl Iterator<Item = Range<Pfn>>) -> Vec<Range<Pfn>> {
    let mut others: Vec<Range<Pfn>> = others.collect();
    others.sort_unstable_by_key(|r| r.start);
    let mut parts = Vec::new();
    let mut from = range.start;
    for other in others {
        if other.start.min(range.end) > from {
            parts.push(from..other.start.min(range.end));
        }
        from = from.max(other.end);
    }
    if from < range.end {
        parts.push(from..range.end);
    }
    parts
}

impl Mapped {
    fn addr_of(&self, page: Pfn) -> usize {
        self.addr + (page - self.pages.start) as usize * PAGE_SIZE
    }

    /// Maps pages that are held already.
    fn map(&self, pages: &Range<Pfn>) -> Result<(), rustix::io::Errno> {
        let len = pages.len() * PAGE_SIZE;
        let how = self.file.how_to_map();
        dax::map_file_at(self.file.fd.as_fd(), bytes(pages).start, self.addr_of(pages.start), len, how)
    }

    fn gaps(&self, cuts: &[Cut]) -> Vec<Range<Pfn>> {
        let mapped = self.parts.iter().map(|part| part.pages().clone());
        without(self.pages.clone(), mapped.chain(cuts.iter().map(|cut| cut.pages.clone())))
    }

    /// Gives up what is being cut, takes back what has been. True: somebody may be waiting for what it did.
    fn serve(&mut self, table: &Table, cuts: &[Cut]) -> bool {
        let mut gave = false;
        for cut in cuts.iter().filter(|cut| cut.phase == Phase::Mappings) {
            gave |= self.give_up(table, &cut.pages);
        }
        if self.gap {
            gave |= self.take_back(table, cuts);
        }
        gave
    }

    fn give_up(&mut self, table: &Table, cut: &Range<Pfn>) -> bool {
        let overlaps = |part: &Refs| part.pages().start < cut.end && cut.start < part.pages().end;
        let mut gave = false;
        while let Some(i) = self.parts.iter().position(overlaps) {
            let pages = self.parts[i].pages().clone();
            // References of their own for what stays. Where there are none to be had, the ledger is full: then that
            // goes as well, and comes back with the rest.
            let mut goes = pages.clone();
            let (before, behind) =
                (pages.start..cut.start.max(pages.start), cut.end.min(pages.end)..pages.end);
            let take = |part: &Range<Pfn>| match part.is_empty() {
                true => None,
                false => table.take(HolderKind::Mapping, part).ok(),
            };
            let stay = [take(&before), take(&behind)];
            goes.start = stay[0].as_ref().map_or(goes.start, |_| before.end);
            goes.end = stay[1].as_ref().map_or(goes.end, |_| behind.start);
            // First out of reach, then without a reference.
            if let Err(e) = dax::map_nothing_at(self.addr_of(goes.start), goes.len() * PAGE_SIZE) {
                sys::say(&format!("cannot unmap a part of {}: {e}", self.file.path.display()));
                stay.into_iter().flatten().for_each(|refs| table.give(refs));
                return gave;
            }
            table.give(self.parts.swap_remove(i));
            self.parts.extend(stay.into_iter().flatten());
            self.set_gap(table, true);
            gave = true;
        }
        gave
    }

    fn set_gap(&mut self, table: &Table, gap: bool) {
        if self.gap != gap {
            self.gap = gap;
            table.count_gaps(gap);
        }
    }

    fn take_back(&mut self, table: &Table, cuts: &[Cut]) -> bool {
        let end = self.file.pages().unwrap_or(self.pages.start);
        let mut undone = false;
        for mut part in self.gaps(cuts) {
            part.end = part.end.min(end);
            if part.is_empty() {
                continue;
            }
            let Ok(refs) = table.take(HolderKind::Mapping, &part) else { continue };
            let there =
                table.cuts().over(&part).is_none() && self.file.pages().is_ok_and(|end| end >= part.end);
            if !there || self.map(&part).is_err() {
                // A new cut, whose end is another event: its cutter has seen our references, and is told that they are gone.
                // Or no memory: until the next event then, which must not be one of ours, or we would come here at once.
                table.give(refs);
                undone |= !there;
                continue;
            }
            self.parts.push(refs);
        }
        if self.gaps(&[]).is_empty() {
            self.set_gap(table, false);
            if self.parts.len() > MANY_PARTS {
                self.join_parts(table);
            }
        }
        undone
    }

    /// Takes back what was cut a moment ago of pages that the caller has pinned, which the agent may not have come to yet. A
    /// cut of them that has begun since waits for that pin first, and then has us give them up.
    fn take_back_pinned(&mut self, table: &Table, pages: &Range<Pfn>) -> Result<(), DaxError> {
        for gap in without(pages.clone(), self.parts.iter().map(|part| part.pages().clone())) {
            let refs = table.take(HolderKind::Mapping, &gap).map_err(|why| self.file.hold_error(why))?;
            if let Err(e) = self.map(&gap) {
                table.give(refs);
                return Err(self.file.failed("map", e));
            }
            self.parts.push(refs);
        }
        if self.gap && self.gaps(&[]).is_empty() {
            self.set_gap(table, false);
        }
        Ok(())
    }

    /// One part instead of many.
    fn join_parts(&mut self, table: &Table) {
        if let Ok(whole) = table.take(HolderKind::Mapping, &self.pages) {
            self.parts.drain(..).for_each(|refs| table.give(refs));
            self.parts.push(whole);
        }
    }
}

impl Table {
    /// What the agent does at each event, and who cuts for his own process.
    pub(super) fn serve(&self, event: u32) {
        let mut gave = false;
        let mappings = self.mappings.lock();
        for mapping in mappings.iter() {
            let mut mapping = mapping.lock();
            // Under its lock. When a cut is over its pages can be pinned, and who pins takes this lock before he uses the address:
            // either he comes later, and maps again what we take away, or we see that the cut is over.
            let cuts: ArrayVec<Cut, CUTS> = self.cuts().iter().collect();
            gave |= mapping.serve(self, &cuts);
        }
        drop(mappings);
        touch::caught_up(self.head().number(), event);
        if gave {
            self.announce();
        }
    }
}

impl DaxMapping {
    pub(super) fn new(file: &Arc<Inner>, pages: Range<Pfn>) -> Result<Self, DaxError> {
        file.counted(|| Self::make(file, pages))
    }

    fn make(file: &Arc<Inner>, pages: Range<Pfn>) -> Result<Self, DaxError> {
        let table = &file.table;
        let len = pages.len() * PAGE_SIZE;
        // Where huge pages can be, the kernel chooses an address that lies to one as the file's offset does. Nobody knows
        // the address yet, so nobody reaches pages through it before they are held.
        let addr = dax::prepare_nothing()
            .and_then(|()| dax::map_file(file.fd.as_fd(), bytes(&pages).start, len, file.how_to_map()));
        let addr = addr.map_err(|e| file.failed("map", e))?;
        let unmap = |e| {
            let _gone = sys::unmap(addr, len);
            e
        };
        let watch = Watch {
            start: addr,
            len,
            first: pages.start,
            head: table.head().number(),
            fd: file.fd.as_raw_fd(),
            event: table.event(),
        };
        let watched = touch::watch(watch).map_err(|why| unmap(file.table_error(why)))?;
        let mut mapped =
            Mapped { file: file.clone(), addr, pages: pages.clone(), parts: Vec::new(), gap: false };
        let mut deadline = None;
        let state = loop {
            // Under the list's lock, so that the agent finds it with what it holds.
            let mut mappings = table.mappings.lock();
            let event = table.event();
            match file.try_take(HolderKind::Mapping, &pages).map_err(unmap)? {
                Ok(refs) => {
                    mapped.parts.push(refs);
                    let state = Arc::new(Mutex::new(mapped));
                    mappings.push(state.clone());
                    break state;
                }
                Err(_cut) => {
                    drop(mappings);
                    let deadline = deadline.get_or_insert_with(|| after(Instant::now(), file.options.wait));
                    file.wait_for_cut(event, *deadline, &pages).map_err(unmap)?;
                }
            }
        };
        // What was announced before the handler's record was there, and served before this mapping was in the list, nobody
        // will serve for it: a touch would wait for that.
        if table.event() != watch.event {
            table.announce();
        }
        let file = file.clone();
        Ok(Self(Arc::new(Map {
            file,
            addr,
            pages,
            state,
            written: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            _watched: watched,
        })))
    }

    /// The first byte. Others may map the same pages: the bytes can change at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.addr as *mut u8
    }

    /// Length in bytes, whole pages.
    pub fn len(&self) -> usize {
        self.0.pages.len() * PAGE_SIZE
    }

    /// Whether it maps nothing (it never does).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which bytes of the file.
    pub fn range(&self) -> Range<u64> {
        bytes(&self.0.pages)
    }

    /// The file's bytes of a part of the mapping.
    fn part(&self, offset: usize, len: usize) -> Result<Range<u64>, DaxError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        let start = self.range().start.saturating_add(offset as u64);
        let range = start..start.saturating_add(len as u64);
        if inside { Ok(range) } else { Err(self.0.file.bad_range(&range, "is not inside the mapping")) }
    }

    /// Copies bytes out, from `offset` bytes into the mapping. Never SIGBUS.
    ///
    /// # Errors
    /// [`DaxError::Cut`]: some of them are gone; [`DaxError::Range`]; what the file system says.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), DaxError> {
        let range = self.part(offset, out.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let _stays = self.0.file.pin_bytes(&range)?;
        let read = self.0.file.read_at(out, range.start)?;
        if read < out.len() {
            return Err(DaxError::Cut {
                path: self.0.file.path.clone(),
                range: range.start + read as u64..range.end,
            });
        }
        Ok(())
    }

    /// Copies bytes in, as [`Self::read`]. They are seen at once through this and every other mapping.
    ///
    /// # Errors
    /// As for [`Self::read`]; no space on the file system.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), DaxError> {
        let range = self.part(offset, data.len())?;
        if range.is_empty() {
            return Ok(());
        }
        self.0.file.check_writable("write to")?;
        // It must not grow the file: what has been cut off stays so.
        let _stays = self.0.file.pin_bytes(&range)?;
        let end = self.0.file.len()?;
        if range.end > end {
            return Err(DaxError::Cut {
                path: self.0.file.path.clone(),
                range: range.start.max(end)..range.end,
            });
        }
        let written = self.0.file.write_all_at(data, range.start);
        // Also of one that failed a part may be there. Release pairs with the Acquire in `flush`: who counts it, and syncs then,
        // syncs what it has allocated.
        self.0.written.fetch_add(1, Ordering::Release);
        written
    }

    /// Makes the bytes of this part of the mapping durable: when it returns they survive a loss of power. On a
    /// `MAP_SYNC` mapping by writing back the CPU's caches, without a system call; elsewhere by `msync`.
    ///
    /// # Errors
    /// A write that failed; [`DaxError::Cut`] if some of the pages are gone; [`DaxError::Range`].
    pub fn flush(&self, range: Range<usize>) -> Result<(), DaxError> {
        let part = self.part(range.start, range.len())?;
        if part.is_empty() {
            return Ok(());
        }
        let file = &self.0.file;
        let stays = file.pin_bytes(&part)?;
        // What was cut and is back may not be mapped yet: it is the file that is to be written back.
        self.0.state.lock().take_back_pinned(&file.table, stays.pages())?;
        let addr = self.0.addr + range.start;
        let direct = matches!(file.access, Access::Direct { map_sync: true });
        if direct && dax::write_back(addr, range.len()) {
            // Where blocks were allocated by a system call, that is not yet durable.
            return self.0.sync_written();
        }
        let start = addr / PAGE_SIZE * PAGE_SIZE;
        dax::sync_mapping(start, addr + range.len() - start).map_err(|e| file.failed("write back", e))
    }

    /// Pins a part of the mapping: while the pin lives its pages are not cut, and its addresses stay valid.
    ///
    /// # Errors
    /// As [`super::DaxFile::pin`]; [`DaxError::Cut`] if some of the pages are gone.
    pub fn pin(&self, range: Range<usize>, pin: Pin) -> Result<DaxPin, DaxError> {
        let part = self.part(range.start, range.len())?;
        let mut pinned = self.0.file.pin_part(&part, pin)?;
        self.0.state.lock().take_back_pinned(&self.0.file.table, pinned.pages())?;
        pinned.keep_mapped(self.0.clone(), self.0.addr + range.start);
        Ok(pinned)
    }
}

impl Map {
    /// Makes the blocks durable that writes by system calls have allocated, unless somebody has.
    fn sync_written(&self) -> Result<(), DaxError> {
        // Acquire pairs with the Release in `write`.
        let written = self.written.load(Ordering::Acquire);
        // Acquire pairs with the Release below: the sync of whoever has counted so far is done.
        if self.durable.load(Ordering::Acquire) < written {
            self.file.sync()?;
            // Only now, and only if it went well. Release: with the load above, in another thread.
            self.durable.fetch_max(written, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if !self.file.table.is_ours() {
            return; // a forked child, which has no such mapping
        }
        let table = &self.file.table;
        table.mappings.lock().retain(|m| !Arc::ptr_eq(m, &self.state));
        let mut mapped = self.state.lock();
        // Out of reach before the references go.
        let _gone = sys::unmap(self.addr, self.pages.len() * PAGE_SIZE);
        mapped.set_gap(table, false);
        mapped.parts.drain(..).for_each(|refs| table.give(refs));
        // Tells those, too, who wait for the pages.
        self.file.gone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_range() {
        let left = |others: &[Range<Pfn>]| -> Vec<(Pfn, Pfn)> {
            without(10..20, others.iter().cloned()).into_iter().map(|r| (r.start, r.end)).collect()
        };
        assert_eq!(left(&[]), [(10, 20)]);
        assert_eq!(left(&[0..10, 20..30]), [(10, 20)]);
        assert_eq!(left(&[15..40, 0..12]), [(12, 15)]);
        assert_eq!(left(&[12..13, 11..14, 18..19]), [(10, 11), (14, 18), (19, 20)]);
        assert_eq!(left(&[0..15, 15..u32::MAX]), []);
    }
}
