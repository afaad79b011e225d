//! The pool: which parts of the shared memory hold objects, and which are free.
//!
//! Chunks of 64 KiB, each divided into slots of one size class. What is in use follows from the frames'
//! location words alone; everything else here (bitmaps, lists, counters) is derived from them and is rebuilt
//! when a process died while it held the lock ([`Held::rebuild`]).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

#[cfg(test)]
mod checks;
mod compact;

use super::classes::{CLASSES, Class, MAX_OBJECT, MAX_SLOTS, TABLE, class_of};
use super::loc::Loc;
use crate::sys::{Locked, Peers, RobustLock, SharedArea};

/// Bytes of a chunk.
pub const CHUNK: usize = 64 << 10;
/// Bytes of the unit in which locations count.
pub const UNIT: usize = 32;
/// Bytes before each object: 12 of checksum, 4 of frame number.
pub const HEADER: usize = 16;

/// A pool with fewer divided chunks than this is small (32 MiB).
const SMALL: u32 = 512;

const UNITS: usize = CHUNK / UNIT;
const MAP_WORDS: usize = MAX_SLOTS / 64;
/// Partly filled chunks of a class are kept in this many lists, by how full they are.
const GROUPS: usize = 4;

// Words of the pool's head.
const LOCK: usize = 0;
/// Chunks from this one on were never used.
const FRESH: usize = 1;
/// Chunks below this one have been populated, or are about to be, before their first use.
const WARM: usize = 2;
/// List of chunks without objects that keep their memory, and its length.
const EMPTY: usize = 3;
const EMPTY_COUNT: usize = 4;
/// List of chunks whose memory was given back.
const BARE: usize = 5;
/// Chunks that are divided into slots.
const USED: usize = 6;
/// Frames from this one on never had an object.
const HIGH: usize = 7;
/// The most chunks that had memory at once.
const PEAK: usize = 8;
/// `GROUPS` lists of partly filled chunks a class.
const PARTIAL: usize = 16;
/// Free slots of a class.
const FREE: usize = PARTIAL + CLASSES * GROUPS;
const HEAD_WORDS: usize = FREE + CLASSES;

// Words of a chunk's descriptor.
/// 0: not divided, else its class + 1.
const CLASS: usize = 0;
const COUNT: usize = 1;
const NEXT: usize = 2;
const PREV: usize = 3;
const DESC_WORDS: usize = 4;

/// The pool's view of the shared memory. List links and list heads hold a chunk number + 1; 0 ends a list.
pub struct Pool {
    head: &'static [AtomicU32],
    /// Bytes of objects; bytes of free slots in divided chunks.
    sums: &'static [AtomicU64],
    desc: &'static [AtomicU32],
    maps: &'static [AtomicU64],
    locs: &'static [AtomicU64],
    data: SharedArea,
    chunks: usize,
    lock: RobustLock,
}

/// The pool with its lock held. All of its counters are read and written under the lock, which orders them:
/// `Relaxed` suffices.
pub struct Held<'a> {
    pool: &'a Pool,
    _lock: Locked<'a>,
}

impl Pool {
    /// Bytes of shared memory for `chunks` chunks and `frames` frames, wherever the area begins.
    pub fn shared_len(chunks: usize, frames: usize) -> usize {
        let lens = Self::lens(chunks, frames);
        lens.iter().map(|len| len.next_multiple_of(64)).sum::<usize>() + 4096 + chunks * CHUNK
    }

    fn lens(chunks: usize, frames: usize) -> [usize; 5] {
        [HEAD_WORDS * 4, 64, chunks * DESC_WORDS * 4, chunks * MAP_WORDS * 8, frames * 8]
    }

    /// The pool over an area of [`Self::shared_len`] bytes, zero when it is new. The area must begin at the
    /// same offset in a page in every process.
    pub fn new(area: SharedArea, chunks: usize, frames: usize) -> Self {
        let [head, sums, desc, maps, locs] = Self::lens(chunks, frames);
        let (head, area) = area.split(head);
        let (sums, area) = area.split(sums);
        let (desc, area) = area.split(desc);
        let (maps, area) = area.split(maps);
        let (locs, area) = area.split(locs);
        let data = area.part(area.addr().next_multiple_of(4096) - area.addr(), chunks * CHUNK);
        let head = head.atomics32();
        Self {
            head,
            sums: sums.atomics64(),
            desc: desc.atomics32(),
            maps: maps.atomics64(),
            locs: locs.atomics64(),
            data,
            chunks,
            lock: RobustLock::new(&head[LOCK]),
        }
    }

    /// Locks the pool, rebuilding it first if the last holder died.
    pub fn lock(&self, owner: u16, peers: &dyn Peers) -> Held<'_> {
        let lock = self.lock.lock(owner, peers);
        let recovered = lock.recovered;
        let held = Held { pool: self, _lock: lock };
        if recovered {
            held.rebuild();
        }
        held
    }

    /// The location words.
    pub fn locs(&self) -> &'static [AtomicU64] {
        self.locs
    }

    /// The objects' bytes.
    pub fn data(&self) -> SharedArea {
        self.data
    }

    /// Offset of an object's header, if header and object lie in the pool.
    pub fn offset(&self, loc: Loc) -> Option<usize> {
        let offset = loc.unit as usize * UNIT;
        (offset + HEADER + loc.len <= self.chunks * CHUNK).then_some(offset)
    }

    /// `(bytes that chunks occupy, bytes of objects)`.
    pub fn used(&self) -> (u64, u64) {
        let chunks = self.head[USED].load(Relaxed) + self.head[EMPTY_COUNT].load(Relaxed);
        (u64::from(chunks) * CHUNK as u64, self.sums[0].load(Relaxed))
    }

    /// The most bytes that chunks have occupied.
    pub fn peak(&self) -> u64 {
        u64::from(self.head[PEAK].load(Relaxed)) * CHUNK as u64
    }

    /// Has the kernel provide the memory of the next fresh chunks, so that whoever divides them under the lock
    /// does not wait for it there. Only a hint: nothing depends on it.
    pub fn warm(&self, bytes: usize) {
        if self.head[EMPTY].load(Relaxed) != 0 {
            return;
        }
        let fresh = self.head[FRESH].load(Relaxed) as usize;
        let want = (fresh + bytes.div_ceil(CHUNK) + 1).min(self.chunks);
        let from = self.head[WARM].fetch_max(want as u32, Relaxed) as usize;
        let from = from.max(fresh);
        if from < want {
            // Only a hint: `Held::divide` reports the error that matters.
            let _warmed = self.data.populate(from * CHUNK, (want - from) * CHUNK);
        }
    }
}

impl Held<'_> {
    fn head(&self, word: usize) -> u32 {
        self.pool.head[word].load(Relaxed)
    }
    fn set_head(&self, word: usize, value: u32) {
        self.pool.head[word].store(value, Relaxed);
    }
    fn add_head(&self, word: usize, by: i32) {
        self.set_head(word, self.head(word).wrapping_add_signed(by));
    }
    fn desc(&self, chunk: usize, word: usize) -> &AtomicU32 {
        &self.pool.desc[chunk * DESC_WORDS + word]
    }
    fn get(&self, chunk: usize, word: usize) -> usize {
        self.desc(chunk, word).load(Relaxed) as usize
    }
    fn set(&self, chunk: usize, word: usize, value: usize) {
        self.desc(chunk, word).store(value as u32, Relaxed);
    }
    fn add_sum(&self, sum: usize, by: i64) {
        let word = &self.pool.sums[sum];
        word.store(word.load(Relaxed).wrapping_add_signed(by), Relaxed);
    }
    fn map(&self, chunk: usize) -> &[AtomicU64] {
        &self.pool.maps[chunk * MAP_WORDS..(chunk + 1) * MAP_WORDS]
    }

    fn push(&self, list: usize, chunk: usize) {
        let first = self.head(list) as usize;
        self.set(chunk, NEXT, first);
        self.set(chunk, PREV, 0);
        if first != 0 {
            self.set(first - 1, PREV, chunk + 1);
        }
        self.set_head(list, chunk as u32 + 1);
    }

    fn unlink(&self, list: usize, chunk: usize) {
        let (next, prev) = (self.get(chunk, NEXT), self.get(chunk, PREV));
        match prev {
            0 => self.set_head(list, next as u32),
            _ => self.set(prev - 1, NEXT, next),
        }
        if next != 0 {
            self.set(next - 1, PREV, prev);
        }
    }

    fn pop(&self, list: usize) -> Option<usize> {
        let chunk = (self.head(list) as usize).checked_sub(1)?;
        self.unlink(list, chunk);
        Some(chunk)
    }

    /// The list that a chunk of `class` with `count` used slots is in, if it is in one.
    fn list_of(class: usize, count: usize) -> Option<usize> {
        let slots = TABLE[class].slots;
        (count > 0 && count < slots).then(|| PARTIAL + class * GROUPS + count * GROUPS / slots)
    }

    /// Changes the used count of a chunk, and its list with it.
    fn set_count(&self, chunk: usize, class: usize, count: usize) {
        let old = self.get(chunk, COUNT);
        self.set(chunk, COUNT, count);
        let (from, to) = (Self::list_of(class, old), Self::list_of(class, count));
        if from != to {
            from.inspect(|list| self.unlink(*list, chunk));
            to.inspect(|list| self.push(*list, chunk));
        }
        let by = count as i64 - old as i64;
        self.add_head(FREE + class, -by as i32);
        self.add_sum(1, -by * TABLE[class].size as i64);
    }

    /// A slot for `bytes` (header included): its location in units. `None`: full.
    pub fn alloc(&self, bytes: usize) -> Option<u32> {
        let class = class_of(bytes);
        if let Some(unit) = self.alloc_near(class, false) {
            return Some(unit);
        }
        match self.divide(class) {
            Some(chunk) => Some(self.take_slot(chunk, class)),
            // Rather a slot that is too large than none.
            None => (class + 1..CLASSES).find_map(|larger| self.alloc_partial(larger)),
        }
    }

    /// The classes whose slots serve `class` before a chunk is divided for it. In a small pool one partly filled
    /// chunk of every class would be much: there, slots up to an eighth larger will do, and any larger ones (`full`)
    /// when no chunk is left.
    fn near(&self, class: usize, full: bool) -> std::ops::Range<usize> {
        let more = match (self.head(USED) < SMALL, full) {
            (true, true) => CLASSES,
            (false, false) => 0,
            _ => 2,
        };
        class..(class + more + 1).min(CLASSES)
    }

    fn alloc_near(&self, class: usize, full: bool) -> Option<u32> {
        self.near(class, full).find_map(|class| self.alloc_partial(class))
    }

    /// A slot in a chunk of `class` that has one, the fullest first.
    fn alloc_partial(&self, class: usize) -> Option<u32> {
        let lists = PARTIAL + class * GROUPS..PARTIAL + (class + 1) * GROUPS;
        let chunk = lists.rev().find_map(|list| (self.head(list) as usize).checked_sub(1))?;
        Some(self.take_slot(chunk, class))
    }

    fn take_slot(&self, chunk: usize, class: usize) -> u32 {
        let slots = TABLE[class].slots;
        for (i, word) in self.map(chunk).iter().enumerate() {
            let bits = word.load(Relaxed);
            let slot = i * 64 + bits.trailing_ones() as usize;
            if bits != u64::MAX && slot < slots {
                word.store(bits | 1 << (slot % 64), Relaxed);
                self.set_count(chunk, class, self.get(chunk, COUNT) + 1);
                return (chunk * UNITS + slot * TABLE[class].size / UNIT) as u32;
            }
        }
        unreachable!("chunk {chunk} of class {class} is in a list of chunks with a free slot");
    }

    /// Divides an unused chunk into slots of `class`.
    fn divide(&self, class: usize) -> Option<usize> {
        let chunk = if let Some(chunk) = self.pop(EMPTY) {
            self.add_head(EMPTY_COUNT, -1);
            chunk
        } else if let Some(chunk) = self.pop(BARE) {
            chunk
        } else {
            let fresh = self.head(FRESH) as usize;
            if fresh == self.pool.chunks {
                return None;
            }
            self.add_head(FRESH, 1);
            fresh
        };
        // Also when the memory is there: mapping it into this process at once is cheaper than 16 faults. An
        // error is met here, where it means "full", and not as a SIGBUS later.
        if self.pool.data.populate(chunk * CHUNK, CHUNK).is_err() {
            self.push(BARE, chunk);
            return None;
        }
        let slots = TABLE[class].slots;
        self.set(chunk, CLASS, class + 1);
        self.set(chunk, COUNT, 0);
        self.map(chunk).iter().for_each(|word| word.store(0, Relaxed));
        self.add_head(USED, 1);
        self.set_head(PEAK, self.head(PEAK).max(self.head(USED) + self.head(EMPTY_COUNT)));
        self.add_head(FREE + class, slots as i32);
        self.add_sum(1, (slots * TABLE[class].size) as i64);
        Some(chunk)
    }

    /// Sets a frame's location to a slot from [`Self::alloc`], marked busy until its bytes are there.
    pub fn assign(&self, pfn: usize, unit: u32, len: usize) -> Loc {
        if self.head(HIGH) as usize <= pfn {
            self.set_head(HIGH, pfn as u32 + 1);
        }
        let loc = Loc { unit, len, busy: true, moves: 0 };
        self.pool.locs[pfn].store(loc.pack(), Relaxed);
        self.add_sum(0, len as i64);
        loc
    }

    /// Takes a frame's object away, if it has one.
    pub fn remove(&self, pfn: usize) {
        let Some(loc) = Loc::unpack(self.pool.locs[pfn].load(Relaxed)) else { return };
        self.pool.locs[pfn].store(Loc::NONE, Relaxed);
        self.add_sum(0, -(loc.len as i64));
        self.free_slot(loc.unit);
    }

    fn free_slot(&self, unit: u32) {
        let Some((chunk, class, slot)) = self.slot_of(unit) else { return };
        let word = &self.map(chunk)[slot / 64];
        let bits = word.load(Relaxed);
        debug_assert!(bits & 1 << (slot % 64) != 0, "slot is free already");
        word.store(bits & !(1 << (slot % 64)), Relaxed);
        let count = self.get(chunk, COUNT) - 1;
        self.set_count(chunk, class, count);
        if count == 0 {
            self.retire(chunk, class);
        }
    }

    /// Chunk, class and slot of a location, if there is such a slot.
    fn slot_of(&self, unit: u32) -> Option<(usize, usize, usize)> {
        let (chunk, within) = (unit as usize / UNITS, unit as usize % UNITS * UNIT);
        if chunk >= self.pool.chunks {
            return None;
        }
        let class = self.get(chunk, CLASS).checked_sub(1)?;
        let Class { size, slots } = TABLE[class];
        (within % size == 0 && within / size < slots).then_some((chunk, class, within / size))
    }

    /// A chunk has lost its last object: it may serve any class again.
    fn retire(&self, chunk: usize, class: usize) {
        self.add_head(FREE + class, -(TABLE[class].slots as i32));
        self.add_sum(1, -((TABLE[class].slots * TABLE[class].size) as i64));
        self.set(chunk, CLASS, 0);
        self.add_head(USED, -1);
        self.push(EMPTY, chunk);
        self.add_head(EMPTY_COUNT, 1);
        let reserve = 2 + self.head(USED) / 64;
        // Some slack, so that it is not one system call for each chunk.
        if self.head(EMPTY_COUNT) > 2 * reserve {
            self.give_back(reserve);
        }
    }

    /// Gives the memory of empty chunks back to the kernel, but for `keep` of them.
    fn give_back(&self, keep: u32) {
        while self.head(EMPTY_COUNT) > keep {
            let Some(chunk) = self.pop(EMPTY) else { return };
            if self.pool.data.give_back(chunk * CHUNK, CHUNK).is_err() {
                self.push(EMPTY, chunk);
                return;
            }
            self.add_head(EMPTY_COUNT, -1);
            self.push(BARE, chunk);
        }
    }

    /// Gives all memory back that holds no object, what was warmed for later included.
    pub fn give_back_all(&self) -> rustix::io::Result<()> {
        self.give_back(0);
        let (fresh, warm) = (self.head(FRESH), self.pool.head[WARM].swap(self.head(FRESH), Relaxed));
        if warm > fresh {
            let (from, len) = (fresh as usize * CHUNK, (warm - fresh) as usize * CHUNK);
            self.pool.data.give_back(from, len)?;
        }
        if self.head(EMPTY_COUNT) == 0 { Ok(()) } else { Err(rustix::io::Errno::AGAIN) }
    }

    /// Derives everything from the location words again.
    fn rebuild(&self) {
        let pool = self.pool;
        let chunks = (self.head(FRESH) as usize).min(pool.chunks);
        let state = [EMPTY, EMPTY_COUNT, BARE, USED].into_iter().chain(PARTIAL..HEAD_WORDS);
        state.for_each(|word| self.set_head(word, 0));
        pool.sums.iter().for_each(|sum| sum.store(0, Relaxed));
        for chunk in 0..chunks {
            self.set(chunk, COUNT, 0);
            self.map(chunk).iter().for_each(|word| word.store(0, Relaxed));
        }
        for word in &pool.locs[..(self.head(HIGH) as usize).min(pool.locs.len())] {
            let loc = word.load(Relaxed);
            if loc == Loc::NONE {
                continue;
            }
            match Loc::unpack(loc).and_then(|loc| Some((loc, self.slot_of(loc.unit)?))) {
                Some((loc, (chunk, _, slot))) => {
                    let map = &self.map(chunk)[slot / 64];
                    map.store(map.load(Relaxed) | 1 << (slot % 64), Relaxed);
                    self.set(chunk, COUNT, self.get(chunk, COUNT) + 1);
                    self.add_sum(0, loc.len as i64);
                }
                // No operation leaves such a word: the memory was overwritten. Loading it says "corrupt".
                None => word.store(Loc::NONE, Relaxed),
            }
        }
        for chunk in 0..chunks {
            match (self.get(chunk, CLASS).checked_sub(1), self.get(chunk, COUNT)) {
                (Some(class), count) if count > 0 => {
                    let free = TABLE[class].slots - count;
                    self.add_head(USED, 1);
                    self.add_head(FREE + class, free as i32);
                    self.add_sum(1, (free * TABLE[class].size) as i64);
                    Self::list_of(class, count).inspect(|list| self.push(*list, chunk));
                }
                _ => {
                    self.set(chunk, CLASS, 0);
                    self.push(EMPTY, chunk);
                    self.add_head(EMPTY_COUNT, 1);
                }
            }
        }
        self.give_back(0);
    }
}
