//! What the tests of pagemaps share.
#![allow(dead_code, reason = "each test program uses a part")]

use std::sync::{Arc, Mutex};

use farpage::device::memory::{DeviceMemory, MemorySpec};
use farpage::device::spec::{Spec, backing_path};
use farpage::device::{Attach, Device, LoadOp, StoreOp, Sum};
use farpage::frame::{Owner, Pfn};
use farpage::pagemap::{DriverId, MemoryType, Pagemap, PagemapOps, Registration};
use farpage::sys::{Peers, SharedArea};
use farpage::{PAGE_SIZE, Page};
use rustix::io::Errno;

/// The process slot that tests act as.
pub const ME: Owner = 1;

struct Everyone;
impl Peers for Everyone {
    fn is_alive(&self, _: u16) -> bool {
        true
    }
}

/// Shared memory for the counts of so many frames.
pub fn area(frames: u32) -> SharedArea {
    SharedArea::anonymous(Pagemap::shared_len(frames)).unwrap()
}

pub fn memory(spec: &str) -> DeviceMemory {
    spec.parse::<MemorySpec>().unwrap().create().unwrap()
}

/// A device that stores and loads pages, and where its bytes are.
pub struct Backed {
    spec: Spec,
    own: SharedArea,
    counts: SharedArea,
    file: Option<std::os::fd::OwnedFd>,
}

impl Backed {
    pub fn new(spec: &str) -> Self {
        let spec: Spec = spec.parse().unwrap();
        let own = SharedArea::anonymous(spec.shared_len()).unwrap();
        let file = spec.create_backing().unwrap();
        Self { own, counts: area(spec.frames()), spec, file }
    }

    pub fn open(&self) -> Box<dyn Device> {
        let path = self.file.as_ref().map(backing_path);
        self.spec.attach(Attach { area: self.own, path, peers: Arc::new(Everyone), create: true }).unwrap()
    }

    pub fn counts(&self) -> SharedArea {
        self.counts
    }

    /// Bytes of memory or of the file system that its pages take.
    pub fn bytes(&self) -> u64 {
        if let Some(file) = &self.file {
            return rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512;
        }
        // The pages of the shared area that are there, but for what describes them.
        let mut there = vec![0u8; self.own.len().div_ceil(PAGE_SIZE)];
        // SAFETY: one byte a page of the area; nothing of it is changed.
        let failed = unsafe { libc::mincore(self.own.addr() as *mut _, self.own.len(), there.as_mut_ptr()) };
        assert_eq!(failed, 0);
        let pages = there.iter().filter(|b| **b & 1 != 0).count();
        (pages * PAGE_SIZE) as u64
    }

    /// Stores pages that do not compress.
    pub fn fill(&self, map: &Pagemap, n: u32) -> Vec<Pfn> {
        (0..n)
            .map(|i| {
                let pfn = map.try_alloc(ME).unwrap();
                let page = random_page(i);
                let sum = Sum::of(&page);
                let mut ops = [StoreOp { pfn, page: &page, sum, result: Ok(()) }];
                map.device.store(&mut ops, ME);
                assert_eq!(ops[0].result, Ok(()));
                map.frames.settle(pfn);
                pfn
            })
            .collect()
    }

    pub fn check(&self, map: &Pagemap, pfns: &[Pfn]) {
        for (i, &pfn) in (0..).zip(pfns) {
            let mut page = Page([0; PAGE_SIZE]);
            let mut ops = [LoadOp { pfn, page: &mut page, result: Ok(Sum::default()) }];
            assert_eq!(map.load(&mut ops).2, Ok(()));
            assert!(page.0 == random_page(i).0);
        }
    }
}

fn random_page(seed: u32) -> Page {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = Page([0; PAGE_SIZE]);
    for word in page.0.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    page
}

pub fn paging(spec: &str) -> Box<dyn Device> {
    Backed::new(spec).open()
}

/// What `page_free` was called with.
#[derive(Clone, Default)]
pub struct Freed(Arc<Mutex<Vec<Vec<Pfn>>>>);

impl Freed {
    pub fn calls(&self) -> Vec<Vec<Pfn>> {
        self.0.lock().unwrap().clone()
    }
}

/// A driver whose frees are watched.
struct Watched(Box<dyn PagemapOps>, Freed);

impl PagemapOps for Watched {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn page_free(&self, pfns: &[Pfn], owner: Owner) {
        self.1.0.lock().unwrap().push(pfns.to_vec());
        self.0.page_free(pfns, owner);
    }
    fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
        self.0.migrate_to_ram()
    }
    fn memory(&self) -> Option<&DeviceMemory> {
        self.0.memory()
    }
    fn repair(&self, owner: Owner) {
        self.0.repair(owner);
    }
    fn remove(&self, owner: Owner) -> Result<(), Errno> {
        self.0.remove(owner)
    }
}

pub fn watched(memory_type: MemoryType) -> (Pagemap, Freed) {
    let ops: Box<dyn PagemapOps> = match memory_type {
        MemoryType::Private => Box::new(paging("ram:1M")),
        MemoryType::Coherent => Box::new(memory("coherent:memfd:4M")),
        MemoryType::P2pDma => Box::new(memory("p2pdma:memfd:4M")),
        _ => Box::new(memory("generic:memfd:4M")),
    };
    let freed = Freed::default();
    let ops = Box::new(Watched(ops, freed.clone()));
    let what = Registration { id: 0, memory_type, driver: DriverId(1), ranges: vec![0..1024; 1], ops };
    (Pagemap::register(what, area(1024), true).unwrap(), freed)
}

pub fn registered(memory_type: MemoryType) -> Pagemap {
    watched(memory_type).0
}

/// A pagemap of each type that can be registered.
pub fn types() -> Vec<(MemoryType, Pagemap, Freed)> {
    [MemoryType::Private, MemoryType::Coherent, MemoryType::Generic, MemoryType::P2pDma]
        .map(|memory_type| {
            let (map, freed) = watched(memory_type);
            (memory_type, map, freed)
        })
        .into()
}
