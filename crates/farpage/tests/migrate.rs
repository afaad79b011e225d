//! Migration: what moves, what does not and why, and that nothing is lost.

mod common;

use common::{Managed, ended_well};
use farpage::PAGE_SIZE;
use farpage::migrate::{MigrateError, Outcome, Refusal, Target};
use farpage::space::pin::Pin;
use farpage::space::snapshot::Place;

const MIB: usize = 1 << 20;

fn places(m: &common::Memory) -> Vec<Place> {
    m.space.snapshot(m.range()).unwrap().iter().map(|p| p.place).collect()
}

#[test]
fn a_range_goes_to_a_device_and_comes_back() {
    for device in ["mem:32M", "ram:32M"] {
        let managed = Managed::new(64 * MIB, &[device]);
        let m = managed.map(8 * MIB + 12 * PAGE_SIZE);
        let n = m.pages();
        for round in 0..3 {
            (0..n).for_each(|i| m.write(i, (round * n + i) as u64));
            let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
            assert_eq!(report.moved(), n, "{device}: {:?}", report.refused().next());
            assert_eq!(managed.used(0), n, "{device}");
            assert_eq!(m.resident_count(), 0, "{device}: really out of the process");
            assert!(places(&m).iter().all(|p| *p == Place::Device(0)));
            let again = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
            assert!(again.pages.iter().all(|o| *o == Outcome::There));
            // A quarter by the CPU, the rest on request.
            let quarter = n / 4;
            assert!((0..quarter).all(|i| m.is(i, (round * n + i) as u64)));
            let report = managed.space.migrate(m.range(), Target::System).unwrap();
            assert_eq!(report.there(), n);
            assert!(report.moved() <= n - quarter);
            assert_eq!(m.resident_count(), n);
            assert!((0..n).all(|i| m.is(i, (round * n + i) as u64)), "{device}, round {round}");
        }
        drop(m);
        managed.assert_all_free();
    }
}

#[test]
fn what_migrates_back_leaves_no_copy_behind() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(2 * MIB);
    (0..512).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.part(0, 300), Target::Device(0)).unwrap().moved(), 300);
    assert_eq!(managed.space.migrate(m.part(100, 200), Target::System).unwrap().moved(), 100);
    assert_eq!(managed.used(0), 200);
    assert!((0..512).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn holes_and_zeros_get_frames_without_being_faulted_in() {
    let managed = Managed::new(64 * MIB, &["mem:32M", "ram:8M"]);
    let m = managed.map(4 * MIB);
    m.write(3, 3);
    let zeros = m.bytes(5); // read: the kernel's page of zeros
    assert_eq!(zeros, [0; PAGE_SIZE]);
    let before = managed.space.domain.charged();
    let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
    assert_eq!(report.moved(), 1024, "{:?}", report.refused().next());
    assert_eq!(managed.used(0), 1024);
    assert!(managed.space.domain.charged() <= before, "holes took no DRAM");
    assert_eq!(managed.space.migrate(m.range(), Target::Device(1)).unwrap().moved(), 1024);
    assert_eq!((managed.used(0), managed.used(1)), (0, 1024));
    assert!(m.is(3, 3));
    assert!((0..1024).filter(|i| *i != 3).all(|i| m.bytes(i) == [0; PAGE_SIZE]));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn reclaimed_pages_of_one_value_get_frames_too() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(MIB);
    for i in 0..256 {
        // SAFETY: our mapping.
        unsafe { std::ptr::write_bytes(m.at(i) as *mut u8, i as u8, PAGE_SIZE) };
    }
    managed.space.page_out(m.addr, m.addr + m.len, true);
    assert!(places(&m).iter().all(|p| *p == Place::Same));
    assert_eq!(managed.used(0), 0);
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 256);
    assert_eq!(managed.used(0), 256);
    assert!((0..256).all(|i| m.bytes(i) == [i as u8; PAGE_SIZE]));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn refusals_say_why_and_stop_nobody_else() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(4 * MIB);
    (0..1024).for_each(|i| m.write(i, i as u64));
    let pin = managed.space.pin(m.part(10, 13), Pin::Short, true).unwrap();
    let hold = managed.space.hold(m.at(600), m.at(601));
    // SAFETY: our mapping.
    unsafe {
        assert_eq!(libc::mprotect(m.at(100) as *mut _, 5 * PAGE_SIZE, libc::PROT_READ), 0);
        assert_eq!(libc::mlock(m.at(200) as *const _, PAGE_SIZE), 0);
    }
    let beyond = m.addr..m.addr + m.len + 3 * PAGE_SIZE;
    // SAFETY: nobody's address just above our mapping, or the call fails.
    let foreign = unsafe {
        libc::mmap(
            (m.addr + m.len) as *mut _,
            PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    let report = managed.space.migrate(beyond, Target::Device(0)).unwrap();
    let why = |i: usize| report.pages[i];
    (10..13).for_each(|i| assert_eq!(why(i), Outcome::Refused(Refusal::Pinned), "{i}"));
    (100..105).for_each(|i| assert_eq!(why(i), Outcome::Refused(Refusal::ReadOnly), "{i}"));
    assert_eq!(why(200), Outcome::Refused(Refusal::Locked));
    (1024..1027).for_each(|i| assert_eq!(why(i), Outcome::Refused(Refusal::Unmanaged), "{i}"));
    assert_eq!(why(600), Outcome::Refused(Refusal::Pinned));
    assert_eq!(report.moved(), 1024 - 3 - 5 - 1 - 1);
    let state = managed.space.snapshot(m.range()).unwrap();
    assert!(state[10].pinned() && state[10].place == Place::System && !state[13].pinned());
    assert!(!state[100].writable() && state[100].readable() && state[99].writable());
    drop((pin, hold));
    assert_eq!(managed.space.migrate(m.part(10, 13), Target::Device(0)).unwrap().moved(), 3);
    assert!((0..1024).all(|i| m.is(i, i as u64)));
    if foreign != libc::MAP_FAILED {
        // SAFETY: mapped above.
        unsafe { libc::munmap(foreign, PAGE_SIZE) };
    }
    drop(m);
    managed.assert_all_free();
}

#[test]
fn bad_input_is_an_error() {
    let managed = Managed::new(64 * MIB, &["mem:1M"]);
    let m = managed.map(MIB);
    let err = |r: std::ops::Range<usize>, to| managed.space.migrate(r, to).unwrap_err();
    assert!(matches!(err(m.addr..m.addr + 5, Target::System), MigrateError::Range { .. }));
    assert!(matches!(err(m.addr + 1..m.addr + 4097, Target::System), MigrateError::Range { .. }));
    assert!(matches!(err(m.addr..m.addr, Target::System), MigrateError::Range { .. }));
    assert!(matches!(err(m.addr..usize::MAX - 4095, Target::System), MigrateError::Range { .. }));
    assert_eq!(err(m.range(), Target::Device(1)), MigrateError::NoDevice(1));
    let nothing = managed.space.migrate(PAGE_SIZE..3 * PAGE_SIZE, Target::Device(0)).unwrap();
    assert!(nothing.refused().all(|(_, why)| why == Refusal::Unmanaged) && nothing.there() == 0);
}

#[test]
fn a_full_device_takes_what_it_can_and_the_rest_stays() {
    let managed = Managed::new(64 * MIB, &["mem:1M"]);
    let m = managed.map(2 * MIB);
    (0..400).for_each(|i| m.write(i, i as u64));
    let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
    assert_eq!(report.moved(), 256);
    assert!(report.refused().all(|(_, why)| why == Refusal::NoMemory));
    assert_eq!(managed.used(0), 256);
    assert!((0..400).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn stores_that_fail_refuse_their_own_page() {
    for device in ["inject:fail-store=%7:mem:16M", "inject:fail-store=%7:ram:16M"] {
        let managed = Managed::new(64 * MIB, &[device]);
        let m = managed.map(4 * MIB);
        (0..900).for_each(|i| m.write(i, i as u64));
        let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
        let failed = report.refused().count();
        assert!(report.refused().all(|(_, why)| why == Refusal::Device), "{:?}", report.refused().next());
        assert_eq!(failed, 1024 / 7, "{device}");
        assert_eq!(managed.used(0), 1024 - failed);
        assert!((0..900).all(|i| m.is(i, i as u64)));
        drop(m);
        managed.assert_all_free();
    }
}

#[test]
fn loads_that_fail_leave_the_page_on_its_device() {
    // Enough in a row that the attempts of some pages are used up, and then no more.
    let managed = Managed::new(64 * MIB, &["inject:fail-load=1x600:mem:16M", "mem:16M"]);
    let m = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 256);
    let report = managed.space.migrate(m.range(), Target::System).unwrap();
    let refused: Vec<_> = report.refused().collect();
    assert!(refused.iter().all(|(_, why)| *why == Refusal::Device), "{refused:?}");
    assert!(!refused.is_empty() && refused.len() <= 20, "{}", refused.len());
    assert_eq!(managed.used(0), refused.len());
    // It is not lost: the device gives it now.
    assert!((0..256).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn to_another_device_with_failures_on_both_sides() {
    let managed = Managed::new(64 * MIB, &["inject:fail-load=%50:ram:16M", "inject:fail-store=%11:mem:16M"]);
    let m = managed.map(2 * MIB);
    (0..512).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 512);
    let report = managed.space.migrate(m.range(), Target::Device(1)).unwrap();
    assert!(report.refused().all(|(_, why)| why == Refusal::Device));
    assert!(report.moved() > 400, "{}", report.moved());
    assert_eq!(managed.used(0), 512 - report.moved());
    assert_eq!(managed.used(1), report.moved());
    assert!((0..512).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn after_a_fork_each_has_its_own_and_counts_agree() {
    if !common::alone("after_a_fork_each_has_its_own_and_counts_agree") {
        return;
    }
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(2 * MIB);
    (0..512).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.part(0, 256), Target::Device(0)).unwrap().moved(), 256);
    let child = managed.fork(|| {
        assert_eq!(managed.space.domain.pagemap(0).frames.count(first_frame(&managed)), 2);
        // What is shared in DRAM becomes the child's own and moves; what is on the device is already.
        let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
        assert_eq!((report.moved(), report.there()), (256, 512), "{:?}", report.refused().next());
        (0..512).step_by(3).for_each(|i| m.write(i, 1_000 + i as u64));
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().there(), 512);
        assert!((0..512).all(|i| m.is(i, if i % 3 == 0 { 1_000 + i as u64 } else { i as u64 })));
    });
    assert!(ended_well(child));
    assert!((0..512).all(|i| m.is(i, i as u64)));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().there(), 512);
    assert!((0..512).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

fn first_frame(managed: &Managed) -> u32 {
    let frames = &managed.space.domain.pagemap(0).frames;
    (0..frames.len() as u32).find(|&pfn| frames.count(pfn) != 0).unwrap()
}

#[test]
fn the_kernels_pins_are_respected() {
    // A page given to a pipe is held by a plain reference and moves; its frame must not be used again meanwhile. One that
    // an io_uring has registered is pinned and stays.
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(2 * MIB);
    (0..512).for_each(|i| m.write(i, i as u64));
    let ring = match io_uring::IoUring::new(4) {
        Ok(ring) => ring,
        Err(e) => return eprintln!("skipped: no io_uring here ({e})"),
    };
    let buffer = libc::iovec { iov_base: m.at(64) as *mut _, iov_len: 2 * PAGE_SIZE };
    // SAFETY: the buffer stays mapped until the ring is gone.
    unsafe { ring.submitter().register_buffers(&[buffer]).unwrap() };
    let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
    let refused: Vec<_> = report.refused().collect();
    assert_eq!(refused, [(m.at(64), Refusal::Pinned), (m.at(65), Refusal::Pinned)]);
    drop(ring);
    for _ in 0..100 {
        // The kernel lets go of a ring's buffers a moment after it is closed.
        if managed.space.migrate(m.part(64, 66), Target::Device(0)).unwrap().there() == 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(managed.used(0), 512);
    assert!((0..512).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn huge_pages_move_and_can_be_made_again() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let m = managed.map(4 * MIB);
    // SAFETY: our mapping.
    unsafe { libc::madvise(m.addr as *mut _, m.len, libc::MADV_HUGEPAGE) };
    (0..1024).for_each(|i| m.write(i, i as u64));
    let huge = |m: &common::Memory| m.space.snapshot(m.range()).unwrap().iter().filter(|p| p.huge()).count();
    if huge(&m) == 0 && managed.space.collapse(m.range()).unwrap() == 0 {
        return eprintln!("skipped: the kernel makes no huge pages here");
    }
    assert_eq!(managed.space.migrate(m.part(0, 512), Target::Device(0)).unwrap().moved(), 512);
    // Half of the other one: it is split.
    assert_eq!(managed.space.migrate(m.part(512, 700), Target::Device(0)).unwrap().moved(), 188);
    assert_eq!(huge(&m), 0);
    assert_eq!(managed.space.migrate(m.range(), Target::System).unwrap().moved(), 700);
    assert!((0..1024).all(|i| m.is(i, i as u64)));
    assert_eq!(managed.space.collapse(m.range()).unwrap(), 2);
    assert_eq!(huge(&m), 1024);
    assert!((0..1024).all(|i| m.is(i, i as u64)));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 1024);
    assert!((0..1024).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}
