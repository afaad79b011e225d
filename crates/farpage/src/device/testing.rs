//! What the devices' tests share.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use super::spec::{Spec, backing_path};
use super::{Attach, Device, DeviceError, LoadOp, StoreOp, Sum};
use crate::frame::Pfn;
use crate::sys::{Peers, SharedArea};
use crate::{PAGE_SIZE, Page};

/// The process slot that tests act as.
pub const ME: u16 = 1;

/// Processes, all alive unless they are said to be dead.
#[derive(Default)]
pub struct Living {
    pub dead: Mutex<HashSet<u16>>,
}

impl Peers for Living {
    fn is_alive(&self, owner: u16) -> bool {
        !self.dead.lock().unwrap().contains(&owner)
    }
}

/// What attaching `spec` needs, with a fresh area; the launcher's file is leaked, as a launcher keeps it.
pub fn attach(spec: &Spec) -> (Attach, Arc<Living>) {
    let peers = Arc::<Living>::default();
    let path = spec.create_backing().unwrap().map(|file| {
        let path = backing_path(&file);
        std::mem::forget(file);
        path
    });
    let area = SharedArea::anonymous(spec.shared_len()).unwrap();
    (Attach { area, path, peers: peers.clone(), create: true }, peers)
}

/// A device of its own.
pub fn device(spec: &str) -> Box<dyn Device> {
    let spec: Spec = spec.parse().unwrap();
    spec.attach(attach(&spec).0).unwrap()
}

/// A small generator of random numbers (xorshift): tests repeat exactly.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A page that depends on `seed` and of which the first `random` bytes cannot be compressed.
pub fn page_with(seed: u32, random: usize) -> Page {
    let mut numbers = Random(u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut page = Page([0; PAGE_SIZE]);
    page.0[..random].iter_mut().for_each(|byte| *byte = (numbers.next() >> 24) as u8);
    page.0[random..].chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&seed.to_le_bytes()));
    page
}

/// A half-compressible page.
pub fn page(seed: u32) -> Page {
    page_with(seed, PAGE_SIZE / 2)
}

pub fn store(dev: &dyn Device, pfn: Pfn, page: &Page) -> Result<(), DeviceError> {
    let mut ops = [StoreOp { pfn, page, sum: Sum::of(page), result: Err(DeviceError::Corrupt) }];
    dev.store(&mut ops, ME);
    ops[0].result.clone()
}

pub fn store_all(dev: &dyn Device, pages: &[(Pfn, Page)]) -> Vec<Result<(), DeviceError>> {
    let mut ops: Vec<_> = pages
        .iter()
        .map(|(pfn, page)| StoreOp { pfn: *pfn, page, sum: Sum::of(page), result: Err(DeviceError::Corrupt) })
        .collect();
    dev.store(&mut ops, ME);
    ops.into_iter().map(|op| op.result).collect()
}

/// The page of a frame; its checksum is not compared.
pub fn load(dev: &dyn Device, pfn: Pfn) -> Result<Page, DeviceError> {
    let mut page = Page([0xee; PAGE_SIZE]);
    let mut ops = [LoadOp { pfn, page: &mut page, result: Err(DeviceError::Corrupt) }];
    dev.load(&mut ops);
    ops[0].result.clone()?;
    Ok(page)
}

/// Pages and the checksums kept with them.
pub fn load_all(dev: &dyn Device, pfns: &[Pfn]) -> Vec<Result<(Page, Sum), DeviceError>> {
    let mut pages = vec![Page([0xee; PAGE_SIZE]); pfns.len()];
    let mut ops: Vec<_> = pfns
        .iter()
        .zip(&mut pages)
        .map(|(pfn, page)| LoadOp { pfn: *pfn, page, result: Err(DeviceError::Corrupt) })
        .collect();
    dev.load(&mut ops);
    let results: Vec<_> = ops.into_iter().map(|op| op.result).collect();
    results.into_iter().zip(pages).map(|(result, page)| result.map(|sum| (page, sum))).collect()
}

/// A child process that runs `f` and ends: with status 0 if it returns, 1 if it panics.
pub fn in_child(f: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the child uses only this thread, the device, and malloc, which glibc makes usable after fork.
    match unsafe { libc::fork() } {
        0 => {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            // SAFETY: ends the child without running the test harness's exit code.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        pid => {
            assert!(pid > 0);
            pid
        }
    }
}

/// Waits for a child: its wait status.
pub fn status(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: our child, waited for once.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}
