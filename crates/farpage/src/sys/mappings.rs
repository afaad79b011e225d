//! One of the process's mappings by address, without reading all of `/proc/self/maps`.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::ioctl::ioctl;

/// The argument of `PROCMAP_QUERY` (`linux/fs.h`, since Linux 6.11).
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const COVERING_OR_NEXT: u64 = 0x10;
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const SHARED: u64 = 8;
/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u64 = (3 << 30) | ((size_of::<Query>() as u64) << 16) | ((b'f' as u64) << 8) | 17;

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// Shared with whoever maps the same.
    pub shared: bool,
    /// Of no file.
    pub anonymous: bool,
    /// Bytes of its pages (huge ones on hugetlbfs), where the kernel can be asked.
    pub page_size: Option<usize>,
}

/// The mappings of this process.
pub struct Mappings {
    fd: OwnedFd,
    /// Where the kernel cannot be asked: all of them, as they were.
    all: Option<Vec<Mapping>>,
}

impl Mappings {
    /// Opens them. To be used at once, not kept: they change, and a forked child has others.
    pub fn open() -> rustix::io::Result<Self> {
        let fd = rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut mappings = Self { fd, all: None };
        if let Err(rustix::io::Errno::NOTTY) = mappings.ask(0) {
            let text = std::fs::read_to_string("/proc/self/maps").map_err(|_| rustix::io::Errno::IO)?;
            mappings.all = Some(text.lines().filter_map(parse).collect());
        }
        Ok(mappings)
    }

    /// The mapping that holds `addr`, or else the next one above.
    pub fn from(&self, addr: usize) -> Option<Mapping> {
        match &self.all {
            Some(all) => all.iter().find(|m| addr < m.end).copied(),
            None => self.ask(addr).ok(),
        }
    }

    /// The mapping that holds `addr`.
    pub fn at(&self, addr: usize) -> Option<Mapping> {
        self.from(addr).filter(|m| m.start <= addr)
    }

    fn ask(&self, addr: usize) -> rustix::io::Result<Mapping> {
        let size = size_of::<Query>() as u64;
        let mut q = Query { size, flags: COVERING_OR_NEXT, addr: addr as u64, ..Query::default() };
        // SAFETY: the structure is the one this ioctl takes; without room for a name or a build number it writes nothing else.
        unsafe { ioctl(self.fd.as_raw_fd(), PROCMAP_QUERY, &raw mut q as usize)? };
        let has = |flag: u64| q.vma_flags & flag != 0;
        Ok(Mapping {
            start: q.start as usize,
            end: q.end as usize,
            read: has(READABLE),
            write: has(WRITABLE),
            shared: has(SHARED),
            anonymous: q.inode == 0,
            page_size: Some(q.page_size as usize),
        })
    }
}

fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    let perms = words.next()?.as_bytes();
    let inode = words.nth(2)?;
    Some(Mapping {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        read: perms.first() == Some(&b'r'),
        write: perms.get(1) == Some(&b'w'),
        shared: perms.get(3) == Some(&b's'),
        anonymous: inode == "0",
        page_size: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_and_reading_agree() {
        let asked = Mappings::open().unwrap();
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let read = Mappings {
            fd: asked.fd.try_clone().unwrap(),
            all: Some(text.lines().filter_map(parse).collect()),
        };
        let here = asking_and_reading_agree as fn() as usize;
        let code = asked.at(here).unwrap();
        assert!(code.start <= here && here < code.end && code.read && !code.write && !code.shared);
        assert!(!code.anonymous);
        assert_eq!((read.at(here), code.page_size), (Some(Mapping { page_size: None, ..code }), Some(4096)));
        assert_eq!(asked.at(4096), None);
        assert_eq!(asked.from(4096).map(|m| m.start), read.from(4096).map(|m| m.start));
    }
}
