//! Statistics of a domain.

use std::sync::atomic::Ordering;

use super::slot::COUNTERS;
use super::{Counter, Domain};

/// Counters of the whole tree since it began. Pages are 4 KiB; DRAM in bytes.
///
/// ```
/// let space = farpage::Domain::builder().dram("8M").device("ram:64M").build()?.start_inline()?;
/// let v = space.region_from_fn(2 << 20, |i| i as u64)?;
/// let stats = space.domain.stats();
/// assert_eq!(stats.dram_budget, 8 << 20);
/// assert!(stats.dram_used <= stats.dram_peak && stats.dram_peak <= stats.dram_budget);
/// assert!(stats.pages_out >= v.pages(..).len() as u64 / 4096 - 2048, "what does not fit has left");
/// let ram = &stats.devices[0];
/// assert!(ram.frames > 0 && ram.payload <= ram.used && ram.used <= ram.capacity);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Stats {
    /// Processes (address spaces: each `exec` begins one) that were managed.
    pub processes: u64,
    /// Address spaces that still held pages on devices when they ended, by whatever means: the launcher gave them back.
    pub reaped: u64,
    /// The budget.
    pub dram_budget: u64,
    /// The most that was charged at once.
    pub dram_peak: u64,
    /// What is charged now.
    pub dram_used: u64,
    /// Page faults that came to farpage.
    pub faults: u64,
    /// … for memory never touched before.
    pub faults_zero: u64,
    /// … for a page on a device.
    pub faults_device: u64,
    /// … for a page in a staging slot, on its way out.
    pub refaults_staged: u64,
    /// Pages that left DRAM.
    pub pages_out: u64,
    /// Pages that came back from a device.
    pub pages_in: u64,
    /// Of those that left: unchanged since they came, not written again.
    pub pages_clean: u64,
    /// Of those that left: one value repeated, took no frame.
    pub pages_same: u64,
    /// Of those that came back: before anyone asked.
    pub prefetched: u64,
    /// Pages left where they were because the kernel had them pinned.
    pub pinned_skips: u64,
    /// Pages left where they were because a call was writing to them, or to others of their granule.
    pub held_skips: u64,
    /// Stores that a device refused.
    pub store_errors: u64,
    /// Loads that failed or did not match their checksum.
    pub load_errors: u64,
    /// Pages that were lost to a load error: SIGBUS for who touches them.
    pub poisoned: u64,
    /// Pages charged beyond the budget because everything was full.
    pub over_budget: u64,
    /// Programs of the tree that could not be managed.
    pub unmanaged: u64,
    /// Processes seen to make calls that leave plain references to their pages with the kernel.
    pub plain_refs: u64,
    /// Whether frames are recycled (except in those processes).
    pub recycle: bool,
    /// Frames whose count is not 0 (after the tree has ended: must be 0).
    pub leaked_frames: u64,
    /// The devices.
    pub devices: Vec<DeviceStats>,
}

/// One device. Bytes.
///
/// Part of [`Stats`]: see the example of [`Stats`].
#[derive(Debug, Clone, serde::Serialize)]
pub struct DeviceStats {
    /// Its name.
    pub name: String,
    /// What it may use.
    pub capacity: u64,
    /// What it uses.
    pub used: u64,
    /// The most that it has used.
    pub peak: u64,
    /// What its pages need at least.
    pub payload: u64,
    /// Frames in use.
    pub frames: u64,
}

impl Domain {
    /// The counters so far.
    pub fn stats(&self) -> Stats {
        let mut sum: [u64; COUNTERS] = std::array::from_fn(|i| self.words.past[i].load(Ordering::Relaxed));
        for (_, slot) in self.slots() {
            sum.iter_mut().zip(&slot.counters).for_each(|(s, c)| *s += c.load(Ordering::Relaxed));
        }
        let page = crate::PAGE_SIZE as u64;
        let get = |c: Counter| sum[c as usize];
        Stats {
            processes: self.words.joined.load(Ordering::Relaxed),
            reaped: self.words.reaped.load(Ordering::Relaxed),
            dram_budget: self.config.dram,
            dram_peak: self.words.peak.load(Ordering::Relaxed) * page,
            dram_used: self.charged() * page,
            faults: get(Counter::Faults),
            faults_zero: get(Counter::FaultsZero),
            faults_device: get(Counter::FaultsDevice),
            refaults_staged: get(Counter::Refaults),
            pages_out: get(Counter::PagesOut),
            pages_in: get(Counter::PagesIn),
            pages_clean: get(Counter::PagesClean),
            pages_same: get(Counter::PagesSame),
            prefetched: get(Counter::Prefetched),
            pinned_skips: get(Counter::PinnedSkips),
            held_skips: get(Counter::HeldSkips),
            store_errors: get(Counter::StoreErrors),
            load_errors: get(Counter::LoadErrors),
            poisoned: get(Counter::Poisoned),
            over_budget: get(Counter::OverBudget),
            unmanaged: get(Counter::Unmanaged),
            plain_refs: get(Counter::PlainRefs),
            recycle: self.recycles(),
            leaked_frames: self.pagemaps.iter().map(|p| p.frames.used() as u64).sum(),
            devices: self
                .pagemaps
                .iter()
                .map(|p| {
                    let u = p.device.usage();
                    DeviceStats {
                        name: p.device.name().into(),
                        capacity: u.capacity,
                        used: u.used,
                        peak: u.peak,
                        payload: u.payload,
                        frames: p.frames.used() as u64,
                    }
                })
                .collect(),
        }
    }
}
