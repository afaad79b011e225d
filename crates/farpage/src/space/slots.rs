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

use super::range::{GRANULE, GRANULE_PAGES};
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
    in_stock: bool,
}

struct Lists {
    meta: Vec<Meta>,
    empty: Vec<u32>,
    fifo: VecDeque<u32>,
    /// Slots with free frames: few ones at the back, whole slots at the front.
    stock: VecDeque<u32>,
    free_frames: u64,
}

/// What others may look at without the mutex.
struct Shared {
    /// The granule's first byte in its range; 0 = not attached.
    granule: AtomicUsize,
    staged: AtomicU64,
}

/// The staging slots of a process.
pub struct Slots {
    base: usize,
    shared: Vec<Shared>,
    lists: Mutex<Lists>,
    free_hint: AtomicU64,
    /// Changes when frames become free or a slot is settled, if somebody waits for that.
    freed: AtomicU32,
    waiters: AtomicU32,
}

/// Free frames at consecutive addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The slot.
    pub slot: u32,
    /// First page in it.
    pub first: usize,
    /// How many.
    pub len: usize,
}

/// `len` set bits from `first`.
pub fn mask(first: usize, len: usize) -> u64 {
    if len == 0 { 0 } else { (u64::MAX >> (64 - len)) << first }
}

/// The runs of set bits, as (first, length).
pub fn runs(mut bits: u64) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros() as usize;
        let len = (!(bits >> first)).trailing_zeros().min(64 - first as u32) as usize;
        bits &= !mask(first, len);
        Some((first, len))
    })
}

impl Slots {
    /// Reserves address space for `n` slots.
    pub fn new(n: usize) -> rustix::io::Result<Self> {
        // SAFETY: the kernel chooses the address. Private, so that UFFDIO_MOVE accepts it.
        let raw = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                (n + 1) * GRANULE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // SAFETY: our own mapping. Huge pages would be split at once; an error only means there are none.
        let _advice =
            unsafe { rustix::mm::madvise(raw, (n + 1) * GRANULE, rustix::mm::Advice::LinuxNoHugepage) };
        let base = (raw as usize).next_multiple_of(GRANULE);
        let meta = (0..n).map(|_| Meta { state: State::Empty, free: 0, taken: 0, in_stock: false }).collect();
        Ok(Self {
            base,
            shared: (0..n)
                .map(|_| Shared { granule: AtomicUsize::new(0), staged: AtomicU64::new(0) })
                .collect(),
            lists: Mutex::new(Lists {
                meta,
                empty: (0..n as u32).rev().collect(),
                fifo: VecDeque::with_capacity(n),
                stock: VecDeque::with_capacity(n),
                free_frames: 0,
            }),
            free_hint: AtomicU64::new(0),
            freed: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
        })
    }

    /// The whole area: for registering it.
    pub fn area(&self) -> (usize, usize) {
        (self.base, self.shared.len() * GRANULE)
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

    /// The bytes of a free frame that the caller has got from [`Slots::take`] and not yet moved or returned.
    #[allow(clippy::mut_from_ref)] // the frame is the caller's alone, like what an allocator returns
    pub(crate) fn taken_page(&self, slot: u32, page: usize) -> &mut Page {
        debug_assert!(page < GRANULE_PAGES);
        // SAFETY: inside the area and page-aligned. A taken frame is there and nobody else's.
        unsafe { &mut *(self.addr(slot, page) as *mut Page) }
    }

    /// Staged pages of a slot.
    pub fn staged(&self, slot: u32) -> u64 {
        self.shared[slot as usize].staged.load(Ordering::Relaxed)
    }

    /// Sets them; under the granule's lock.
    pub fn set_staged(&self, slot: u32, staged: u64) {
        self.shared[slot as usize].staged.store(staged, Ordering::Relaxed);
    }

    /// The granule (its first byte in its range) that a slot is attached to, or 0.
    pub fn granule_of(&self, slot: u32) -> usize {
        self.shared[slot as usize].granule.load(Ordering::Relaxed)
    }

    /// Says that the granule is now found at another address (`mremap`); under the world's lock.
    pub fn set_granule(&self, slot: u32, addr: usize) {
        self.shared[slot as usize].granule.store(addr, Ordering::Relaxed);
    }

    /// An empty slot, for a granule; [`Slots::attach`] or [`Slots::give_back`] ends it.
    pub fn take_empty(&self) -> Option<u32> {
        let mut l = self.lists();
        let slot = l.empty.pop()?;
        l.meta[slot as usize].state = State::Settling;
        Some(slot)
    }

    /// The slot was not needed.
    pub fn give_back(&self, slot: u32) {
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Empty;
        l.empty.push(slot);
    }

    /// The slot now holds `staged` pages of the granule; it queues for settling. Under the granule's lock.
    pub fn attach(&self, slot: u32, granule: usize, staged: u64) {
        self.set_granule(slot, granule);
        self.set_staged(slot, staged);
        let mut l = self.lists();
        l.meta[slot as usize].state = State::Staged;
        l.fifo.push_back(slot);
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
        let m = &mut l.meta[slot as usize];
        debug_assert_eq!(m.free & frames, 0);
        m.free |= frames;
        let whole = m.free == u64::MAX;
        if !m.in_stock {
            m.in_stock = true;
            if whole { l.stock.push_front(slot) } else { l.stock.push_back(slot) }
        }
        l.free_frames += u64::from(frames.count_ones());
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        drop(l);
        self.say_freed();
    }

    /// Takes up to `want` free frames at consecutive addresses. They are the caller's until he moves them away
    /// ([`Slots::moved`]) or returns them ([`Slots::put_back`]).
    pub fn take(&self, want: usize) -> Option<Run> {
        let mut l = self.lists();
        // One page: from the slots with few; many: from whole slots.
        let slot = if want == 1 { l.stock.back().copied()? } else { l.best_run(want)? };
        let (first, len) = runs(l.meta[slot as usize].free).max_by_key(|r| r.1)?;
        let (first, len) = if want == 1 { (first, 1) } else { (first, len.min(want)) };
        let m = &mut l.meta[slot as usize];
        m.free &= !mask(first, len);
        m.taken += len as u32;
        if m.free == 0 {
            m.in_stock = false;
            l.stock.retain(|&s| s != slot);
        }
        l.free_frames -= len as u64;
        self.free_hint.store(l.free_frames, Ordering::Relaxed);
        Some(Run { slot, first, len })
    }

    /// `n` frames taken from this slot have moved away: their places are holes.
    pub fn moved(&self, slot: u32, n: usize) {
        let mut l = self.lists();
        l.meta[slot as usize].taken -= n as u32;
        l.retire_if_empty(slot);
    }

    /// These frames, taken from this slot, were not needed.
    pub fn put_back(&self, slot: u32, frames: u64) {
        self.lists().meta[slot as usize].taken -= frames.count_ones();
        self.add_free(slot, frames);
    }

    /// Free frames, for a look.
    pub fn free_frames(&self) -> u64 {
        self.free_hint.load(Ordering::Relaxed)
    }

    /// Staged pages, for a look.
    pub fn staged_pages(&self) -> u64 {
        let l = self.lists();
        l.fifo.iter().map(|&s| u64::from(self.staged(s).count_ones())).sum()
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

    fn say_freed(&self) {
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
    fn best_run(&self, want: usize) -> Option<u32> {
        let longest = |s: u32| runs(self.meta[s as usize].free).map(|r| r.1).max().unwrap_or(0);
        let mut best = None;
        let mut best_len = 0;
        for &s in self.stock.iter().take(16) {
            let len = longest(s);
            if len >= want {
                return Some(s);
            }
            if len > best_len {
                (best, best_len) = (Some(s), len);
            }
        }
        best
    }

    fn retire_if_empty(&mut self, slot: u32) {
        let m = &mut self.meta[slot as usize];
        if m.state == State::Stock && m.free == 0 && m.taken == 0 {
            m.state = State::Empty;
            self.empty.push(slot);
        }
    }
}
