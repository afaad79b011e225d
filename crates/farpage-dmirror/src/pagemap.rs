//! `/proc/self/pagemap`: reading it, and serving it to the program with what is on a device as "swapped, not present".

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use farpage::PAGE_SIZE;
use libc::{c_int, off_t};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::pages;

/// The page is in DRAM.
pub const PRESENT: u64 = 1 << 63;
/// It is swapped out.
pub const SWAP: u64 = 1 << 62;
/// It is a file's, or shared anonymous memory.
pub const FILE: u64 = 1 << 61;
/// Nobody else maps it.
pub const EXCLUSIVE: u64 = 1 << 56;
/// Its frame's number; 0 without CAP_SYS_ADMIN.
pub const PFN: u64 = (1 << 55) - 1;

/// What `PAGEMAP_SCAN` says of a page.
pub const IS_PFNZERO: u64 = 1 << 5;
/// It is part of a huge page that is mapped as one.
pub const IS_HUGE: u64 = 1 << 6;
const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;

/// The page map.
pub struct PageMap(OwnedFd);

impl PageMap {
    /// Opens it.
    pub fn open() -> Result<Self, Errno> {
        rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(Self)
    }

    /// One word for each page of `[start, end)`.
    pub fn words(&self, start: usize, end: usize) -> Result<Vec<u64>, Errno> {
        let n = (end - start) / PAGE_SIZE;
        let mut raw = vec![0u8; n * 8];
        let mut at = 0;
        while at < raw.len() {
            let n = rustix::io::pread(&self.0, &mut raw[at..], (start / PAGE_SIZE * 8 + at) as u64)?;
            if n == 0 {
                return Err(Errno::FAULT);
            }
            at += n;
        }
        Ok(raw.chunks_exact(8).map(|w| u64::from_ne_bytes(std::array::from_fn(|i| w[i]))).collect())
    }

    /// Calls `f` for each run `[start, end)` of pages of one kind that are there, with what they are.
    pub fn kinds(&self, start: usize, end: usize, mut f: impl FnMut(usize, usize, u64)) -> Result<(), Errno> {
        let mut at = start;
        while at < end {
            let mut found = [[0u64; 3]; 64];
            let any = IS_FILE | IS_PRESENT | IS_SWAPPED | IS_PFNZERO | IS_HUGE;
            let mut arg = [
                96,
                0,
                at as u64,
                end as u64,
                0,
                found.as_mut_ptr() as u64,
                found.len() as u64,
                0,
                0,
                0,
                IS_PRESENT,
                any,
            ];
            // SAFETY: twelve words are what this ioctl takes; it writes at most so many regions of three words.
            let n =
                unsafe { libc::syscall(libc::SYS_ioctl, self.0.as_raw_fd(), PAGEMAP_SCAN, arg.as_mut_ptr()) };
            if n < 0 {
                let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
                return Err(Errno::from_raw_os_error(e));
            }
            for r in &found[..n as usize] {
                f(r[0] as usize, r[1] as usize, r[2]);
            }
            if arg[4] as usize <= at {
                break;
            }
            at = arg[4] as usize;
        }
        Ok(())
    }
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
pub const PAGEMAP_SCAN: u64 = 3 << 30 | 96 << 16 | (b'f' as u64) << 8 | 16;

/// The program has opened a page map.
static OPENED: AtomicBool = AtomicBool::new(false);

/// The program opens this file: if it is a page map, what is read from it is looked at from now on.
pub fn opens(path: &[u8]) {
    if path.starts_with(b"/proc/") && path.ends_with(b"/pagemap") {
        OPENED.store(true, Ordering::Relaxed);
    }
}

/// Whether a descriptor is this process's page map.
fn is_ours(fd: c_int) -> bool {
    if !OPENED.load(Ordering::Relaxed) || farpage_preload::is_manager() {
        return false;
    }
    let Ok(path) = rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new()) else { return false };
    let mine = format!("/proc/{}/", std::process::id());
    path.to_bytes().starts_with(mine.as_bytes()) && path.to_bytes().ends_with(b"/pagemap")
}

/// Bytes have been read from `fd`, from the offset `at` or the position: those that speak of pages on a device are set right.
pub fn has_read(fd: c_int, at: Option<off_t>, bytes: &mut [u8]) {
    if !is_ours(fd) {
        return;
    }
    let at = at.unwrap_or_else(|| {
        // SAFETY: numbers only.
        unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) - bytes.len() as off_t }
    });
    // The kernel reads whole words at whole offsets only.
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let page = (at as usize / 8 + i) * PAGE_SIZE;
        if let Some((device, pfn)) = pages::hidden(page) {
            // The kernel's form: the kind of swap in 5 bits, then the offset.
            let entry = SWAP | (u64::from(device) + 26) | (u64::from(pfn) << 5);
            word.copy_from_slice(&entry.to_ne_bytes());
        }
    }
}

/// `PAGEMAP_SCAN` by the program, with pages on a device as "swapped". `None`: the kernel's own answer is right.
pub fn scan(fd: c_int, at: usize) -> Option<Result<c_int, Errno>> {
    if !is_ours(fd) {
        return None;
    }
    let mut raw = [0u8; 96];
    crate::user::read(at, &mut raw).ok()?;
    let mut arg: [u64; 12] =
        std::array::from_fn(|i| u64::from_ne_bytes(std::array::from_fn(|k| raw[i * 8 + k])));
    let [size, _, start, end, _, vec, vec_len, ..] = arg;
    let (start, end) = (start as usize, (end as usize).min(farpage::domain::ADDRESS_LIMIT));
    if size != 96 || vec == 0 || vec_len == 0 || start >= end {
        return None;
    }
    let hidden = pages::all_hidden(start, end);
    if hidden.is_empty() {
        return None;
    }
    Some(scan_around(fd, &mut arg, &hidden, end).and_then(|regions| {
        let bytes: Vec<u8> = regions.iter().flatten().flat_map(|w| w.to_ne_bytes()).collect();
        crate::user::write(vec as usize, &bytes)?;
        crate::user::write(at + 32, &arg[4].to_ne_bytes())?;
        Ok(regions.len() as c_int)
    }))
}

/// The regions that such a scan finds: the kernel's, and between them the pages that are hidden from it.
fn scan_around(
    fd: c_int,
    arg: &mut [u64; 12],
    hidden: &[(usize, usize)],
    end: usize,
) -> Result<Vec<[u64; 3]>, Errno> {
    let [_, flags, start, _, _, _, vec_len, max_pages, inverted, mask, any, returned] = *arg;
    let mut left = if max_pages == 0 { u64::MAX } else { max_pages };
    let mut found: Vec<[u64; 3]> = Vec::new();
    // False: there is no room for more.
    let add = |found: &mut Vec<[u64; 3]>, s: u64, e: u64, kind: u64| {
        let full = found.len() as u64 == vec_len;
        match found.last_mut() {
            Some(last) if last[1] == s && last[2] == kind => last[1] = e,
            _ if full => return false,
            _ => found.push([s, e, kind]),
        }
        true
    };
    let mut at = start as usize;
    let mut next = hidden.iter();
    let mut gap = next.next();
    while at < end && left > 0 {
        if let Some(&(s, e)) = gap.filter(|g| g.0 <= at) {
            let until = (at as u64 + left.saturating_mul(PAGE_SIZE as u64)).min(e as u64);
            let kind = IS_SWAPPED | IS_WRITTEN;
            let seen = kind ^ inverted;
            if seen & mask == mask && (any == 0 || seen & any != 0) {
                if !add(&mut found, at as u64, until, kind & returned) {
                    break;
                }
                left -= (until - at as u64) / PAGE_SIZE as u64;
            }
            at = if left == 0 { until as usize } else { e };
            debug_assert!(s <= at);
            gap = next.next();
            continue;
        }
        let until = gap.map_or(end, |g| g.0);
        let mut regions = [[0u64; 3]; 32];
        let pages = if left == u64::MAX { 0 } else { left };
        let mut part = [
            96,
            flags,
            at as u64,
            until as u64,
            0,
            regions.as_mut_ptr() as u64,
            32,
            pages,
            inverted,
            mask,
            any,
            returned,
        ];
        // SAFETY: as in `PageMap::kinds`.
        let n = unsafe { libc::syscall(libc::SYS_ioctl, fd, PAGEMAP_SCAN, part.as_mut_ptr()) };
        if n < 0 {
            let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            return Err(Errno::from_raw_os_error(e));
        }
        let mut walked = part[4] as usize;
        for r in &regions[..n as usize] {
            if !add(&mut found, r[0], r[1], r[2]) {
                arg[4] = r[0];
                return Ok(found);
            }
            left = left.saturating_sub((r[1] - r[0]) / PAGE_SIZE as u64);
        }
        if walked <= at {
            walked = until;
        }
        at = walked;
    }
    arg[4] = at as u64;
    Ok(found)
}
