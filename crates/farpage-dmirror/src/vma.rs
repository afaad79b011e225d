//! The process's mappings.

use rustix::io::Errno;

/// A mapping, or the part of it that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// There is a file behind it.
    pub file: bool,
    /// Offset in the file.
    pub offset: u64,
    /// What the kernel calls it; a path, or a name in brackets, or nothing.
    pub name: String,
}

impl Vma {
    /// Bytes of the pages that it consists of: of hugetlbfs, more than a page.
    pub fn page_size(&self) -> usize {
        let huge = self.name.starts_with("/anon_hugepage") || self.file && on_hugetlbfs(&self.name);
        // The kernel's own word where it gives one (`PROCMAP_QUERY`, Linux 6.11).
        match query_page_size(self.start) {
            Some(size) => size,
            None if huge => 2 << 20,
            None => farpage::PAGE_SIZE,
        }
    }

    /// Kinds that no page of is ever migrated: huge pages of hugetlbfs, mappings of devices, the kernel's own, the
    /// manager's.
    pub fn is_special(&self) -> bool {
        farpage_preload::is_own(self.start)
            || self.name.starts_with("[v")
            || self.name.starts_with("/memfd:hmm_dmirror")
            || self.page_size() > farpage::PAGE_SIZE
    }

    /// Private anonymous memory.
    pub fn is_anonymous(&self) -> bool {
        !self.shared && !self.file && !self.is_special()
    }
}

/// The mappings within `[start, end)`, cut at its edges, in order; holes are left out.
pub fn find(start: usize, end: usize) -> Result<Vec<Vma>, Errno> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|e| Errno::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO)))?;
    Ok(maps.lines().filter_map(|line| parse(line, start, end)).collect())
}

fn parse(line: &str, start: usize, end: usize) -> Option<Vma> {
    let mut words = line.splitn(6, ' ');
    let (s, e) = words.next()?.split_once('-')?;
    let (s, e) = (usize::from_str_radix(s, 16).ok()?, usize::from_str_radix(e, 16).ok()?);
    if e <= start || s >= end {
        return None;
    }
    let flags = words.next()?.as_bytes();
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let (_device, inode) = (words.next()?, words.next()?);
    let name = words.next().unwrap_or("").trim_start();
    let cut = start.saturating_sub(s) as u64;
    Some(Vma {
        start: s.max(start),
        end: e.min(end),
        read: flags.first() == Some(&b'r'),
        write: flags.get(1) == Some(&b'w'),
        exec: flags.get(2) == Some(&b'x'),
        shared: flags.get(3) == Some(&b's'),
        file: inode != "0",
        offset: offset + cut,
        name: name.to_owned(),
    })
}

/// The mappings of all of `[start, end)`, each readable.
///
/// # Errors
/// `missing` where there is a hole or one may not be read.
pub fn readable(start: usize, end: usize, missing: Errno) -> Result<Vec<Vma>, Errno> {
    let vmas = find(start, end)?;
    let mut at = start;
    for v in &vmas {
        if v.start > at || !v.read {
            return Err(missing);
        }
        at = v.end;
    }
    if at < end { Err(missing) } else { Ok(vmas) }
}

fn on_hugetlbfs(path: &str) -> bool {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type == HUGETLBFS_MAGIC)
}

fn query_page_size(addr: usize) -> Option<usize> {
    farpage::sys::Mappings::open().ok()?.at(addr)?.page_size
}
