//! The devices store, load and free without allocating: they work when memory is short.
#![cfg(not(loom))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use farpage::device::spec::{Spec, backing_path};
use farpage::device::{Attach, LoadOp, StoreOp, Sum};
use farpage::sys::{Peers, SharedArea};
use farpage::{PAGE_SIZE, Page};

thread_local! {
    static ALLOCATIONS: Cell<u32> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator, with a counter beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Everyone;
impl Peers for Everyone {
    fn is_alive(&self, _: u16) -> bool {
        true
    }
}

/// Allocations of this thread in `f`.
fn allocations(f: impl FnOnce()) -> u32 {
    let before = ALLOCATIONS.with(Cell::get);
    f();
    ALLOCATIONS.with(Cell::get) - before
}

fn check(spec: &str) {
    let spec: Spec = spec.parse().unwrap();
    let backing = spec.create_backing().unwrap();
    let dev = spec
        .attach(Attach {
            area: SharedArea::anonymous(spec.shared_len()).unwrap(),
            path: backing.as_ref().map(backing_path),
            peers: Arc::new(Everyone),
            create: true,
        })
        .unwrap();
    // Every third frame, so that a file needs many transfers; different sizes, so that a pool needs many classes.
    let page = |n: usize| {
        let mut page = Page([0; PAGE_SIZE]);
        let mut x = n as u64 + 1;
        page.0[..n * 20].iter_mut().for_each(|byte| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (x >> 33) as u8;
        });
        page
    };
    let pages: Vec<Page> = (0..150).map(page).collect();
    let pfns: Vec<u32> = (0..150).map(|n| n + n / 3).collect();
    let mut back = pages.clone();
    let mut stores: Vec<_> = pfns
        .iter()
        .zip(&pages)
        .map(|(pfn, page)| StoreOp { pfn: *pfn, page, sum: Sum::of(page), result: Ok(()) })
        .collect();
    let mut loads: Vec<_> = pfns
        .iter()
        .zip(&mut back)
        .map(|(pfn, page)| LoadOp { pfn: *pfn, page, result: Ok(Sum::default()) })
        .collect();
    // Once before, for what is made on first use (a ring).
    dev.store(&mut stores, 1);
    let count = allocations(|| {
        dev.free(&pfns, 1);
        dev.store(&mut stores, 1);
        dev.load(&mut loads);
        dev.free(&pfns[10..], 1);
    });
    assert_eq!(count, 0, "{spec}");
    assert!(stores.iter().all(|op| op.result.is_ok()));
    assert!(loads.iter().zip(&stores).all(|(load, store)| load.result == Ok(store.sum)));
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

#[test]
fn ram_allocates_nothing() {
    check("ram:1M");
}

#[test]
fn memory_allocates_nothing() {
    check("mem:1M");
    check("generic:memfd:1M");
}

#[test]
fn file_allocates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    check(&format!("file:{}:1M", dir.path().display()));
}
