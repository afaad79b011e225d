//! `PAGEMAP_SCAN` on `/proc/self/pagemap`: which pages of a range are there.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::ioctl::ioctl;

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// What [`PageScan::kinds`] tells of a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// In the kernel's swap.
    pub swapped: bool,
    /// The kernel's page of zeros.
    pub zero: bool,
    /// Mapped as part of a huge page.
    pub huge: bool,
}
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<ScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16;

/// The page map of this process.
#[derive(Debug)]
pub struct PageScan {
    fd: OwnedFd,
}

impl PageScan {
    /// Opens it.
    pub fn open() -> rustix::io::Result<Self> {
        let fd = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { fd: super::move_high(fd) })
    }

    /// The descriptor's number.
    pub fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Calls `f` with each run `[start, end)` of pages that are in DRAM or in the kernel's swap.
    pub fn present(
        &self,
        start: usize,
        end: usize,
        mut f: impl FnMut(usize, usize),
    ) -> rustix::io::Result<()> {
        let mut at = start;
        while at < end {
            let mut found = [Region::default(); 32];
            let (n, walked) = self.scan(at, end, &mut found)?;
            for r in &found[..n] {
                f(r.start as usize, r.end as usize);
            }
            if walked <= at {
                break;
            }
            at = walked;
        }
        Ok(())
    }

    /// As [`PageScan::present`], and says of what kind they are: each run is of one.
    pub fn kinds(
        &self,
        start: usize,
        end: usize,
        mut f: impl FnMut(usize, usize, Kind),
    ) -> rustix::io::Result<()> {
        let mut at = start;
        while at < end {
            let mut found = [Region::default(); 64];
            let all = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE;
            let (n, walked) = self.scan_for(at, end, &mut found, all)?;
            for r in &found[..n] {
                let has = |c: u64| r.categories & c != 0;
                let kind = Kind {
                    swapped: has(PAGE_IS_SWAPPED),
                    zero: has(PAGE_IS_PFNZERO),
                    huge: has(PAGE_IS_HUGE),
                };
                f(r.start as usize, r.end as usize, kind);
            }
            if walked <= at {
                break;
            }
            at = walked;
        }
        Ok(())
    }

    /// How many pages of `[start, end)` are there and are not the kernel's page of zeros.
    pub fn count_own(&self, start: usize, end: usize) -> rustix::io::Result<u64> {
        let mut n = 0;
        self.kinds(start, end, |s, e, kind| {
            if !kind.zero && !kind.swapped {
                n += ((e - s) / crate::PAGE_SIZE) as u64;
            }
        })?;
        Ok(n)
    }

    /// The first page of `[start, end)` that is not there.
    pub fn first_absent(&self, start: usize, end: usize) -> Option<usize> {
        let mut next = start;
        let _unknown = self.present(start, end, |s, e| {
            if s == next {
                next = e;
            }
        });
        (next < end).then_some(next)
    }

    /// The first page of `[start, end)` that is there.
    pub fn first_present(&self, start: usize, end: usize) -> rustix::io::Result<Option<usize>> {
        let mut found = [Region::default(); 1];
        let (n, _) = self.scan(start, end, &mut found)?;
        Ok((n > 0).then_some(found[0].start as usize))
    }

    /// The first runs of pages that are there, and up to where was looked.
    fn scan(&self, start: usize, end: usize, found: &mut [Region]) -> rustix::io::Result<(usize, usize)> {
        self.scan_for(start, end, found, PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
    }

    /// The same, with what `tell` names told apart.
    fn scan_for(
        &self,
        start: usize,
        end: usize,
        found: &mut [Region],
        tell: u64,
    ) -> rustix::io::Result<(usize, usize)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: start as u64,
            end: end as u64,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: tell,
            ..ScanArg::default()
        };
        // SAFETY: the structure is the one this ioctl takes; it writes at most `vec_len` regions to `found`.
        let n = unsafe { ioctl(self.fd.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg as usize)? };
        Ok((n, arg.walk_end as usize))
    }

    /// How many pages of `[start, end)` are there.
    pub fn count(&self, start: usize, end: usize) -> rustix::io::Result<u64> {
        let mut n = 0;
        self.present(start, end, |s, e| n += ((e - s) / crate::PAGE_SIZE) as u64)?;
        Ok(n)
    }
}
