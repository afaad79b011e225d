//! Memory that is larger than DRAM, from an ordinary Linux process: pages live in DRAM as far as a budget goes, and on
//! *devices* beyond it (compressed RAM, a file on NVMe, memory of another kind, a type of one's own). They come back on a
//! page fault or on request. DAX files and device-dax nodes are used by the same rules.
//!
//! ```
//! use farpage::{Domain, Pin, Target};
//!
//! // A domain has a budget of DRAM, and devices in order of preference.
//! let domain = Domain::builder().dram("8M").device("ram:64M").build()?;
//! // A space manages memory in it. Inline: whoever touches a page that is away brings it in himself.
//! let space = domain.start_inline()?;
//!
//! // A region is a slice. This one is twice as large as the DRAM that it may have.
//! let mut v = space.region_from_fn(2 << 20, |i| i as u64)?;
//! v[7] += 1;
//! assert_eq!(v.iter().sum::<u64>(), (0..2 << 20).sum::<u64>() + 1);
//!
//! // What a system call or other hardware is given is pinned: it stays in DRAM, at its address.
//! let pin = space.pin(v.pages(..4096), Pin::Short, true)?;
//! assert_eq!(pin.addr(), v.as_ptr() as usize);
//! drop(pin);
//!
//! // Out of the way before somebody else needs the room; and back before it is needed.
//! let ram = space.domain.pagemaps[0].id;
//! space.migrate(v.pages(..65536), Target::Device(ram))?;
//! space.migrate(v.pages(..65536), Target::System)?;
//!
//! let stats = space.domain.stats();
//! assert!(stats.dram_peak <= 8 << 20 && stats.pages_out > 0);
//! // Every reference count equals the references that can be found.
//! assert!(space.domain.audit()?.is_right());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What to use
//!
//! | for | use |
//! |---|---|
//! | a budget and devices | [`Domain`], made by a [`Builder`] |
//! | the manager of this process's part | [`Running`], which derefs to [`Space`]: [`Domain::start`] (threads resolve faults) or [`Domain::start_inline`] |
//! | memory larger than DRAM | [`Region`]: an owned slice; [`Running::adopt`] for memory that another has mapped |
//! | pages that must stay where they are | [`Space::pin`], [`PinnedRange`] |
//! | moving pages now | [`Space::migrate`], [`Target`], [`MigrateReport`] |
//! | giving pages to a device until the CPU wants them | [`Space::exclusive`](space::Space::exclusive) |
//! | looking: where is each page, what was done, is it right | [`Space::snapshot`](space::Space::snapshot), [`Domain::stats`], [`Domain::audit`] |
//! | a place for pages of one's own | [`device::Device`]: six methods |
//! | memory of other kinds, used in place | [`device::memory::MemorySpec`], [`pagemap::Pagemap`] |
//! | files that are memory (DAX), device-dax | [`dax::DaxFile`], [`dax::DaxDevice`] |
//!
//! # The one rule
//!
//! Every page of every kind of memory has a reference count in shared memory, and **a count of 0 means free**. Whoever can reach a
//! page holds a reference: page entries, mappings, pins, clean copies, each process that shares it. A page moves, or is cut off
//! its file, only where all references are accounted for. Dropping the last runs one path, the same for all kinds.
//!
//! # What it needs, and its limits
//!
//! - Linux 6.8 or newer on x86-64 with pages of 4 KiB. Threaded spaces need full userfaultfd (root, `CAP_SYS_PTRACE`, or
//!   `vm.unprivileged_userfaultfd=1`); inline spaces and DAX need no privileges. `farpage doctor` says what is missing.
//! - A system call that meets a page that is away waits in a threaded space, and fails with EFAULT in an inline one: pin first.
//! - A budget of at least 4 MiB, at most 16 devices; a region's elements are `Copy` and may be zeros (`bytemuck::Zeroable`).
//! - A child that `fork` makes has none of the regions, mappings and pins, and makes its own. Other ways to start programs need nothing.
//! - There are no cargo features: what a machine lacks is said at run time, with the reason.
//!
//! Modules and items that other crates of this project use, and that promise nothing, are hidden from this documentation: they
//! can change in any release.
#![warn(missing_docs)]

// Hidden: rooms of the house that tests, benches and sister crates look into. They promise nothing to others.
#[doc(hidden)]
pub mod frame;

// Under `--cfg loom` only the frame table is built: it is what loom checks (tests/loom_frame.rs).
#[cfg(not(loom))]
pub mod dax;
#[cfg(not(loom))]
pub mod device;
#[cfg(not(loom))]
pub mod domain;
#[cfg(not(loom))]
#[doc(hidden)] // As `frame`.
pub mod fault;
#[cfg(not(loom))]
pub mod migrate;
#[cfg(not(loom))]
pub mod pagemap;
#[cfg(not(loom))]
#[doc(hidden)] // As `frame`.
pub mod reclaim;
#[cfg(not(loom))]
#[doc(hidden)] // All that is in it is re-exported below.
pub mod region;
#[cfg(not(loom))]
pub mod size;
#[cfg(not(loom))]
pub mod space;
#[cfg(not(loom))]
#[doc(hidden)] // As `frame`.
pub mod sys;

#[cfg(all(test, shuttle))]
mod models;

#[cfg(not(loom))]
#[doc(inline)]
pub use domain::{BuildError, Builder, Domain};
#[cfg(not(loom))]
#[doc(inline)]
pub use migrate::{MigrateReport, Outcome, Refusal, Target};
#[cfg(not(loom))]
#[doc(inline)]
pub use region::{Adopted, Region, RegionError};
#[cfg(not(loom))]
#[doc(inline)]
pub use space::pin::{Pin, PinError, PinnedRange};
#[cfg(not(loom))]
#[doc(inline)]
pub use space::{Running, Space};

/// The guide's examples are run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/library.md")]
struct Guide;

/// Bytes of a page; farpage works on base pages only.
pub const PAGE_SIZE: usize = 4096;

/// One page of bytes, aligned as the kernel aligns pages (O_DIRECT needs it).
///
/// ```
/// let mut page = farpage::Page([0; farpage::PAGE_SIZE]);
/// page.fill(0x0102_0304);
/// assert_eq!(page.0[..8], [4, 3, 2, 1, 4, 3, 2, 1], "little-endian machines");
/// ```
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u8; PAGE_SIZE]);

impl Page {
    /// Fills it with one 32-bit value.
    pub fn fill(&mut self, value: u32) {
        self.0.chunks_exact_mut(4).for_each(|w| w.copy_from_slice(&value.to_ne_bytes()));
    }
}
