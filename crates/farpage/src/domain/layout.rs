//! The domain's segment: one sparse memfd that every process of the tree maps.
//!
//! ```text
//! 0            header: magic, length of the configuration, the configuration as JSON
//! SLOTS        4096 process slots of 1 KiB
//! DEVICES      per device: frame table, then the device's own area
//! WINDOWS      per process slot a window of page entries: 8 bytes for every page of the address space
//! ```
//!
//! Nothing of it takes memory before it is written.

/// "farpage1".
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"farpage1");
/// Bytes of the header.
pub(super) const HEADER: usize = 64 << 10;
/// Process slots; slot 0 is nobody.
pub const SLOT_COUNT: usize = 4096;
/// Bytes of a process slot.
pub(super) const SLOT_SIZE: usize = 1024;
/// Where the devices' areas begin.
pub(super) const DEVICES: usize = HEADER + SLOT_COUNT * SLOT_SIZE;
/// Highest address of a program, exclusive: 47 bits, what the kernel hands out unless asked for more.
pub const ADDRESS_LIMIT: usize = 1 << 47;
/// Bytes of one process's window of page entries.
pub const WINDOW: usize = ADDRESS_LIMIT / crate::PAGE_SIZE * 8;
/// Where the windows begin in the file.
pub(super) const WINDOWS: u64 = 1 << 50;

/// Where the window of `slot` begins in the file.
pub(super) fn window_offset(slot: u16) -> u64 {
    WINDOWS + u64::from(slot) * WINDOW as u64
}

/// Length of the file.
pub(super) const FILE_LEN: u64 = WINDOWS + SLOT_COUNT as u64 * WINDOW as u64;
