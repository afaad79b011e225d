//! A device of one's own: pages that are equal are stored once.
//!
//! All that a device does is to store pages under frame numbers and to load them again. Counts, free frames, checksums,
//! eviction and faults are farpage's business; a frame is stored once and never changed, so no call has to lock out another
//! on the same frame.
//!
//!     cargo run --release --example device

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use farpage::device::{Device, DeviceError, LoadOp, Owner, Pfn, StoreOp, Sum, Usage};
use farpage::{Domain, PAGE_SIZE, Page};

const FRAMES: u32 = 1 << 20;

#[derive(Default)]
struct Shelf {
    /// Which page each frame holds.
    frames: HashMap<Pfn, Sum>,
    /// Each page that some frame holds, and how many do.
    pages: HashMap<[u32; 3], (Arc<Page>, u32)>,
}

/// Equal pages once.
#[derive(Default)]
struct Dedup(Mutex<Shelf>);

impl Dedup {
    fn shelf(&self) -> std::sync::MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Dedup {
    fn name(&self) -> &str {
        "dedup"
    }

    fn frames(&self) -> u32 {
        FRAMES
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _: Owner) {
        let mut shelf = self.shelf();
        for op in ops {
            shelf.frames.insert(op.pfn, op.sum);
            shelf.pages.entry(op.sum.0).or_insert_with(|| (Arc::new(op.page.clone()), 0)).1 += 1;
            op.result = Ok(());
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        for op in ops {
            // Equal checksums mean equal pages.
            let shelf = self.shelf();
            let found =
                shelf.frames.get(&op.pfn).and_then(|sum| Some((*sum, shelf.pages.get(&sum.0)?.0.clone())));
            drop(shelf);
            op.result = found.ok_or(DeviceError::Corrupt).map(|(sum, page)| {
                op.page.0.copy_from_slice(&page.0);
                sum
            });
        }
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        self.shelf().frames.get(&pfn).copied().unwrap_or_default()
    }

    fn free(&self, pfns: &[Pfn], _: Owner) {
        let mut shelf = self.shelf();
        for pfn in pfns {
            let Some(sum) = shelf.frames.remove(pfn) else { continue };
            if let Some((_, holders)) = shelf.pages.get_mut(&sum.0) {
                *holders -= 1;
                if *holders == 0 {
                    shelf.pages.remove(&sum.0);
                }
            }
        }
    }

    fn usage(&self) -> Usage {
        let used = self.shelf().pages.len() as u64 * PAGE_SIZE as u64;
        Usage { capacity: u64::from(FRAMES) * PAGE_SIZE as u64, used, payload: used, peak: used }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let space = Domain::builder().dram("8M").own_device(Dedup::default()).build()?.start()?;
    // 64 MiB in which every page is one of 100.
    let word = |i: usize| (i / 512 % 100 * 1000 + i % 512) as u64;
    let numbers = space.region_from_fn(8 << 20, word)?;
    if numbers.iter().enumerate().any(|(i, n)| *n != word(i)) {
        return Err("not what was stored".into());
    }
    let device = &space.domain.stats().devices[0];
    println!(
        "{} frames of the device hold {} different pages",
        device.frames,
        device.used / PAGE_SIZE as u64
    );
    Ok(())
}
