//! How much DRAM and how large devices: what `--dram auto` and devices without a size come to.
//!
//! The managed memory, the compressed pool of a `ram` device, page tables, page cache and metadata all lie
//! in the same control group, so `auto` divides what the group leaves:
//!
//! ```text
//! left    = three quarters of MemAvailable, or less if a group above this process leaves less:
//!           min over these groups of (limit - (usage - droppable page cache))
//! reserve = left / 6, at least 16M, at most 2G     page tables, page cache, metadata, the launcher
//! share   = left - reserve
//! --dram auto:  pool  = 2/5 of the share, divided among the `ram` devices without a size
//!               dram  = the share - pool - the sizes of the other `ram` devices
//! --dram SIZE:  pool  = the share - SIZE - the sizes of the other `ram` devices
//! ```
//!
//! So usually half of what is left becomes DRAM, a third the pool, a sixth the reserve. A `file` device
//! without a size may take half of what its file system has free, at most 8 times the machine's memory.

pub mod cgroup;
mod tmp;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use farpage::device::spec::Spec;

use crate::human::human;
pub use tmp::{candidates, temp_dir, unnamed};

/// The smallest `--dram`, in bytes: below it staging has no room.
pub const MIN_DRAM: u64 = 8 << 20;
/// The smallest `--min-size`, in bytes: a page.
pub const MIN_MIN_SIZE: u64 = 4096;
/// The smallest pool that a `ram` device gets when its size is left to farpage.
const MIN_POOL: u64 = 16 << 20;
const MIN_RESERVE: u64 = 16 << 20;
const MAX_RESERVE: u64 = 2 << 30;
const FILE_TIMES_MEMORY: u64 = 8;

/// `--dram`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dram {
    /// farpage decides.
    Auto,
    /// Bytes.
    Bytes(u64),
}

/// What the machine and its control groups offer, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`.
    pub available: u64,
    /// The tightest limit.
    pub limit: Option<cgroup::Limit>,
}

/// Why the memory or a device asked for cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// `--dram` below what works.
    #[error("--dram {} is too small: the smallest that works is {}", human(*.0), human(MIN_DRAM))]
    DramTooSmall(u64),
    /// `--dram` above what there is.
    #[error(
        "--dram {} is larger than this machine's memory of {}: choose less, or 'auto'",
        human(*asked), human(*total)
    )]
    DramTooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes the machine has.
        total: u64,
    },
    /// A `ram` device larger than the machine.
    #[error(
        "--device {device} is larger than this machine's memory of {}: choose less, or a file device",
        human(*total)
    )]
    PoolTooLarge {
        /// The specification.
        device: String,
        /// Bytes the machine has.
        total: u64,
    },
    /// `--min-size` below a page.
    #[error("--min-size {0} is too small: the smallest that works is 4K (one page)")]
    MinSizeTooSmall(u64),
    /// `auto` found too little.
    #[error(
        "only {} of memory is left here, too little for --dram auto: free some, raise the memory limit, \
         make the ram devices smaller, or give --dram (at least {})",
        human(*.0), human(MIN_DRAM)
    )]
    NothingLeft(u64),
    /// The directory of a file device.
    #[error("--device {device}: {source}: name an existing directory that you can write to")]
    Directory {
        /// The specification.
        device: String,
        /// Why.
        source: io::Error,
    },
    /// No `/proc`.
    #[error("cannot read {file}: farpage needs /proc to be mounted")]
    NoProc {
        /// The file.
        file: &'static str,
    },
}

/// What the devices and the DRAM come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of DRAM.
    pub dram: u64,
    /// The devices in order of preference, with sizes, but for memory that has one.
    pub devices: Vec<Spec>,
}

/// Reads what there is. `root` is `/`, except in tests.
pub fn memory(root: &Path) -> Result<Memory, BudgetError> {
    let no_proc = BudgetError::NoProc { file: "/proc/meminfo" };
    let Ok(text) = fs::read_to_string(root.join("proc/meminfo")) else { return Err(no_proc) };
    let field = |name: &str| {
        let kib: u64 =
            text.lines().find_map(|l| l.strip_prefix(name))?.trim().strip_suffix(" kB")?.parse().ok()?;
        kib.checked_mul(1024)
    };
    let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
        return Err(no_proc);
    };
    Ok(Memory { total, available, limit: cgroup::limit(root) })
}

impl Memory {
    /// Bytes that farpage may plan with, its reserve included.
    pub fn left(&self) -> u64 {
        let share = self.available / 4 * 3;
        self.limit.as_ref().map_or(share, |limit| limit.left.min(share))
    }

    /// What `left` leaves after the reserve.
    fn share(&self) -> u64 {
        let left = self.left();
        left.saturating_sub((left / 6).clamp(MIN_RESERVE, MAX_RESERVE))
    }
}

/// Checks what was asked for and fills in what was not.
pub fn plan(dram: Dram, devices: &[Spec], memory: &Memory) -> Result<Plan, BudgetError> {
    check_sizes(dram, devices, memory)?;
    let pools = || devices.iter().filter(|d| in_memory(d));
    let fixed = pools().filter_map(Spec::size).fold(0, u64::saturating_add);
    let open = pools().filter(|d| d.size().is_none()).count() as u64;
    let share = memory.share();

    let (dram, pool) = match dram {
        Dram::Auto => {
            let pool = if open == 0 { 0 } else { (share / 5 * 2).max(MIN_POOL * open) };
            let dram = share.saturating_sub(fixed).saturating_sub(pool);
            if dram < MIN_DRAM {
                return Err(BudgetError::NothingLeft(memory.left()));
            }
            (dram, pool)
        }
        Dram::Bytes(bytes) => (bytes, share.saturating_sub(fixed).saturating_sub(bytes)),
    };
    let each = (pool / open.max(1)).max(MIN_POOL);
    let devices = devices
        .iter()
        .map(|device| {
            let open = match device.base() {
                // What a device-dax node or a file has.
                Spec::Memory(_) => return Ok(device.clone()),
                Spec::File { dir, .. } => file_size(dir, memory)
                    .map_err(|source| BudgetError::Directory { device: device.to_string(), source })?,
                _ => each,
            };
            Ok(device.clone().with_size(device.size().unwrap_or(open >> 20 << 20)))
        })
        .collect::<Result<_, BudgetError>>()?;
    Ok(Plan { dram: dram >> 12 << 12, devices })
}

/// Whether the device's pages lie in the machine's ordinary memory.
fn in_memory(device: &Spec) -> bool {
    match device.base() {
        Spec::Ram { .. } | Spec::Mem { .. } => true,
        Spec::Memory(memory) => memory.takes_memory(),
        Spec::File { .. } | Spec::Inject { .. } => false,
    }
}

/// What a `file` device in `dir` gets when its size is left to farpage. Fails if it cannot have a file there.
fn file_size(dir: &Path, memory: &Memory) -> io::Result<u64> {
    tmp::check_writable(dir)?;
    Ok((tmp::free_space(dir)? / 2).min(memory.total.saturating_mul(FILE_TIMES_MEMORY)))
}

fn check_sizes(dram: Dram, devices: &[Spec], memory: &Memory) -> Result<(), BudgetError> {
    if let Dram::Bytes(bytes) = dram {
        if bytes < MIN_DRAM {
            return Err(BudgetError::DramTooSmall(bytes));
        }
        if bytes > memory.total {
            return Err(BudgetError::DramTooLarge { asked: bytes, total: memory.total });
        }
    }
    for device in devices {
        let large = device.size().is_some_and(|size| size > memory.total);
        if large && in_memory(device) {
            return Err(BudgetError::PoolTooLarge { device: device.to_string(), total: memory.total });
        }
    }
    Ok(())
}

/// The devices when none are named: `ram`, then a file in the temporary directory, if there is one on a disk.
pub fn default_devices(temp: Option<PathBuf>) -> Vec<Spec> {
    let file = temp.map(|dir| Spec::File { dir, size: None });
    [Some(Spec::Ram { size: None }), file].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests;
