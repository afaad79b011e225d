//! Memory that the CPU reaches in place, as a device of a domain: pages are stored in it, mapped from it, and leave it.

mod managed;

use std::time::Duration;

use farpage::PAGE_SIZE;
use farpage::domain::Domain;
use farpage::frame::ledger::HolderKind;
use farpage::migrate::{Outcome, Refusal, Target};
use farpage::pagemap::MemoryType;
use farpage::space::pin::{Pin, PinError};
use farpage::space::snapshot::Place;
use managed::{Managed, Memory, ended_well};

const MIB: usize = 1 << 20;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(60);
const RIGHTS: (bool, bool, bool) = (true, true, false);

/// Pages on a device, in this process's entries.
fn on(m: &Memory, dev: u8) -> usize {
    let pages = m.space.snapshot(m.range()).unwrap();
    pages.iter().filter(|p| matches!(p.place, Place::Device(on) if on == dev)).count()
}

/// Bytes of the system's memory that the device has.
fn takes(managed: &Managed, dev: u8) -> u64 {
    managed.space.domain.pagemap(dev).device.memory().unwrap().in_use().unwrap()
}

fn filled(managed: &Managed, mib: usize) -> Memory {
    let m = managed.map(mib * MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    m
}

#[test]
fn pages_go_out_and_come_back_and_the_pagemap_has_the_type() {
    let managed = Managed::new(8 * MIB, &["generic:memfd:12M", "coherent:memfd:64M"]);
    let types = managed.space.domain.pagemaps.iter().map(|map| map.memory_type).collect::<Vec<_>>();
    assert_eq!(types, [MemoryType::Generic, MemoryType::Coherent]);
    let m = filled(&managed, 32);
    managed.space.page_out(m.addr, m.addr + m.len, true);
    // The first is full; the second takes over.
    assert!(on(&m, 0) > 2500 && on(&m, 1) > 2500, "{} {}", on(&m, 0), on(&m, 1));
    assert!((10 << 20..=12 << 20).contains(&takes(&managed, 0)));
    for _ in 0..2 {
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    }
    managed.assert_audit();
    assert!(managed.space.domain.stats().dram_peak <= 8 << 20);
    drop(m);
    managed.assert_all_free();
    assert!(takes(&managed, 0) + takes(&managed, 1) <= 32 << 20, "a part of it is kept for what comes next");
}

#[test]
fn pages_migrate_to_it_from_it_and_between() {
    for (from, to) in [("generic:memfd:8M", "coherent:memfd:8M"), ("coherent:memfd:8M", "ram:32M")] {
        let managed = Managed::new(16 * MIB, &[from, to]);
        let m = filled(&managed, 4);
        let to = |t| managed.space.migrate(m.range(), t).unwrap().moved();
        assert_eq!((to(Target::Device(0)), on(&m, 0)), (m.pages(), m.pages()));
        assert_eq!((to(Target::Device(1)), on(&m, 1), managed.used(0)), (m.pages(), m.pages(), 0));
        assert_eq!((to(Target::System), m.resident_count()), (m.pages(), m.pages()));
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
        // Compaction, and what is behind it.
        assert_eq!(managed.space.shrink(0, 1024).unwrap().in_use, 0);
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        drop(m);
        managed.assert_all_free();
    }
}

#[test]
fn it_is_removed_while_it_is_used() {
    for (going, left) in
        [("generic:memfd:16M", "coherent:memfd:16M"), ("coherent:memfd:16M", "generic:memfd:16M")]
    {
        let managed = Managed::new(8 * MIB, &[going, left]);
        let m = filled(&managed, 12);
        managed.space.page_out(m.addr, m.addr + m.len, true);
        assert!(takes(&managed, 0) >= 4 << 20 && managed.used(1) == 0);
        managed.space.remove_device(0, LONG).unwrap();
        assert_eq!((managed.used(0), takes(&managed, 0), on(&m, 0)), (0, 0, 0));
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        managed.space.page_out(m.addr, m.addr + m.len, true);
        assert!(on(&m, 1) > 1000 && takes(&managed, 0) == 0, "{}", on(&m, 1));
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        drop(m);
        managed.assert_all_free();
    }
}

/// Frames of the same memory serve pages and mappings: each finds its own, and the end of the device waits for both.
#[test]
fn mappings_of_the_same_memory() {
    let managed = Managed::new(8 * MIB, &["generic:memfd:32M", "ram:64M"]);
    let (space, me) = (managed.space, managed.space.me());
    let map = space.domain.pagemap(0);
    let m = filled(&managed, 16);
    space.page_out(m.addr, m.addr + m.len, true);
    // Frames that pages have left: their old bytes are not seen.
    assert_eq!(space.migrate(m.part(0, 1024), Target::Device(1)).unwrap().moved(), 1024);
    let mapping = map.map_new(me, 8 * MIB, PAGE_SIZE).unwrap();
    let mut bytes = vec![9; 8 * MIB];
    assert!(mapping.read(0, &mut bytes) && bytes.iter().all(|b| *b == 0));
    let words: Vec<u8> = (0..8 * MIB).map(|i| (i / 4096 % 251) as u8).collect();
    assert!(mapping.write(0, &words));
    // Pages come, go and are given back around it.
    for round in 0..3 {
        (0..m.pages()).for_each(|i| m.write(i, round + i as u64));
        space.page_out(m.addr, m.addr + m.len, true);
        assert!((0..m.pages()).all(|i| m.is(i, round + i as u64)));
    }
    space.shrink(0, 64).unwrap();
    space.migrate(m.range(), Target::Device(1)).unwrap();
    assert!(mapping.read(0, &mut bytes) && bytes == words);
    let error = space.remove_device(0, SHORT).unwrap_err().to_string();
    assert!(
        error.contains(&format!(
            "2048 frames of generic:memfd:32M are still held: frame {}",
            mapping.hold().pfn()
        )),
        "{error}"
    );
    assert!(error.contains(&format!("(1 reference: 1 mapping of process slot {me})")), "{error}");
    std::thread::scope(|s| {
        let going = s.spawn(|| space.remove_device(0, LONG));
        std::thread::sleep(SHORT);
        assert!(!going.is_finished());
        assert!(mapping.read(0, &mut bytes) && bytes == words);
        drop(mapping);
        going.join().unwrap().unwrap();
    });
    assert_eq!((managed.used(0), takes(&managed, 0)), (0, 0));
    assert!((0..m.pages()).all(|i| m.is(i, 2 + i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn who_holds_a_frame_is_waited_for() {
    let managed = Managed::new(16 * MIB, &["coherent:memfd:8M"]);
    let m = filled(&managed, 1);
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
    let frame = managed.space.on_devices(m.at(7), m.at(8))[0].frame;
    let map = managed.space.domain.pagemap(0);
    let hold = map.hold(managed.space.me(), HolderKind::Pin, frame, 1).unwrap();
    let error = managed.space.remove_device(0, SHORT).unwrap_err().to_string();
    assert!(error.contains(&format!("1 frame of coherent:memfd:8M is still held: frame {frame}")), "{error}");
    drop(hold);
    managed.space.remove_device(0, LONG).unwrap();
    assert_eq!(takes(&managed, 0), 0);
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
}

#[test]
fn a_child_shares_frames_and_a_killed_one_gives_them_back() {
    if !managed::alone("a_child_shares_frames_and_a_killed_one_gives_them_back") {
        return;
    }
    let managed = Managed::new(8 * MIB, &["generic:memfd:64M"]);
    let m = filled(&managed, 16);
    managed.space.page_out(m.addr, m.addr + m.len, true);
    let child = managed.fork(|| {
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        (0..m.pages()).for_each(|i| m.write(i, 77 + i as u64));
        managed.space.page_out(m.addr, m.addr + m.len, true);
        assert!((0..m.pages()).all(|i| m.is(i, 77 + i as u64)));
    });
    (0..m.pages()).step_by(3).for_each(|i| m.write(i, 5 + i as u64));
    assert!(ended_well(child));
    for round in 0..5 {
        let child = managed.fork(|| {
            for seed in 0.. {
                (0..m.pages()).for_each(|i| m.write(i, seed + i as u64));
            }
        });
        std::thread::sleep(Duration::from_millis(20 + 17 * round));
        // SAFETY: our child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert!(!ended_well(child));
        managed.assert_audit();
    }
    assert!((0..m.pages()).all(|i| m.is(i, i as u64 + if i % 3 == 0 { 5 } else { 0 })));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn pages_are_reached_in_place_and_what_is_written_there_counts() {
    for device in ["coherent:memfd:16M", "generic:memfd:16M", "mem:16M"] {
        let managed = Managed::new(32 * MIB, &[device, "ram:64M"]);
        let space = managed.space;
        let below = filled(&managed, 2);
        assert_eq!(space.migrate(below.range(), Target::Device(0)).unwrap().moved(), below.pages());
        let m = filled(&managed, 2);
        assert_eq!(space.migrate(m.part(0, 300), Target::Device(0)).unwrap().moved(), 300);
        assert_eq!(space.map_in_place(m.addr, m.addr + m.len, 0, RIGHTS), Ok(300));
        assert_eq!(space.in_place(m.addr, m.addr + m.len), Ok(vec![(m.addr, m.at(300))]));
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        managed.assert_audit();
        (0..300).step_by(2).for_each(|i| m.write(i, 1000 + i as u64));
        let seed = |i: usize| if i < 300 && i.is_multiple_of(2) { 1000 + i as u64 } else { i as u64 };
        let right = || (0..m.pages()).all(|i| m.is(i, seed(i)));
        // It is on the device as long as it is mapped there.
        assert_eq!((on(&m, 0), managed.used(0)), (300, 300 + below.pages()));
        assert_eq!(space.migrate(m.part(0, 300), Target::Device(0)).unwrap().there(), 300);
        assert_eq!(on(&m, 0), 300);
        // Frames do not move beneath a mapping, also where there is room below.
        drop(below);
        assert_eq!(managed.used(0), 300);
        assert_eq!(space.shrink(0, 400).unwrap().moved, 0);
        (0..300).step_by(2).for_each(|i| m.write(i, 1000 + i as u64));
        assert!(right());
        space.shrink(0, 4096).unwrap();
        // To another device, and back to DRAM: by way of DRAM, with what was written.
        assert_eq!(space.migrate(m.part(0, 100), Target::Device(1)).unwrap().moved(), 100);
        let report = space.migrate(m.part(50, 200), Target::System).unwrap();
        assert_eq!(report.pages, [Outcome::Moved; 150]);
        assert_eq!((on(&m, 0), on(&m, 1)), (100, 50));
        assert!(right());
        // And when the device goes.
        space.remove_device(0, LONG).unwrap();
        assert_eq!((managed.used(0), space.in_place(m.addr, m.addr + m.len)), (0, Ok(vec![])));
        assert!(right());
        drop(m);
        managed.assert_all_free();
    }
}

#[test]
fn a_long_term_pin_moves_pages_out_of_coherent_memory() {
    for (device, leaves) in [("coherent:memfd:16M", true), ("generic:memfd:16M", false)] {
        let managed = Managed::new(32 * MIB, &[device, "ram:16M"]);
        let space = managed.space;
        let m = filled(&managed, 1);
        assert_eq!(space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 256);
        // What is not mapped in place comes to DRAM, for whatever pin.
        drop(space.pin(m.part(200, 256), Pin::LongTerm, true).unwrap());
        assert_eq!(m.resident_count(), 56);
        assert_eq!(space.map_in_place(m.at(0), m.at(200), 0, RIGHTS), Ok(200));
        (0..200).for_each(|i| m.write(i, 500 + i as u64));
        // A short pin leaves it where it is, and keeps it there.
        let short = space.pin(m.part(10, 12), Pin::Short, true).unwrap();
        assert_eq!(on(&m, 0), 200);
        let report = space.migrate(m.part(8, 14), Target::System).unwrap();
        assert_eq!(
            report.refused().collect::<Vec<_>>(),
            [(m.at(10), Refusal::Pinned), (m.at(11), Refusal::Pinned)]
        );
        assert_eq!((report.moved(), on(&m, 0)), (4, 196));
        let long = space.pin(m.part(0, 100), Pin::LongTerm, true);
        if leaves {
            assert_eq!(long.err(), Some(PinError::LongTerm(m.at(10), MemoryType::Coherent)));
            assert_eq!(space.pinned(), 2, "what failed pins nothing");
            assert_eq!(space.in_place(m.addr, m.at(100)), Ok(vec![(m.at(10), m.at(12))]));
        } else {
            assert_eq!(on(&m, 0), 196, "it never has to move");
            drop(long.unwrap());
        }
        drop(short);
        let long = space.pin(m.part(0, 100), Pin::LongTerm, true).unwrap();
        assert_eq!(on(&m, 0), if leaves { 100 } else { 196 });
        let states = space.snapshot(m.part(0, 100)).unwrap();
        let here = |p: &farpage::space::snapshot::PageState| p.place == Place::System && p.pinned();
        assert_eq!(states.iter().filter(|p| here(p)).count(), if leaves { 100 } else { 4 });
        assert!((0..200).all(|i| m.is(i, 500 + i as u64)) && (200..256).all(|i| m.is(i, i as u64)));
        managed.assert_audit();
        (0..100).for_each(|i| m.write(i, 9));
        // The owner can take his memory back, all of it, if nobody has pinned it there.
        let gone = space.remove_device(0, SHORT);
        assert_eq!(gone.is_ok(), leaves);
        if !leaves {
            assert_eq!((on(&m, 0), managed.used(0)), (96, 96), "what is pinned there");
        }
        (0..100).for_each(|i| m.write(i, 500 + i as u64));
        drop(long);
        if !leaves {
            space.remove_device(0, LONG).unwrap();
        }
        assert!((0..200).all(|i| m.is(i, 500 + i as u64)));
        drop(m);
        managed.assert_all_free();
    }
}

/// A page that is mapped in place and that nobody has touched there yet: the kernel does not say that it is present.
#[test]
fn what_a_call_holds_in_place_stays_there() {
    let managed = Managed::new(16 * MIB, &["coherent:memfd:8M", "ram:16M"]);
    let space = managed.space;
    let m = filled(&managed, 1);
    assert_eq!(space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
    assert_eq!(space.map_in_place(m.addr, m.addr + m.len, 0, RIGHTS), Ok(m.pages()));
    let hold = space.hold(m.at(3), m.at(5));
    let error = space.remove_device(0, SHORT).unwrap_err().to_string();
    assert!(error.starts_with("2 frames of coherent:memfd:8M are still held"), "{error}");
    assert_eq!((on(&m, 0), on(&m, 1)), (2, 0));
    let report = space.migrate(m.part(0, 8), Target::Device(1)).unwrap();
    assert_eq!(
        report.refused().collect::<Vec<_>>(),
        [(m.at(3), Refusal::Pinned), (m.at(4), Refusal::Pinned)]
    );
    m.write(3, 33);
    drop(hold);
    space.remove_device(0, LONG).unwrap();
    assert!((0..m.pages()).all(|i| m.is(i, if i == 3 { 33 } else { i as u64 })));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn what_cannot_be_a_device_is_said() {
    let error = |device: &str| Domain::builder().device(device).build().err().unwrap().to_string();
    assert!(error("p2pdma:memfd:8M").contains("its driver's"));
    assert!(error("numa:999:8M").contains("no such node"));
    assert!(error("generic:/nowhere/at/all:8M").contains("cannot open it: No such file"));
    assert!(error("generic:/nowhere/at/all").contains("cannot open it: No such file"));
    assert!(error("generic:/dev/null").contains("cannot look at it: No such device"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "somebody's").unwrap();
    assert!(error(&format!("generic:{}:8M", file.display())).contains("holds data"));
    std::fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
    let spec = format!("generic:{}", file.display());
    let domain = Domain::builder().device(&spec).build().unwrap();
    assert_eq!(domain.config.devices[0].size(), Some(8 << 20));
    assert!(error(&spec).contains("in use by another process"));
    drop(domain);
    assert!(Domain::builder().device(&spec).build().is_ok());
}
