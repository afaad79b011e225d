//! Which pages are on devices.

use super::Space;
use super::range::flag;
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::sys::BlockedSignals;

/// A page that is on a device and not in DRAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub struct OnDevice {
    /// Its address.
    pub addr: usize,
    /// The device.
    pub device: u8,
    /// The frame.
    pub frame: Pfn,
    /// References to the frame: more than one if another process has the page as well, since a fork.
    pub count: u32,
}

impl Space {
    /// The pages of `[start, end)` that are on devices, in the order of addresses.
    #[doc(hidden)]
    pub fn on_devices(&self, start: usize, end: usize) -> Vec<OnDevice> {
        let _signals = BlockedSignals::new();
        let world = self.world.read();
        let granules = world.ranges.granules(start, end).filter(|(f, ..)| f.granule.has(flag::ENTRIES));
        let pages = granules.flat_map(|(_, s, e)| (s..e).step_by(PAGE_SIZE));
        pages
            .filter_map(|addr| match self.entries.get(addr) {
                Entry::Away(device, frame) => {
                    let count = self.domain.pagemap(device).frames.count(frame);
                    Some(OnDevice { addr, device, frame, count })
                }
                _ => None,
            })
            .collect()
    }

    /// Whether a thread of this process is the manager's.
    #[doc(hidden)]
    pub fn is_manager_thread(&self, tid: u32) -> bool {
        self.faults.is_manager(tid)
    }
}
