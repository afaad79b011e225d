//! What a range of device memory is to the CPU, and what its driver does for it: the only place where types differ.

use std::ops::Deref;

use rustix::io::Errno;

use super::memory::DeviceMemory;
use super::{Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};

/// How the CPU reaches a device's pages, and whether they move (Linux: `enum memory_type`).
///
/// See the example of [`MemorySpec`](super::memory::MemorySpec).
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
///
/// ```
/// use farpage::device::{Device, Owner, PagemapOps, Pfn};
/// use farpage::pagemap::{DriverId, HolderKind, MemoryType, Pagemap, Registration, SharedArea};
///
/// /// Memory that only its driver reaches: it hands out places.
/// struct Places;
///
/// impl PagemapOps for Places {
///     fn name(&self) -> &str {
///         "places"
///     }
///     fn frames(&self) -> u32 {
///         64
///     }
///     fn page_free(&self, pfns: &[Pfn], _: Owner) {
///         println!("free again: {pfns:?}");
///     }
///     fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
///         None // they do not move
///     }
///     fn stuck(&self, owner: Owner) {
///         println!("{owner} waits for somebody who may be dead");
///     }
///     fn repair(&self, owner: Owner) {
///         println!("{owner} says that a process has died");
///     }
///     fn remove(&self, _: Owner) -> Result<(), rustix::io::Errno> {
///         Ok(()) // nothing is left to be given back
///     }
/// }
///
/// const ME: Owner = 1;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(64))?;
/// let (memory_type, ranges) = (MemoryType::FsDax, vec![0..64; 1]);
/// let what = Registration { id: 0, memory_type, driver: DriverId(7), ranges, ops: Box::new(Places) };
/// let map = Pagemap::register(what, counts, true)?;
/// let hold = map.alloc_held(ME, HolderKind::Driver, 8, 8)?;
/// assert_eq!((map.used(), map.driver), (8, DriverId(7)));
/// drop(hold); // `page_free`, once for each
/// assert_eq!(map.used(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// ```
/// let domain = farpage::Domain::builder().dram("8M").device("mem:4M").device("generic:memfd:1M").build()?;
/// let device = &domain.pagemap(0).device;
/// assert_eq!(device.ops().name(), "mem:4M");
/// assert_eq!((device.frames(), device.usage().used), (1024, 0));
///
/// // What a device need not have: `mem` has pages as they are, at addresses, in the domain's memory.
/// assert!(device.is_memory() && device.address_of(1023).is_some());
/// assert!(device.memory().is_none() && domain.pagemap(1).device.memory().is_some());
/// device.soon(&mut [1, 2, 3].into_iter()); // a hint
/// assert_eq!(device.shrunk(512, 1024), 0, "of what is behind free frames nothing was used");
/// device.repair(1); // there is nothing that a dead process had half changed
/// device.remove(1)?; // nothing to give back
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
