//! A device that is taken away while a space has pages on it.

mod managed;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use farpage::PAGE_SIZE;
use farpage::frame::ledger::HolderKind;
use farpage::migrate::Target;
use farpage::pagemap::{NotLive, UnregisterError};
use farpage::space::snapshot::Place;
use managed::{Managed, Memory};

const MIB: usize = 1 << 20;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(60);

/// Pages on a device, in this process's entries.
fn on(m: &Memory, dev: u8) -> usize {
    let pages = m.space.snapshot(m.range()).unwrap();
    pages.iter().filter(|p| matches!(p.place, Place::Device(on) if on == dev)).count()
}

/// Bytes that the device takes of the system's memory or storage.
fn takes(managed: &Managed, dev: u8) -> u64 {
    managed.space.domain.pagemap(dev).device.usage().used
}

#[test]
fn pages_move_to_the_next_device_and_the_memory_is_gone() {
    for going in ["mem:16M", "ram:16M", "mem:4200K"] {
        let managed = Managed::new(16 * MIB, &[going, "mem:32M"]);
        let m = managed.map(4 * MIB);
        (0..m.pages()).for_each(|i| m.write(i, i as u64));
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
        // Some are in DRAM as well: their copies stay on the device.
        assert!((0..100).all(|i| m.is(i, i as u64)));
        assert!(takes(&managed, 0) > 0 && managed.used(0) == m.pages() && managed.used(1) == 0);
        managed.space.remove_device(0, LONG).unwrap();
        assert_eq!((managed.used(0), takes(&managed, 0)), (0, 0), "{going}");
        // (What is read is brought in with what follows it.)
        assert!(on(&m, 1) > 200, "{}", on(&m, 1));
        assert_eq!((on(&m, 0), on(&m, 1) + m.resident_count()), (0, m.pages()));
        managed.assert_audit();
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        // What leaves now goes to the next one; nobody gets a frame of the one that is gone.
        let n = managed.map(2 * MIB);
        (0..n.pages()).for_each(|i| n.write(i, 9_000 + i as u64));
        managed.space.page_out(n.addr, n.addr + n.len, true);
        assert!(on(&n, 1) > 400, "{}", on(&n, 1));
        assert_eq!(managed.space.migrate(n.range(), Target::Device(0)).unwrap().moved(), 0);
        assert_eq!((managed.used(0), takes(&managed, 0)), (0, 0));
        assert!((0..n.pages()).all(|i| n.is(i, 9_000 + i as u64)));
        let again = managed.space.remove_device(0, SHORT);
        assert_eq!(again, Err(UnregisterError::NotLive(NotLive::Unregistered)));
        assert_eq!(managed.space.remove_device(7, SHORT), again);
        drop((m, n));
        managed.assert_all_free();
    }
}

#[test]
fn the_last_device_goes_if_dram_has_room_for_its_pages() {
    let managed = Managed::new(16 * MIB, &["mem:32M"]);
    let m = managed.map(4 * MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
    managed.space.remove_device(0, LONG).unwrap();
    assert_eq!((managed.used(0), takes(&managed, 0), m.resident_count()), (0, 0, m.pages()));
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn pages_that_find_no_room_keep_the_device() {
    let managed = Managed::new(8 * MIB, &["mem:32M"]);
    let m = managed.map(20 * MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    managed.space.page_out(m.addr, m.addr + m.len, true);
    let error = managed.space.remove_device(0, SHORT).unwrap_err();
    assert!(error.to_string().contains("page entry of process slot"), "{error}");
    assert!(managed.space.domain.stats().dram_peak <= 9 << 20, "{:?}", managed.space.domain.stats());
    assert!(managed.space.keep_device(0) && !managed.space.keep_device(0));
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)), "all of it, through the budget once more");
    drop(m);
    managed.assert_all_free();
}

#[test]
fn who_holds_a_frame_is_named_and_waited_for() {
    let managed = Managed::new(16 * MIB, &["mem:16M", "mem:16M"]);
    let m = managed.map(MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
    let space = managed.space;
    let frame = space.on_devices(m.at(7), m.at(8))[0].frame;
    let hold = space.domain.pagemap(0).hold(space.me(), HolderKind::Pin, frame, 1).unwrap();
    let error = space.remove_device(0, SHORT).unwrap_err().to_string();
    let me = space.me();
    assert_eq!(
        error,
        format!("1 frame of mem:16M is still held: frame {frame} (1 reference: 1 pin of process slot {me})")
    );
    assert_eq!((managed.used(0), on(&m, 1)), (1, m.pages()), "all that could move has moved");
    std::thread::scope(|s| {
        let going = s.spawn(|| space.remove_device(0, LONG));
        std::thread::sleep(SHORT);
        assert!(!going.is_finished());
        drop(hold);
        going.join().unwrap().unwrap();
    });
    assert_eq!((managed.used(0), takes(&managed, 0)), (0, 0));
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn pages_that_a_child_has_too_are_waited_for() {
    if !managed::alone("pages_that_a_child_has_too_are_waited_for") {
        return;
    }
    let managed = Managed::new(16 * MIB, &["mem:16M", "mem:16M"]);
    let m = managed.map(MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    managed.space.migrate(m.range(), Target::Device(0)).unwrap();
    let child = managed.fork(|| {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    });
    let error = managed.space.remove_device(0, SHORT).unwrap_err();
    let UnregisterError::Held { total, held, .. } = &error else { panic!("{error}") };
    let theirs = |h: &farpage::pagemap::Holder| (h.owner != managed.space.me(), h.kind, h.refs);
    assert_eq!(*total, m.pages());
    assert!(
        held.iter().all(|h| h.refs == 1 && theirs(&h.holders[0]) == (true, HolderKind::Entry, 1)),
        "{error}"
    );
    // SAFETY: our child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert!(!managed::ended_well(child));
    for _ in 0..100 {
        if managed.reap() != 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    managed.space.remove_device(0, LONG).unwrap();
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

/// Devices go while threads write, evictions and migrations are under way: what was written is there, and the device really goes.
#[test]
fn amid_everything() {
    const PAGES: usize = 2048;
    for devices in [["mem:16M", "ram:16M", "mem:16M"], ["ram:16M", "mem:16M", "ram:16M"]] {
        let managed = Managed::new(4 * MIB, &devices);
        let m = managed.map(PAGES * PAGE_SIZE);
        (0..PAGES).for_each(|i| m.write(i, i as u64));
        let (stop, touched) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|s| {
            let (m, managed, stop, touched) = (&m, &managed, &stop, &touched);
            for me in 0..2usize {
                s.spawn(move || {
                    let mut x = me as u64 + 1;
                    let mut seeds: Vec<u64> = (0..PAGES as u64).collect();
                    while !stop.load(Ordering::SeqCst) {
                        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let i = (x >> 33) as usize % (PAGES / 2) * 2 + me;
                        assert!(m.is(i, seeds[i]), "page {i}");
                        if x >> 62 == 0 {
                            seeds[i] += 1 << 32;
                            m.write(i, seeds[i]);
                        }
                        touched.fetch_add(1, Ordering::Relaxed);
                    }
                    assert!((me..PAGES).step_by(2).all(|i| m.is(i, seeds[i])));
                });
            }
            s.spawn(move || {
                for to in [0u8, 1, 2].into_iter().cycle() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    managed.space.migrate(m.part(300, 900), Target::Device(to)).unwrap();
                    managed.space.page_out(m.at(900), m.at(1500), true);
                }
            });
            std::thread::sleep(Duration::from_millis(150));
            for dev in [0, 1] {
                assert!(managed.used(dev) > 0 && touched.swap(0, Ordering::Relaxed) > 0);
                managed.space.remove_device(dev, LONG).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!((managed.used(dev), takes(managed, dev)), (0, 0));
                std::thread::sleep(Duration::from_millis(150));
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!((on(&m, 0), on(&m, 1), managed.used(0), managed.used(1)), (0, 0, 0, 0));
        drop(m);
        managed.assert_all_free();
    }
}
