//! What a range of device memory is to the CPU, and what its driver does for it: the only place where types differ.

use std::ops::Deref;

use rustix::io::Errno;

use super::memory::DeviceMemory;
use super::{Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};

/// How the CPU reaches a device's pages, and whether they move (Linux: `enum memory_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum MemoryType {
    /// Ordinary DRAM. Its pages are the kernel's: no pagemap can have them.
    System,
    /// Not reachable by the CPU: moves to DRAM on a fault.
    Private,
    /// Reachable by the CPU; moves on request, and out of the way of long-term pins.
    Coherent,
    /// Reachable by the CPU; never moves (device-dax, any mappable memory device).
    Generic,
    /// Pages of files on a DAX file system.
    FsDax,
    /// Reachable through its driver; mapped only for those who ask for it.
    P2pDma,
}

/// A pagemap's driver (Linux: `dev_pagemap_ops`).
///
/// Counts are not its business: it is called once for a frame whose count has become 0, whatever the type. A device
/// that stores and loads pages (`Box<dyn Device>`) is one as it is.
pub trait PagemapOps: Send + Sync {
    /// A short name for messages, for example `ram:1G`.
    fn name(&self) -> &str;

    /// The last reference of each of these frames is gone: their storage is free. Called once for each, with many at a
    /// time; again only after a process died inside it, so it must be idempotent.
    fn page_free(&self, pfns: &[Pfn], owner: Owner);

    /// How pages come to system memory, and from there: without it they do not move. `Private` needs it, because the CPU
    /// reaches such a page in no other way.
    fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
        None
    }

    /// The memory itself, where it can be mapped.
    fn memory(&self) -> Option<&DeviceMemory> {
        None
    }

    /// How many frames it has.
    fn frames(&self) -> u32 {
        self.memory().map_or_else(|| self.migrate_to_ram().map_or(0, Device::frames), DeviceMemory::frames)
    }

    /// `owner` has been waiting for long for somebody's transfer of a reference, and is in none himself: who began it may
    /// be dead, and where nobody else cleans up after the dead it is to be done now.
    fn stuck(&self, owner: Owner) {
        let _owner = owner;
    }

    /// A process has died; see [`Device::repair`].
    fn repair(&self, owner: Owner) {
        let _owner = owner;
    }

    /// All frames are free and nobody can get one: gives what is still held of the system's memory back.
    fn remove(&self, owner: Owner) -> Result<(), Errno>;
}

impl PagemapOps for Box<dyn Device> {
    fn name(&self) -> &str {
        Device::name(&**self)
    }

    fn page_free(&self, pfns: &[Pfn], owner: Owner) {
        Device::free(&**self, pfns, owner);
    }

    fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
        Some(&**self)
    }

    fn memory(&self) -> Option<&DeviceMemory> {
        Device::memory(&**self)
    }

    fn repair(&self, owner: Owner) {
        Device::repair(&**self, owner);
    }

    fn remove(&self, owner: Owner) -> Result<(), Errno> {
        Device::remove(&**self, owner)
    }
}

/// A pagemap's driver, seen as a [`Device`]: of memory that does not move it refuses every page.
pub struct Driver(pub(crate) Box<dyn PagemapOps>);

impl Driver {
    /// The driver as what it is.
    pub fn ops(&self) -> &dyn PagemapOps {
        &*self.0
    }
}

impl Deref for Driver {
    type Target = dyn Device;

    fn deref(&self) -> &Self::Target {
        self.0.migrate_to_ram().unwrap_or(&Unmovable)
    }
}

/// What memory that does not move says to whoever wants to move a page.
struct Unmovable;

impl Device for Unmovable {
    fn name(&self) -> &str {
        "memory that does not move"
    }

    fn frames(&self) -> u32 {
        0
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        ops.iter_mut().for_each(|op| op.result = Err(DeviceError::Full));
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        ops.iter_mut().for_each(|op| op.result = Err(DeviceError::Io(libc::EOPNOTSUPP)));
    }

    fn sum(&self, _pfn: Pfn) -> Sum {
        Sum::default()
    }

    fn free(&self, _pfns: &[Pfn], _owner: Owner) {}

    fn usage(&self) -> Usage {
        Usage::default()
    }
}
