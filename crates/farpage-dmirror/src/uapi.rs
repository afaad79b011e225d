//! What programs know of the devices: numbers, structures, paths (KERNEL.md, "The HMM test device").

use std::ffi::CStr;

use crate::user;
use rustix::io::Errno;

/// Devices 0 and 1 are private, 2 and 3 coherent.
pub const MINORS: u8 = 4;

/// Whether a device's memory is reached by the CPU in place.
pub fn is_coherent(minor: u8) -> bool {
    minor >= 2
}

/// A file that programs may open and that is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// `/dev/hmm_dmirrorN`.
    Mirror(u8),
    /// `/sys/kernel/debug/gup_test`.
    GupTest,
}

impl Node {
    /// The node that an absolute path names.
    pub fn from_path(path: &CStr) -> Option<Self> {
        let path = path.to_bytes();
        if path == b"/sys/kernel/debug/gup_test" {
            return Some(Self::GupTest);
        }
        match path.strip_prefix(b"/dev/hmm_dmirror")? {
            [n @ b'0'..=b'9'] if n - b'0' < MINORS => Some(Self::Mirror(n - b'0')),
            _ => None,
        }
    }

    /// The name of its descriptors' file.
    pub fn name(self) -> String {
        match self {
            Self::Mirror(minor) => format!("hmm_dmirror{minor}"),
            Self::GupTest => "gup_test".to_owned(),
        }
    }
}

/// `_IOWR('H', nr, 40 bytes)` and its relatives.
const fn ioc(dir: u64, kind: u8, nr: u8, size: usize) -> u64 {
    dir << 30 | (size as u64) << 16 | (kind as u64) << 8 | nr as u64
}

/// Bytes of [`Command`].
const COMMAND: usize = 40;

/// What a mirror is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Request {
    Read,
    Write,
    MigrateToDevice,
    MigrateToSystem,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Flags,
}

impl Request {
    /// The request with this ioctl number.
    pub fn from_number(n: u64) -> Option<Self> {
        use Request::*;
        let all = [
            Read,
            Write,
            MigrateToDevice,
            MigrateToSystem,
            Snapshot,
            Exclusive,
            CheckExclusive,
            Release,
            Flags,
        ];
        all.into_iter().enumerate().find(|&(nr, _)| n == ioc(3, b'H', nr as u8, COMMAND)).map(|(_, r)| r)
    }
}

/// The argument of every [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    /// Where the device works on the process's memory.
    pub addr: u64,
    /// The process's buffer for what the device read, or is to write.
    pub ptr: u64,
    /// Pages.
    pub npages: u64,
    /// Out: pages done.
    pub cpages: u64,
    /// Out: how often the device had to fault pages in.
    pub faults: u64,
}

impl Command {
    /// Fetches it from the process.
    pub fn fetch(at: usize) -> Result<Self, Errno> {
        let mut raw = [0; COMMAND];
        user::read(at, &mut raw)?;
        let word = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| raw[i * 8 + k]));
        Ok(Self { addr: word(0), ptr: word(1), npages: word(2), cpages: word(3), faults: word(4) })
    }

    /// Gives it back.
    pub fn give_back(&self, at: usize) -> Result<(), Errno> {
        let words = [self.addr, self.ptr, self.npages, self.cpages, self.faults];
        let raw: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        user::write(at, &raw)
    }

    /// The range `[start, end)` it works on: aligned, not empty, not past the end of the address space.
    pub fn range(&self) -> Result<(usize, usize), Errno> {
        let page = farpage::PAGE_SIZE as u64;
        let bytes = self.npages.checked_mul(page).ok_or(Errno::INVAL)?;
        let end = self.addr.checked_add(bytes).ok_or(Errno::INVAL)?;
        if !self.addr.is_multiple_of(page) || bytes == 0 {
            return Err(Errno::INVAL);
        }
        Ok((self.addr as usize, end as usize))
    }
}

/// What a snapshot says of a page: one of these, or-ed with a type and a size.
pub mod prot {
    /// No mapping, or none that may be read.
    pub const ERROR: u8 = 0xFF;
    /// Nothing that this device could reach without a fault.
    pub const NONE: u8 = 0x00;
    /// May be read.
    pub const READ: u8 = 0x01;
    /// May be written.
    pub const WRITE: u8 = 0x02;
    /// Mapped as a 2 MiB page.
    pub const PMD: u8 = 0x04;
    /// Mapped as a 1 GiB page.
    pub const PUD: u8 = 0x08;
    /// The shared zero page.
    pub const ZERO: u8 = 0x10;
    /// On this private device.
    pub const PRIVATE_LOCAL: u8 = 0x20;
    /// On this coherent device.
    pub const COHERENT_LOCAL: u8 = 0x40;
    /// On another coherent device.
    pub const COHERENT_REMOTE: u8 = 0x50;
}

/// Of [`Request::Flags`]: the next huge allocation fails.
pub const FLAG_FAIL_ALLOC: u64 = 1;

/// What `gup_test` is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GupRequest {
    GetFast,
    PinFast,
    PinLongTerm,
    Get,
    Pin,
    Dump,
    Start,
    Stop,
    Read,
}

impl GupRequest {
    /// The request with this ioctl number.
    pub fn from_number(n: u64) -> Option<Self> {
        use GupRequest::*;
        let tests = [GetFast, PinFast, PinLongTerm, Get, Pin, Dump];
        let test = tests.into_iter().zip(1u8..).find(|&(_, nr)| n == ioc(3, b'g', nr, GUP_TEST));
        test.map(|(r, _)| r).or(match n {
            0x4018_6707 => Some(Start),
            0x6708 => Some(Stop),
            0x4008_6709 => Some(Read),
            _ => None,
        })
    }
}

/// Bytes of `struct gup_test`.
pub const GUP_TEST: usize = 80;
