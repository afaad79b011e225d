//! Pagemaps of every memory type: registering, one life for all, unregistering, registering again.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{ME, area, memory, paging, registered, types};
use farpage::device::memory::MemorySpec;
use farpage::frame::ledger::HolderKind;
use farpage::frame::{GetError, Pfn};
use farpage::pagemap::{
    AllocError, DriverId, Holder, MemoryType, NotLive, Pagemap, PagemapOps, RefError, RegisterError,
    Registration, Tenants, UnregisterError, lookup,
};

const SHORT: Duration = Duration::from_millis(60);
const LONG: Duration = Duration::from_secs(20);

fn registration(memory_type: MemoryType, ranges: Vec<std::ops::Range<Pfn>>) -> Registration {
    let ops: Box<dyn PagemapOps> = match memory_type {
        MemoryType::Private => Box::new(paging("ram:1M")),
        MemoryType::P2pDma => Box::new(memory("p2pdma:memfd:4M")),
        MemoryType::Coherent => Box::new(memory("coherent:memfd:4M")),
        _ => Box::new(memory("generic:memfd:4M")),
    };
    Registration { id: 3, memory_type, driver: DriverId(7), ranges, ops }
}

#[test]
fn registering_says_what_is_wrong() {
    let generic = |ranges| Pagemap::register(registration(MemoryType::Generic, ranges), area(1024), true);
    assert_eq!(generic(vec![]).unwrap_err(), RegisterError::Empty(None));
    assert_eq!(generic(vec![0..64, 128..128]).unwrap_err(), RegisterError::Empty(Some(128..128)));
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = generic(vec![128..64; 1]).unwrap_err();
    assert!(matches!(reversed, RegisterError::Empty(Some(_))), "{reversed}");
    assert_eq!(generic(vec![0..100; 1]).unwrap_err(), RegisterError::Unaligned(0..100));
    assert_eq!(generic(vec![32..128; 1]).unwrap_err(), RegisterError::Unaligned(32..128));
    assert_eq!(generic(vec![128..256, 0..192]).unwrap_err(), RegisterError::Overlap(0..192, 128..256));
    assert_eq!(generic(vec![64..128, 64..128]).unwrap_err(), RegisterError::Overlap(64..128, 64..128));
    assert_eq!(generic(vec![0..64, 960..1088]).unwrap_err(), RegisterError::Beyond(960..1088, 1024));
    assert_eq!(generic(vec![0..u32::MAX; 1]).unwrap_err(), RegisterError::Beyond(0..u32::MAX, 1024));
    let needs = Pagemap::shared_len(1024);
    let error = Pagemap::register(registration(MemoryType::Generic, vec![0..1024; 1]), area(64), true);
    assert_eq!(error.unwrap_err(), RegisterError::Area(Pagemap::shared_len(64), needs));

    // A driver without what the type needs.
    let ops = |memory_type, ops| {
        let what = Registration { ops, ..registration(memory_type, vec![0..64; 1]) };
        Pagemap::register(what, area(1024), true).unwrap_err()
    };
    let error = ops(MemoryType::Private, Box::new(memory("generic:memfd:4M")));
    assert_eq!(error, RegisterError::MissingOp(MemoryType::Private, "migrate_to_ram"));
    assert_eq!(error.to_string(), "Private memory needs `migrate_to_ram`");
    let error = ops(MemoryType::Generic, Box::new(paging("ram:1M")));
    assert_eq!(error, RegisterError::MissingOp(MemoryType::Generic, "memory"));
    let error = ops(MemoryType::Generic, Box::new(memory("p2pdma:memfd:4M")));
    assert_eq!(error, RegisterError::Differs(MemoryType::Generic, MemoryType::P2pDma));
    let error = ops(MemoryType::System, Box::new(paging("ram:1M")));
    assert_eq!(error, RegisterError::Type(MemoryType::System));
    let what = Registration { id: 16, ..registration(MemoryType::Generic, vec![0..64; 1]) };
    assert_eq!(Pagemap::register(what, area(64), true).unwrap_err(), RegisterError::Id(16));

    // Twice, and joining what is not there.
    let shared = area(1024);
    let again = |create| Pagemap::register(registration(MemoryType::Generic, vec![0..64; 1]), shared, create);
    assert_eq!(again(false).unwrap_err(), RegisterError::NotLive(NotLive::Unregistered));
    let map = again(true).unwrap();
    assert_eq!(again(true).unwrap_err(), RegisterError::Registered);
    let other = again(false).unwrap();
    assert_eq!((other.try_alloc(2), map.frames.used()), (Ok(0), 1), "another process joins");
    other.put_in_transit(&[0], 2);
    map.unregister(&mut (), ME, SHORT).unwrap();
    for joined in [other, again(false).unwrap()] {
        assert_eq!(joined.try_alloc(2), Err(AllocError::NotLive(NotLive::Unregistered)));
    }
}

#[test]
fn the_last_range_may_end_with_the_device() {
    // 100 pages: no multiple of 64.
    let ops = Box::new(memory("generic:memfd:400K"));
    let what = Registration { ops, ..registration(MemoryType::Generic, vec![64..100; 1]) };
    let map = Pagemap::register(what, area(100), true).unwrap();
    let all: Vec<Pfn> = std::iter::from_fn(|| map.alloc(ME)).collect();
    assert_eq!(all, (64..100).collect::<Vec<_>>());
}

#[test]
fn one_life_for_every_type() {
    for (memory_type, map, freed) in types() {
        assert_eq!(map.frames.used(), 0, "{memory_type:?} starts at 0");
        let pfn = map.try_alloc(ME).unwrap();
        map.frames.settle(pfn);
        assert_eq!(map.frames.count(pfn), 1);
        map.get(pfn, ME).unwrap();
        map.get(pfn, ME).unwrap();
        map.put(&[pfn, pfn], ME);
        assert_eq!((map.frames.count(pfn), freed.calls()), (1, vec![]), "{memory_type:?}: nothing at 1");
        map.put(&[pfn], ME);
        assert_eq!(
            (map.frames.count(pfn), freed.calls()),
            (0, vec![vec![pfn]]),
            "{memory_type:?}: once at 0"
        );
        assert_eq!(
            map.get(pfn, ME),
            Err(RefError::Frame(GetError::Free)),
            "{memory_type:?}: never up from 0"
        );
        assert_eq!(map.frames.used(), 0);
    }
}

#[test]
fn a_batch_frees_in_one_pass() {
    for (memory_type, map, freed) in types() {
        let mut pfns: Vec<Pfn> = (0..100).map(|_| map.try_alloc(ME).unwrap()).collect();
        pfns.iter().for_each(|&pfn| map.frames.settle(pfn));
        // Every third has one more reference; the order is not the frames'.
        pfns.iter().step_by(3).for_each(|&pfn| map.get(pfn, ME).unwrap());
        pfns.reverse();
        map.put(&pfns, ME);
        let calls = freed.calls();
        assert_eq!(calls.len(), 2, "{memory_type:?}: 100 frames are two batches");
        let mut all = calls.concat();
        all.sort_unstable();
        let expected: Vec<Pfn> = (0..100).filter(|pfn| pfn % 3 != 0).collect();
        assert_eq!(all, expected, "{memory_type:?}: those whose last reference it was, each once");
        assert_eq!(map.frames.used(), 34);
        // They can be had again, by the hints.
        assert_eq!(std::iter::from_fn(|| map.alloc(ME)).count(), 1024 - 34);
    }
}

#[test]
fn only_frames_of_the_ranges_exist() {
    let what = registration(MemoryType::Generic, vec![640..704, 128..256]);
    let map = Pagemap::register(what, area(1024), true).unwrap();
    let mut all: Vec<Pfn> = std::iter::from_fn(|| map.alloc(ME)).collect();
    all.sort_unstable();
    assert_eq!(all, (128..256).chain(640..704).collect::<Vec<_>>());
    map.frames.format();
    assert_eq!(map.try_alloc(ME), Err(AllocError::Full));
    for pfn in [0, 127, 256, 704, 1023, 1024, u32::MAX] {
        assert_eq!(map.get(pfn, ME), Err(RefError::NoFrame), "{pfn}");
        assert!(map.hold(ME, HolderKind::Pin, pfn, 1).is_err());
    }
    map.put_in_transit(&all, ME);
    // A run does not go across a gap.
    assert_eq!(map.try_alloc_run(ME, 128, 64), Ok(128));
    assert_eq!(map.try_alloc_run(ME, 65, 1), Err(AllocError::Full));
    assert_eq!(map.try_alloc_run(ME, 64, 64), Ok(640));
}

#[test]
fn a_lookup_finds_the_pagemap_until_it_goes() {
    let maps = [MemoryType::Private, MemoryType::Generic].map(|memory_type| {
        let what = registration(memory_type, vec![64..256; 1]);
        let id = u8::from(memory_type == MemoryType::Generic);
        Pagemap::register(Registration { id, ..what }, area(1024), true).unwrap()
    });
    let found = lookup(&maps, 1, 70, ME).unwrap();
    assert_eq!((found.id, found.memory_type, found.driver), (1, MemoryType::Generic, DriverId(7)));
    for (id, pfn) in [(1, 63), (1, 256), (2, 70), (255, 70)] {
        assert_eq!(lookup(&maps, id, pfn, ME).err(), Some(RefError::NoFrame));
    }
    // Who has found it keeps it from going.
    let error = maps[1].unregister(&mut (), ME, SHORT).unwrap_err();
    assert!(matches!(error, UnregisterError::Busy { owner: ME, refs: 1, .. }), "{error}");
    assert_eq!(lookup(&maps, 1, 70, ME).err(), Some(RefError::NotLive(NotLive::Unregistering)));
    drop(found);
    maps[1].unregister(&mut (), ME, SHORT).unwrap();
    assert_eq!(lookup(&maps, 1, 70, ME).err(), Some(RefError::NotLive(NotLive::Unregistered)));
    assert!(lookup(&maps, 0, 70, ME).is_ok(), "the other one is not concerned");
}

#[test]
fn a_dead_process_keeps_nothing_alive() {
    let map = registered(MemoryType::Generic);
    std::mem::forget(map.live(9).unwrap());
    assert!(matches!(map.unregister(&mut (), ME, SHORT), Err(UnregisterError::Busy { owner: 9, .. })));
    map.reap(9, ME);
    map.unregister(&mut (), ME, SHORT).unwrap();
}

#[test]
fn unregistering_waits_and_says_for_whom() {
    for (memory_type, map, freed) in types() {
        let pinned = map.alloc_held(2, HolderKind::Pin, 1, 1).unwrap();
        let driver = map.alloc_held(5, HolderKind::Driver, 1, 1).unwrap();
        let shared = map.hold(3, HolderKind::Pin, pinned.pfn(), 1).unwrap();
        map.get(pinned.pfn(), ME).unwrap();
        let error = map.unregister(&mut (), ME, SHORT).unwrap_err();
        let text = error.to_string();
        let expected = "2 frames of NAME are still held: frame 0 (3 references: 1 pin of process slot 2, \
             1 pin of process slot 3, 1 unknown); frame 1 (1 reference: 1 driver of process slot 5)";
        assert_eq!(text, expected.replace("NAME", map.name()), "{memory_type:?}");

        // Nothing new, precisely.
        assert_eq!(map.try_alloc(ME), Err(AllocError::NotLive(NotLive::Unregistering)));
        assert_eq!(map.alloc(ME), None);
        assert_eq!(map.get(pinned.pfn(), ME), Err(RefError::NotLive(NotLive::Unregistering)));
        assert!(map.hold(ME, HolderKind::Pin, pinned.pfn(), 1).is_err());
        assert!(map.alloc_held(ME, HolderKind::Pin, 1, 1).is_err());
        // But who holds a frame keeps it, and a fork shares it.
        map.get_in_transit(pinned.pfn(), 4).unwrap();
        map.put_in_transit(&[pinned.pfn()], 4);
        assert_eq!(freed.calls(), Vec::<Vec<Pfn>>::new());

        // Back, and away once more while the last ones let go.
        assert!(map.resume(ME) && !map.resume(ME));
        map.get(pinned.pfn(), ME).unwrap();
        map.put(&[pinned.pfn(), pinned.pfn()], ME);
        std::thread::scope(|scope| {
            let map = &map;
            let going = scope.spawn(move || map.unregister(&mut (), ME, LONG));
            std::thread::sleep(SHORT);
            assert!(!going.is_finished());
            drop((pinned, driver, shared));
            going.join().unwrap().unwrap();
        });
        assert_eq!(map.frames.used(), 0);
        assert_eq!(map.try_alloc(ME), Err(AllocError::NotLive(NotLive::Unregistered)));
        assert_eq!(map.unregister(&mut (), ME, SHORT), Err(NotLive::Unregistered.into()));
    }
}

/// Page entries, as a space has them.
struct Entries {
    entries: Vec<Pfn>,
    pinned: Vec<Pfn>,
    asked: usize,
}

impl Tenants for Entries {
    fn migrate(&mut self, map: &Pagemap, pfns: &[Pfn]) {
        self.asked += 1;
        let pinned = self.pinned.clone();
        let (go, stay): (Vec<Pfn>, Vec<Pfn>) =
            self.entries.iter().partition(|pfn| pfns.contains(pfn) && !pinned.contains(pfn));
        map.put(&go, ME);
        self.entries = stay;
    }

    fn holders(&mut self, _map: &Pagemap, pfns: &[Pfn]) -> Vec<(Pfn, Holder)> {
        let mine = self.entries.iter().filter(|pfn| pfns.contains(pfn));
        mine.map(|pfn| (*pfn, Holder { owner: ME, kind: HolderKind::Entry, refs: 1 })).collect()
    }
}

#[test]
fn unregistering_moves_what_can_move() {
    let map = registered(MemoryType::Private);
    let entries: Vec<Pfn> = (0..200).map(|_| map.try_alloc(ME).unwrap()).collect();
    entries.iter().for_each(|&pfn| map.frames.settle(pfn));
    let mut tenants = Entries { pinned: vec![17], entries, asked: 0 };
    let error = map.unregister(&mut tenants, ME, SHORT).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "1 frame of ram:1M is still held: frame 17 (1 reference: 1 page entry of process slot 1)"
        ),
        "{error}"
    );
    assert!(tenants.asked > 1, "asked again while it waits");
    tenants.pinned.clear();
    map.unregister(&mut tenants, ME, LONG).unwrap();
    assert!(tenants.entries.is_empty());
}

#[test]
fn unregistered_memory_is_gone_and_can_come_back() {
    for spec in ["generic:memfd:4M", "coherent:memfd:4M", "p2pdma:memfd:4M"] {
        let shared = area(1024);
        let parsed: MemorySpec = spec.parse().unwrap();
        let register = || {
            let memory = parsed.create().unwrap();
            let what =
                Registration { ops: Box::new(memory), ..registration(parsed.memory_type, vec![0..1024; 1]) };
            Pagemap::register(what, shared, true).unwrap()
        };
        let map = register();
        let memory = map.device.ops().memory().unwrap();
        let held = map.alloc_held(ME, HolderKind::Driver, 300, 1).unwrap();
        let mapping = map.map_p2p(ME, held.pfn(), 300 * 4096).unwrap();
        assert!(mapping.write(0, &[7; 4096]));
        assert!(memory.in_use().unwrap() >= 300 * 4096);
        drop((held, mapping));
        assert_eq!(memory.in_use().unwrap(), 0, "free frames take no memory");
        map.unregister(&mut (), ME, SHORT).unwrap();
        drop(map);
        let map = register();
        let held = map.alloc_held(ME, HolderKind::Driver, 300, 1).unwrap();
        assert_eq!(held.pfn(), 0);
    }
}

#[test]
fn a_paging_device_gives_back_all_that_it_took() {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("file:{}:8M", dir.path().display());
    for spec in ["ram:8M", &file] {
        let device = common::Backed::new(spec);
        let map = Pagemap::register(Registration::paging(0, device.open()), device.counts(), true).unwrap();
        let pfns = device.fill(&map, 1000);
        assert!(device.bytes() > 3 << 20, "{spec}: {}", device.bytes());
        map.put(&pfns, ME);
        map.unregister(&mut (), ME, SHORT).unwrap();
        assert!(device.bytes() < 64 << 10, "{spec}: {} bytes are left", device.bytes());
        drop(map);

        let map = Pagemap::register(Registration::paging(0, device.open()), device.counts(), true).unwrap();
        let pfns = device.fill(&map, 1000);
        device.check(&map, &pfns);
        map.put(&pfns, ME);
    }
}

/// Also when the test fails: its threads end.
struct StopAtEnd<'a>(&'a AtomicBool);
impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn unregistering_amid_users() {
    for round in 0..30u64 {
        for (memory_type, map, _) in types() {
            let stop = AtomicBool::new(false);
            let held = std::sync::Mutex::new(vec![map.alloc_held(ME, HolderKind::Driver, 4, 1).unwrap()]);
            std::thread::scope(|scope| {
                for owner in 2..4 {
                    let (map, stop) = (&map, &stop);
                    scope.spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            if let Ok(hold) = map.alloc_held(owner, HolderKind::Pin, 3, 1) {
                                let second = map.hold(owner, HolderKind::Mapping, hold.pfn(), 2);
                                drop(hold);
                                drop(second);
                            }
                            if map.get(0, owner).is_ok() {
                                map.put(&[0], owner);
                            }
                            drop(lookup(std::slice::from_ref(map), map.id, 1, owner));
                        }
                    });
                }
                let _stop = StopAtEnd(&stop);
                std::thread::sleep(Duration::from_micros(200 * (round % 5)));
                let failed = map.unregister(&mut (), ME, Duration::from_millis(2));
                assert!(failed.is_err(), "{memory_type:?}: four frames are held");
                held.lock().unwrap().clear();
                let start = Instant::now();
                map.unregister(&mut (), ME, LONG).unwrap();
                assert!(start.elapsed() < LONG / 2);
                assert_eq!(map.frames.used(), 0);
            });
            assert_eq!(map.frames.used(), 0, "{memory_type:?}: nothing was given out after the end");
            assert_eq!(map.ledger.iter().count(), 0);
        }
    }
}
