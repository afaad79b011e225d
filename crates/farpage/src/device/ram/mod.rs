//! `ram[:SIZE]`: pages kept LZ4-compressed in the domain's shared memory.
//!
//! Each object is a 16-byte header (checksum, frame number) and the LZ4 block, or the page itself where LZ4 gains
//! nothing. A frame's location word (8 bytes) says where its object is and how long; a frame without an object
//! has the word 0. `store` compresses a batch without any lock, takes the lock once to find room for all of it,
//! and copies the bytes in after letting go. `load` takes no lock at all. Neither allocates memory: a process
//! stores pages because memory is short.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Attach, Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};
use crate::size::format_size;
use crate::sys::{Buffer, Peers, Slots, lz4};
use crate::{PAGE_SIZE, Page};

mod classes;
mod loc;
mod pool;

use classes::MAX_OBJECT;
use loc::Loc;
use pool::{CHUNK, HEADER, Pool};

/// The smallest `ram` device, in bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// The largest: what a location word can address.
pub const MAX_SIZE: u64 = 128 << 30;

/// Pages that are compressed before the lock is taken for them.
const BATCH: usize = 64;
/// An LZ4 block longer than this saves no slot against the plain page.
const MAX_COMPRESSED: usize = PAGE_SIZE - HEADER;
/// Bytes of an object that are fetched ahead; the CPU sees by itself then that the rest will be wanted.
const SOON: usize = 256;
/// Threads of a process that can compress at the same time; more wait for each other.
const SCRATCHES: usize = 4;

/// Number of frames for a pool of `size` bytes: enough for pages that compress to an eighth.
///
/// The tables for them are sparse memory, so frames that are never used cost nothing.
pub fn frames(size: u64) -> u32 {
    u32::try_from(size / PAGE_SIZE as u64 * 8).unwrap_or(u32::MAX)
}

fn chunks(size: u64) -> usize {
    (size.clamp(MIN_SIZE, MAX_SIZE) / CHUNK as u64) as usize
}

/// Bytes of shared memory for a pool of `size` bytes.
pub fn shared_len(size: u64) -> usize {
    Pool::shared_len(chunks(size), frames(size) as usize)
}

/// Process `owner` has died in the middle of a change to the pool over this area.
#[cfg(test)]
pub(crate) fn lock_for_ever(size: u64, area: crate::sys::SharedArea, owner: Owner, peers: &dyn Peers) {
    let pool = Pool::new(area, chunks(size), frames(size) as usize);
    std::mem::forget(pool.lock(owner, peers));
}

/// What one thread needs to compress a batch.
struct Scratch {
    state: Box<lz4::State>,
    out: Box<[u8]>,
}

impl Scratch {
    fn new() -> Self {
        Self { state: Box::new(lz4::State([0; lz4::STATE_LEN])), out: vec![0; BATCH * PAGE_SIZE].into() }
    }
}

/// The device; see the module's description.
pub struct Ram {
    name: String,
    size: u64,
    frames: u32,
    pool: Pool,
    scratch: Slots<Scratch, SCRATCHES>,
    peers: Arc<dyn Peers>,
}

impl Ram {
    /// The device over its shared area, which has the length that [`shared_len`] gave for `size`.
    pub fn attach(size: u64, attach: Attach) -> Self {
        Self {
            name: format!("ram:{}", format_size(size)),
            size,
            frames: frames(size),
            pool: Pool::new(attach.area, chunks(size), frames(size) as usize),
            scratch: Slots::new([(); SCRATCHES].map(|()| Scratch::new())),
            peers: attach.peers,
        }
    }

    fn store_batch(&self, ops: &mut [StoreOp<'_>], owner: Owner) {
        let mut scratch = self.scratch.take();
        let Scratch { state, out } = &mut *scratch;
        // Offset and length of each compressed page in `out`; the length PAGE_SIZE means: not compressed.
        let mut packed = [(0usize, PAGE_SIZE); BATCH];
        let mut end = 0;
        for (op, packed) in ops.iter().zip(&mut packed) {
            if let Some(len) = lz4::compress(state, &op.page.0, &mut out[end..end + MAX_COMPRESSED]) {
                *packed = (end, len);
                end += len;
            }
        }
        let total: usize = packed[..ops.len()].iter().map(|(_, len)| HEADER + len).sum();
        self.pool.warm(total);

        // The largest first: where chunks are few, small objects find room in what the large ones left, and not
        // the other way round.
        let mut order: [u8; BATCH] = std::array::from_fn(|i| i as u8);
        let order = &mut order[..ops.len()];
        order.sort_unstable_by_key(|i| Reverse(packed[usize::from(*i)].1));

        let mut locs = [None; BATCH];
        let held = self.pool.lock(owner, &*self.peers);
        let mut compactable = true;
        for i in order.iter().map(|i| usize::from(*i)) {
            let (op, len) = (&mut ops[i], packed[i].1);
            if op.pfn >= self.frames {
                op.result = Err(DeviceError::Io(libc::EINVAL));
                continue;
            }
            held.remove(op.pfn as usize);
            let mut unit = held.alloc(HEADER + len);
            if unit.is_none() && compactable {
                compactable = held.compact(4, true) > 0;
                unit = held.alloc(HEADER + len);
            }
            locs[i] = unit.map(|unit| held.assign(op.pfn as usize, unit, len));
            op.result = if unit.is_some() { Ok(()) } else { Err(DeviceError::Full) };
        }
        drop(held);

        for ((op, (at, len)), loc) in ops.iter().zip(&packed).zip(&locs) {
            let Some((loc, offset)) = loc.and_then(|loc| Some((loc, self.pool.offset(loc)?))) else {
                continue;
            };
            let data = if *len == PAGE_SIZE { &op.page.0[..] } else { &out[*at..*at + *len] };
            self.pool.data().write(offset, &header(op.sum, op.pfn));
            self.pool.data().write(offset + HEADER, data);
            // Release: who sees the location without `busy` sees the bytes. Nobody else changes a busy location.
            let word = Loc { busy: false, ..loc }.pack();
            self.pool.locs()[op.pfn as usize].store(word, Ordering::Release);
        }
    }

    /// Copies a frame's object, header first, to `buf`, or as much of it as fits: `(its checksum, its length)`.
    fn fetch<const N: usize>(&self, pfn: Pfn, buf: &mut Buffer<N>) -> Result<(Sum, usize), DeviceError> {
        let word = self.pool.locs().get(pfn as usize).ok_or(DeviceError::Io(libc::EINVAL))?;
        loop {
            // Acquire pairs with the Release of the store or of the move that put the object there.
            let seen = word.load(Ordering::Acquire);
            let loc = Loc::unpack(seen).filter(|loc| !loc.busy).ok_or(DeviceError::Corrupt)?;
            let offset = self.pool.offset(loc).ok_or(DeviceError::Corrupt)?;
            #[cfg(test)]
            tests::interrupt();
            buf.read(self.pool.data(), offset, HEADER + loc.len);
            // If the object was moved while we copied it, and its place used again, then the location is another
            // one now; pairs with the Release fence after the move (`Held::compact` has the argument).
            fence(Ordering::Acquire);
            if word.load(Ordering::Relaxed) != seen {
                continue;
            }
            let head = buf.bytes();
            let word = |i: usize| u32::from_ne_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
            if word(12) != pfn {
                return Err(DeviceError::Corrupt);
            }
            return Ok((Sum([word(0), word(4), word(8)]), loc.len));
        }
    }

    fn load_one(&self, pfn: Pfn, page: &mut Page, buf: &mut Buffer<MAX_OBJECT>) -> Result<Sum, DeviceError> {
        let (sum, len) = self.fetch(pfn, buf)?;
        let bytes = buf.bytes().get(HEADER..HEADER + len).ok_or(DeviceError::Corrupt)?;
        if len == PAGE_SIZE {
            page.0.copy_from_slice(bytes);
        } else if lz4::decompress(bytes, &mut page.0) != Some(PAGE_SIZE) {
            return Err(DeviceError::Corrupt);
        }
        Ok(sum)
    }
}

fn header(sum: Sum, pfn: Pfn) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    for (to, word) in bytes.chunks_exact_mut(4).zip([sum.0[0], sum.0[1], sum.0[2], pfn]) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

impl Device for Ram {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn store(&self, ops: &mut [StoreOp<'_>], owner: Owner) {
        ops.chunks_mut(BATCH).for_each(|batch| self.store_batch(batch, owner));
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        if ops.len() > 1 {
            self.soon(&mut ops.iter().map(|op| op.pfn));
        }
        let mut buf = Buffer::new();
        for op in ops {
            op.result = self.load_one(op.pfn, op.page, &mut buf);
        }
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        self.fetch(pfn, &mut Buffer::<HEADER>::new()).map_or_else(|_| Sum::default(), |(sum, _)| sum)
    }

    fn soon(&self, pfns: &mut dyn Iterator<Item = Pfn>) {
        for pfn in pfns {
            // A hint: should the object be moved meanwhile, something else is in the cache.
            let loc =
                self.pool.locs().get(pfn as usize).and_then(|word| Loc::unpack(word.load(Ordering::Relaxed)));
            if let Some(offset) = loc.and_then(|loc| self.pool.offset(loc)) {
                crate::sys::prefetch(self.pool.data().addr() + offset, SOON);
            }
        }
    }

    fn free(&self, pfns: &[Pfn], owner: Owner) {
        let held = self.pool.lock(owner, &*self.peers);
        for pfn in pfns {
            if *pfn < self.frames {
                held.remove(*pfn as usize);
            }
        }
        held.compact(4, false);
    }

    fn repair(&self, owner: Owner) {
        // Taking the lock is all: it is taken over from a dead holder and the pool rebuilt.
        drop(self.pool.lock(owner, &*self.peers));
    }

    fn remove(&self, owner: Owner) -> Result<(), rustix::io::Errno> {
        self.pool.lock(owner, &*self.peers).give_back_all()
    }

    fn usage(&self) -> Usage {
        let (used, payload) = self.pool.used();
        Usage { capacity: self.size, used, payload, peak: self.pool.peak() }
    }
}

#[cfg(test)]
mod tests;
