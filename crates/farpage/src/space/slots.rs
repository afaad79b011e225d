//! Staging slots: where granules wait on their way out, and where frames wait to be used again.
//!
//! A slot is an address range of a granule's size and alignment. Each of its 64 pages is a *hole*, a *staged* page
//! (some granule's, moved out with `UFFDIO_MOVE`, not yet on a device), or a *free frame* (its content is on a
//! device or was dropped; the DRAM behind it serves the next page that comes in).
//!
//! `staged` of a slot changes under the lock of the granule that it is attached to; `free` and the lists under
//! the mutex.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

use super::bits::{BitSet, mask, runs};
use super::range::{GRANULE, GRANULE_PAGES, STRETCH};
use crate::{PAGE_SIZE, Page};

/// Where a slot stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// All holes, in `empty`.
    Empty,
    /// Attached to a granule, in `fifo`.
    Staged,
    /// Attached to a granule, taken from `fifo` by someone who settles it.
    Settling,
    /// Not attached; has free frames, or is in use by someone who fills them.
    Stock,
}

struct Meta {
    state: State,
    free: u64,
    /// Free frames that someone has taken and not yet moved away or returned.
    taken: u32,
    /// In `some`.
    listed: bool,
}

struct Lists {
    meta: Vec<Meta>,
    empty: BitSet,
    fifo: VecDeque<u32>,
    /// Slots of which some frames are free; the last to come is the first to be used up.
    some: Vec<u32>,
    /// Slots of which all are.
    whole: BitSet,
    free_frames: u64,
}

/// What others may look at without the mutex.
struct Shared {
    /// The granule's first byte in its range; 0 = not attached.
    granule: AtomicUsize,
    staged: AtomicU64,
    /// Pages that were changed here since they were copied to be stored; under the granule's lock.
    rewritten: AtomicU64,
}

/// Up to `want` slots of the set that lie side by side; those of a whole page table if possible: the kernel moves the pages of each
/// by itself, and has other CPUs flush their TLBs for each.
fn side_by_side(slots: &BitSet, want: usize) -> Option<(usize, usize)> {
    const { assert!(STRETCH == 8) };
    let table = if want == STRETCH { slots.eight() } else { None };
    table.map(|first| (first, STRETCH)).or_else(|| slots.run(want))
}

/// The staging slots of a process.
pub struct Slots {
    /// Address and length of the mapping.
    mapping: (usize, usize),
    base: usize,
    shared: Vec<Shared>,
    lists: Mutex<Lists>,
    free_hint: AtomicU64,
    staged_hint: AtomicU64,
    /// Changes when frames become free or a slot is settled, if somebody waits for that.
    freed: AtomicU32,
    waiters: AtomicU32,
}

/// Free frames at consecutive addresses; more than a slot's worth are those of whole slots, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first one's slot.
    pub slot: u32,
    /// Its place in that slot.
    pub first: usize,
    /// How many.
    pub len: usize,
}

impl Run {
    /// Its frames from number `from` to before `to`, as pages of each slot.
    pub(crate) fn parts(self, from: usize, to: usize) -> impl Iterator<Item = (u32, u64)> {
        let mut at = self.first + from;
        let end = self.first + to;
        std::iter::from_fn(move || {
            let page = at % GRANULE_PAGES;
            let n = (GRANULE_PAGES - page).min(end.checked_sub(at).filter(|&n| n > 0)?);
            let slot = self.slot + (at / GRANULE_PAGES) as u32;
            at += n;
            Some((slot, mask(page, n)))
        })
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let (start, len) = self.mapping;
        // SAFETY: our own mapping, and with us the last who knows of it.
        let unmapped = unsafe { rustix::mm::munmap(start as *mut _, len) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Slots {
    /// Reserves address space for `n` slots.
    pub fn new(n: usize) -> rustix::io::Result<Self> {
        // SAFETY: the kernel chooses the address. Private, so that UFFDIO_MOVE accepts it.
        let raw = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                (n + STRETCH) * GRANULE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // SAFETY: our own mapping. Huge pages would be split at once; an error only means there are none.
        let _advice =
            unsafe { rustix::mm::madvise(raw, (n + STRETCH) * GRANULE, rustix::mm::Advice::LinuxNoHugepage) };
        let base = (raw as usize).next_multiple_of(STRETCH * GRANULE);
        let meta = (0..n).map(|_| Meta { state: State::Empty, free: 0, taken: 0, listed: false }).collect();
        let mut empty = BitSet::new(n);
        (0..n).for_each(|slot| empty.set(slot, true));
        Ok(Self {
            mapping: (raw as usize, (n + STRETCH) * GRANULE),
            base,
            shared: (0..n)
                .map(|_| Shared {
                    granule: AtomicUsize::new(0),
                    staged: AtomicU64::new(0),
                    rewritten: AtomicU64::new(0),
                })
                .collect(),
            lists: Mutex::new(Lists {
                meta,
                empty,
                fifo: VecDeque::with_capacity(n),
                some: Vec::with_capacity(n),
                whole: BitSet::new(n),
                free_frames: 0,
            }),
            free_hint: AtomicU64::new(0),
            staged_hint: AtomicU64::new(0),
            freed: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
        })
    }

    /// The whole area: for registering it.
    pub fn area(&self) -> (usize, usize) {
        (self.base, self.shared.len() * GRANULE)
    }

    /// Whether an address is in the area's mapping, which is a little larger than the area.
    pub fn holds(&self, addr: usize) -> bool {
        let (start, len) = self.mapping;
        addr.wrapping_sub(start) < len
    }

    /// Address of a page of the area's mapping that is never there.
    pub(crate) fn hole(&self) -> usize {
        self.base + self.shared.len() * GRANULE
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        // A panic of a manager thread aborts the process; there is no poisoned state to fear.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Address of a page.
    pub fn addr(&self, slot: u32, page: usize) -> usize {
        self.base + slot as usize * GRANULE + page * PAGE_SIZE
    }

    /// The bytes of a staged page; the caller holds its granule's lock, and does not use them after releasing it.
    pub(crate) fn staged_page(&self, slot: u32, page: usize) -> &Page {
        debug_assert!(page < GRANULE_PAGES && self.staged(slot) & mask(page, 1) != 0);
        // SAFETY: inside the area and page-aligned. Staged, so it is there, and it changes or goes only under the
        // granule's lock, which the caller holds.
        unsafe { &*(self.addr(slot, page) as *const Page) }
    }

    /// As [`Slots::staged_page`], to change it: what is being stored of it meanwhile is of no use.
    #[allow(clippy::mut_from_ref)] // the page is the lock holder's alone
    pub(crate) fn staged_page_mut(&self, slot: u32, page: usize) -> &mut Page {
        debug_assert!(page < GRANULE_PAGES && self.staged(slot) & mask(page, 1) != 0);
        self.shared[slot as usize].rewritten.fetch_or(mask(page, 1), Ordering::Relaxed);
        // SAFETY: as in `staged_page`; who holds the granule's lock is the only one to use it.
        unsafe { &mut *(self.addr(slot, page) as *mut Page) }
    }

    /// The bytes of frame number `i` of those that the caller has got from [`Slots::take`] and not yet moved or returned.
    #[allow(clippy::mut_from_ref)] // the frame is the caller's alone, like what an allocator returns
    pub(crate) fn taken_page(&self, run: Run, i: usize) -> &mut Page {
        debug_assert!(i < run.len);
        // SAFETY: inside the area and page-aligned. A taken frame is there and nobody else's.
        unsafe { &mut *(self.addr(run.slot, run.first + i) as *mut Page) }
    }

    /// Pages of a slot are copied to be stored: changes count from now on. Under the granule's lock, as the next.
    pub(crate) fn begin_copy(&self, slot: u32) {
        self.shared[slot as usize].rewritten.store(0, Ordering::Relaxed);
    }

    /// Pages that were changed since [`Slots::begin_copy`].
    pub(crate) fn rewritten(&self, slot: u32) -> u64 {
        self.shared[slot as usize].rewritten.load(Ordering::Relaxed)
    }

    /// Staged pages of a slot.
    pub fn staged(&self, slot: u32) -> u64 {
        self.shared[slot as usize].staged.load(Ordering::Relaxed)
    }

    /// Sets them; under the granule's lock.
    pub fn set_staged(&self, slot: u32, staged: u64) {
        let before = self.shared[slot as usize].staged.swap(staged, Ordering::Relaxed);
        let change = u64::from(staged.count_ones()).wrapping_sub(u64::from(before.count_ones()));
        self.staged_hint.fetch_add(change, Ordering::Relaxed);
    }

    /// The granule (its first byte in its range) that a slot is attached to, or 0.
    pub fn granule_of(&self, slot: u32) -> usize {
        self.shared[slot as usize].granule.load(Ordering::Relaxed)
    }

    /// Says that the granule is now found at another address (`mremap`); under the world's lock.
    pub fn set_granule(&self, slot: u32, addr: usize) {
        self.shared[slot as usize].granule.store(addr, Ordering::Relaxed);
    }

    /// Up to `want` empty slots, one after the other, for as many granules; [`Slots::attach`] or [`Slots::give_back`] ends
    /// it for each. The first, and how many.
    pub fn take_empty(&self, want: usize) -> Option<(u32, usize)> {
        let mut l = self.lists();
        let (first, n) = side_by_side(&l.empty, want)?;
        for slot in first..first + n {
            l.empty.set(slot, false);
            l.meta[slot].state = State::Settling;
        }
        Some((first as u32, n))
    }

    /// As [`Slots::take_empty`]; where that is possible, for a whole huge page, at a multiple of its size: then a huge page moves
    /// as one.
    pub fn take_empty_huge(&self, want: usize) -> Option<(u32, usize)> {
        if want == STRETCH {
            let mut l = self.lists();
            let first = (0..self.shared.len() / STRETCH)
                .map(|i| i * STRETCH)
                .find(|&first| (first..first + STRETCH).all(|slot| l.empty.has(slot)));
            if let Some(first) = first {
                for slot in first..first + STRETCH {
                    l.empty.set(slot, false);
                    l.meta[slot].state = State::Settling;
                }
                drop(l);
                // They are empty; but what was here in small pages has left their page table behind, and over one no huge page
                // can be moved. The kernel frees it (since 6.14, on x86-64) when the whole of its range is dropped.
                crate::sys::drop_pages(self.addr(first as u32, 0), STRETCH * GRANULE);
                return Some((first as u32, STRETCH));
            }
        }
        self.take_empty(want)
    }

    /// How many empty slots, up to `want`, lie one after the other.
    pub fn empty_run(&self, want: usize) -> usize {
        self.lists().empty.run(want).map_or(0, |(_, n)| n)
    }

    /// The slot was not needed.
    pub fn give_back(&self, slot: u32) {
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Empty;
        l.empty.set(slot as usize, true);
    }

    /// The slot now holds `staged` pages of the granule; it queues for settling. Under the granule's lock.
    pub fn attach(&self, slot: u32, granule: usize, staged: u64) {
        self.set_granule(slot, granule);
        self.set_staged(slot, staged);
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Staged;
        l.fifo.push_back(slot);
    }

    /// As [`Slots::attach`], for who settles it himself: it does not queue.
    pub fn attach_taken(&self, slot: u32, granule: usize, staged: u64) {
        self.set_granule(slot, granule);
        self.set_staged(slot, staged);
    }

    /// The slot that has been staged longest, to settle it; [`Slots::detach`] or [`Slots::unsettled`] ends it.
    pub fn oldest(&self) -> Option<u32> {
        let mut l = self.lists();
        let slot = l.fifo.pop_front()?;
        l.meta[slot as usize].state = State::Settling;
        Some(slot)
    }

    /// As [`Slots::oldest`], this one. False if it does not wait for settling.
    pub fn pick(&self, slot: u32) -> bool {
        let mut l = self.lists();
        let Some(at) = l.fifo.iter().position(|&s| s == slot) else { return false };
        l.fifo.remove(at);
        l.meta[slot as usize].state = State::Settling;
        true
    }

    /// Could not be settled (device full): `front`, or at the end of the queue.
    pub fn unsettled(&self, slot: u32, front: bool) {
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Staged;
        if front { l.fifo.push_front(slot) } else { l.fifo.push_back(slot) }
    }

    /// Nothing is staged in the slot any more and its granule has let go of it.
    pub fn detach(&self, slot: u32) {
        debug_assert_eq!(self.staged(slot), 0);
        self.set_granule(slot, 0);
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Stock;
        l.retire_if_empty(slot);
    }

    /// These pages of the slot are free frames from now on.
    pub fn add_free(&self, slot: u32, frames: u64) {
        if frames == 0 {
            return;
        }
        let mut l = self.lists();
        l.add_free(slot, frames);
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        drop(l);
        self.say_freed();
    }

    /// Takes up to `want` free frames at consecutive addresses. They are the caller's until he moves them away or
    /// returns them ([`Slots::used`]).
    pub fn take(&self, want: usize) -> Option<Run> {
        self.take_if(want, |_| true)
    }

    fn take_if(&self, want: usize, may: impl FnOnce(&Lists) -> bool) -> Option<Run> {
        let mut l = self.lists();
        let run = if may(&l) { l.find(want)? } else { return None };
        for (slot, frames) in run.parts(0, run.len) {
            l.take_free(slot, frames);
        }
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        Some(run)
    }

    /// As [`Slots::take`], all of them, or what there is if there is plenty of it in pieces.
    pub(crate) fn take_all(&self, want: usize) -> Option<Run> {
        let slots = want.div_ceil(GRANULE_PAGES);
        self.take_if(want, |l| {
            l.free_frames >= 4 * want as u64 || l.whole.run(slots).is_some_and(|(_, n)| n == slots)
        })
    }

    /// The first `n` frames of the run have moved away: their places are holes. The others were not needed.
    pub fn used(&self, run: Run, n: usize) {
        let mut l = self.lists();
        for (slot, frames) in run.parts(0, n) {
            l.meta[slot as usize].taken -= frames.count_ones();
            l.retire_if_empty(slot);
        }
        if n == run.len {
            return;
        }
        for (slot, frames) in run.parts(n, run.len) {
            l.meta[slot as usize].taken -= frames.count_ones();
            l.add_free(slot, frames);
        }
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        drop(l);
        self.say_freed();
    }

    /// Gives all free frames of slots that hold nothing else to the kernel, neighbouring slots in one call. How many.
    pub fn give_up(&self) -> u64 {
        let mut given = 0;
        let mut next = 0;
        while let Some((first, n, frames)) = self.take_slots(next) {
            crate::sys::drop_pages(self.addr(first, 0), n * GRANULE);
            let mut l = self.lists();
            for slot in first..first + n as u32 {
                l.meta[slot as usize].taken = 0;
                l.retire_if_empty(slot);
            }
            drop(l);
            given += frames;
            next = first as usize + n;
        }
        given
    }

    /// The first slots from `from` on that lie side by side and hold nothing but free frames, which are the caller's then:
    /// the first one, how many, and how many frames.
    fn take_slots(&self, from: usize) -> Option<(u32, usize, u64)> {
        let mut l = self.lists();
        let mut found: Option<(u32, usize, u64)> = None;
        for slot in from..l.meta.len() {
            let m = &l.meta[slot];
            if m.state != State::Stock || m.taken != 0 || m.free == 0 {
                if found.is_some() {
                    break;
                }
                continue;
            }
            let free = m.free;
            l.take_free(slot as u32, free);
            let (_, n, frames) = found.get_or_insert((slot as u32, 0, 0));
            *n += 1;
            *frames += u64::from(free.count_ones());
        }
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        found
    }

    /// Free frames, for a look.
    pub fn free_frames(&self) -> u64 {
        self.free_hint.load(Ordering::Relaxed)
    }

    /// Staged pages, for a look.
    pub fn staged_pages(&self) -> u64 {
        self.staged_hint.load(Ordering::Relaxed)
    }

    /// Slots that somebody is settling.
    pub fn settling(&self) -> usize {
        self.lists().meta.iter().filter(|m| m.state == State::Settling).count()
    }

    /// Waits until frames may have become free, at most `timeout`.
    pub(crate) fn wait_for_free(&self, timeout: std::time::Duration) {
        // SeqCst with `say_freed`: either it sees us, or we see the new number.
        let seen = self.freed.load(Ordering::SeqCst);
        self.waiters.fetch_add(1, Ordering::SeqCst);
        crate::sys::futex_wait(&self.freed, seen, Some(timeout));
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes who waits for frames, or for room.
    pub(crate) fn say_freed(&self) {
        if self.waiters.load(Ordering::SeqCst) != 0 {
            self.freed.fetch_add(1, Ordering::SeqCst);
            crate::sys::futex_wake(&self.freed, i32::MAX);
        }
    }

    /// After a fork, in the child: nobody is settling any more.
    pub fn reset_settling(&self) {
        let mut l = self.lists();
        for slot in 0..self.shared.len() as u32 {
            if l.meta[slot as usize].state == State::Settling {
                if self.granule_of(slot) != 0 {
                    l.meta[slot as usize].state = State::Staged;
                    l.fifo.push_front(slot);
                } else {
                    l.meta[slot as usize].state = State::Stock;
                    l.retire_if_empty(slot);
                }
            }
        }
    }
}

impl Lists {
    fn add_free(&mut self, slot: u32, frames: u64) {
        let m = &mut self.meta[slot as usize];
        debug_assert_eq!(m.free & frames, 0);
        m.free |= frames;
        if m.free == u64::MAX {
            self.whole.set(slot as usize, true);
        }
        if !m.listed {
            m.listed = true;
            self.some.push(slot);
        }
        self.free_frames += u64::from(frames.count_ones());
    }

    fn take_free(&mut self, slot: u32, frames: u64) {
        let m = &mut self.meta[slot as usize];
        debug_assert_eq!(m.free & frames, frames);
        if m.free == u64::MAX {
            self.whole.set(slot as usize, false);
        }
        m.free &= !frames;
        m.taken += frames.count_ones();
        self.free_frames -= u64::from(frames.count_ones());
    }

    /// Where up to `want` free frames lie side by side: many in whole slots, few where there are few.
    fn find(&mut self, want: usize) -> Option<Run> {
        // Slots that were used up by way of `whole` are still listed.
        while let Some(&last) = self.some.last() {
            if self.meta[last as usize].free != 0 {
                break;
            }
            self.some.pop();
            self.meta[last as usize].listed = false;
        }
        if want >= GRANULE_PAGES
            && let Some((first, n)) = side_by_side(&self.whole, want.div_ceil(GRANULE_PAGES))
        {
            return Some(Run { slot: first as u32, first: 0, len: want.min(n * GRANULE_PAGES) });
        }
        // Whole slots last: they are for those who want many.
        let (mut best, mut whole) = (None::<Run>, None);
        for &slot in self.some.iter().rev().take(16) {
            let free = self.meta[slot as usize].free;
            let Some((first, len)) = runs(free).max_by_key(|r| r.1) else { continue };
            let run = Run { slot, first, len: len.min(want) };
            if free == u64::MAX {
                whole = Some(run);
            } else if best.is_none_or(|b| b.len < run.len) {
                best = Some(run);
            }
            if best.is_some_and(|b| b.len == want) {
                return best;
            }
        }
        whole.filter(|w| best.is_none_or(|b| b.len < w.len)).or(best)
    }

    fn retire_if_empty(&mut self, slot: u32) {
        let m = &mut self.meta[slot as usize];
        if m.state == State::Stock && m.free == 0 && m.taken == 0 {
            m.state = State::Empty;
            self.empty.set(slot as usize, true);
        }
    }
}

#[cfg(test)]
mod tests;
