//! Farpage: pages of a program's address space that live on *devices* (compressed RAM, files, …) and
//! move to DRAM on a page fault or on request.
//!
//! Every page of every memory type obeys one lifetime rule: **a reference count of 0 means free**.
//! The rooms, from the bottom: [`sys`] (the kernel's ABI), [`frame`] (counts), [`pagemap`] and [`device`] (where
//! pages live), [`domain`] (what a process tree shares), [`fault`], [`reclaim`], [`migrate`] and [`space`] (the manager of one
//! address space), [`dax`] (files that are memory).
#![warn(missing_docs)]

pub mod frame;

// Under `--cfg loom` only the frame table is built: it is what loom checks (tests/loom_frame.rs).
#[cfg(not(loom))]
pub mod dax;
#[cfg(not(loom))]
pub mod device;
#[cfg(not(loom))]
pub mod domain;
#[cfg(not(loom))]
pub mod fault;
#[cfg(not(loom))]
pub mod migrate;
#[cfg(not(loom))]
pub mod pagemap;
#[cfg(not(loom))]
pub mod reclaim;
#[cfg(not(loom))]
pub mod region;
#[cfg(not(loom))]
pub mod size;
#[cfg(not(loom))]
pub mod space;
#[cfg(not(loom))]
pub mod sys;

#[cfg(all(test, shuttle))]
mod models;

#[cfg(not(loom))]
pub use domain::{BuildError, Builder, Domain};
#[cfg(not(loom))]
pub use migrate::{MigrateReport, Outcome, Refusal, Target};
#[cfg(not(loom))]
pub use region::{Adopted, Region, RegionError};
#[cfg(not(loom))]
pub use space::Running;
#[cfg(not(loom))]
pub use space::pin::{Pin, PinError, PinnedRange};

/// The guide's examples are run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/library.md")]
struct Guide;

/// Bytes of a page; farpage works on base pages only.
pub const PAGE_SIZE: usize = 4096;

/// One page of bytes, aligned as the kernel aligns pages (O_DIRECT needs it).
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u8; PAGE_SIZE]);

impl Page {
    /// Fills it with one 32-bit value.
    pub fn fill(&mut self, value: u32) {
        self.0.chunks_exact_mut(4).for_each(|w| w.copy_from_slice(&value.to_ne_bytes()));
    }
}
