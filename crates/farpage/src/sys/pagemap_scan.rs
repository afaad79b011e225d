//! `PAGEMAP_SCAN` on `/proc/self/pagemap`: which pages of a range are there.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

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
        Ok(Self { fd })
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

    /// The first page of `[start, end)` that is there.
    pub fn first_present(&self, start: usize, end: usize) -> rustix::io::Result<Option<usize>> {
        let mut found = [Region::default(); 1];
        let (n, _) = self.scan(start, end, &mut found)?;
        Ok((n > 0).then_some(found[0].start as usize))
    }

    /// The first runs of pages that are there, and up to where was looked.
    fn scan(&self, start: usize, end: usize, found: &mut [Region]) -> rustix::io::Result<(usize, usize)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: start as u64,
            end: end as u64,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..ScanArg::default()
        };
        // SAFETY: the structure is the one this ioctl takes; it writes at most `vec_len` regions to `found`.
        let n = unsafe { libc::ioctl(self.fd.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
        if n < 0 {
            let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            return Err(rustix::io::Errno::from_raw_os_error(e));
        }
        Ok((n as usize, arg.walk_end as usize))
    }

    /// How many pages of `[start, end)` are there.
    pub fn count(&self, start: usize, end: usize) -> rustix::io::Result<u64> {
        let mut n = 0;
        self.present(start, end, |s, e| n += ((e - s) / crate::PAGE_SIZE) as u64)?;
        Ok(n)
    }
}
