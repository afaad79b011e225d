//! Pagemaps: a registered range of a device's frames with a memory type (Linux: `dev_pagemap`).
//!
//! Here the counts of [`crate::frame`] and the storage of [`crate::device`] meet: allocation takes a frame
//! from 0 to 1, and the last `put`, of whatever type, runs the one path that hands it back.

use crate::device::{Device, DeviceError, LoadOp, Sum};
use crate::frame::{FrameTable, GetError, Owner, Pfn};
use crate::sys::SharedArea;

/// How the CPU reaches a device's pages, and whether they move (Linux: `enum memory_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryType {
    /// Not reachable by the CPU: moves to DRAM on a fault.
    Private,
}

/// How often a load is tried.
const ATTEMPTS: u64 = 3;

/// A device's frames under the one rule.
pub struct Pagemap {
    /// Its number in the domain, 0 to 15, which page entries name.
    pub id: u8,
    /// The type.
    pub memory_type: MemoryType,
    /// The counts.
    pub frames: FrameTable,
    /// The storage.
    pub device: Box<dyn Device>,
    /// Frames from this number on are not allocated; 0: there is no such limit. Shared, as the counts are.
    limit: &'static std::sync::atomic::AtomicU32,
}

impl Pagemap {
    /// Bytes of shared memory for the counts of `frames` frames.
    pub fn shared_len(frames: u32) -> usize {
        FrameTable::shared_len(frames as usize)
    }

    /// Registers a device's frames; `area` is shared memory of [`Pagemap::shared_len`] bytes. `create`: the
    /// area is fresh.
    pub fn register(id: u8, device: Box<dyn Device>, area: SharedArea, create: bool) -> Self {
        let n = device.frames() as usize;
        let (head, rest) = area.split(64);
        let (words, hints) = rest.split(n.next_multiple_of(64) * 4);
        let head = head.atomics32();
        let frames =
            FrameTable::new(&words.atomics32()[..n], hints.atomics64(), &head[0], &head[1], &head[2]);
        if create {
            frames.format();
        }
        Self { id, memory_type: MemoryType::Private, frames, device, limit: &head[3] }
    }

    /// Allocates a frame for `owner`, in transit until [`FrameTable::settle`].
    pub fn alloc(&self, owner: Owner) -> Option<Pfn> {
        self.frames.alloc_below(self.limit(), owner)
    }

    /// Frames from this number on are not allocated.
    pub fn limit(&self) -> Pfn {
        // SeqCst: who has set it, and then finds a frame free, knows that it stays so.
        match self.limit.load(std::sync::atomic::Ordering::SeqCst) {
            0 => self.frames.len() as Pfn,
            limit => limit,
        }
    }

    /// Sets that limit. Frames beyond it that are in use stay in use, until they are moved ([`crate::space::Space::shrink`]).
    pub fn set_limit(&self, limit: Pfn) {
        self.limit.store(limit.max(1), std::sync::atomic::Ordering::SeqCst);
    }

    /// One more reference for `owner`, in transit; waits out another's transfer.
    pub fn get_in_transit(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        loop {
            match self.frames.get_in_transit(pfn, owner) {
                Err(GetError::Transit | GetError::Frozen) => crate::sys::yield_now(),
                r => return r,
            }
        }
    }

    /// Drops references that transfers hold ([`FrameTable::begin_put`] or an allocation); frames whose
    /// last one it was go back to the device, all at once.
    pub fn put_in_transit(&self, pfns: &[Pfn], owner: Owner) {
        let last: Vec<Pfn> = pfns.iter().copied().filter(|&p| self.frames.put_in_transit(p, owner)).collect();
        self.free(&last, owner);
    }

    /// The one path at count 0: storage back to the device, then the frame is free.
    pub fn free(&self, pfns: &[Pfn], owner: Owner) {
        if pfns.is_empty() {
            return;
        }
        self.device.free(pfns, owner);
        pfns.iter().for_each(|&p| self.frames.release(p));
    }

    /// Loads frames that the caller holds references to, each verified against its checksum and tried again before it is
    /// given up. Returns how many from the start are good, how many attempts went wrong, and what was wrong with
    /// the first that is not good.
    pub fn load(&self, ops: &mut [LoadOp<'_>]) -> (usize, u64, Result<(), DeviceError>) {
        self.device.load(ops);
        let verify = !self.device.is_memory();
        let mut bad = 0;
        for (good, op) in ops.iter_mut().enumerate() {
            for attempt in 1.. {
                let error = match &op.result {
                    Ok(sum) if !verify || *sum == Sum::of(op.page) => break,
                    Ok(_) => DeviceError::Corrupt,
                    Err(e) => e.clone(),
                };
                bad += 1;
                if attempt == ATTEMPTS {
                    return (good, bad, Err(error));
                }
                self.device.load(std::slice::from_mut(op));
            }
        }
        (ops.len(), bad, Ok(()))
    }
}
