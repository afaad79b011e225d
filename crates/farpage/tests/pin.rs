//! Pins: pages that stay, and what is counted of them.

mod common;

use common::{Managed, ended_well};
use farpage::PAGE_SIZE;
use farpage::migrate::{Refusal, Target};
use farpage::space::pin::{Pin, PinError};
use farpage::space::snapshot::Place;

const MIB: usize = 1 << 20;

#[test]
fn pinned_pages_are_there_and_stay() {
    let managed = Managed::new(16 * MIB, &["ram:64M"]);
    let m = managed.map(32 * MIB);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    // Away by now, most of it; the pin brings it in.
    let pin = managed.space.pin(m.part(100, 612), Pin::LongTerm, true).unwrap();
    assert_eq!((pin.addr(), pin.len(), pin.is_writable()), (m.at(100), 512 * PAGE_SIZE, true));
    assert_eq!((managed.space.pinned(), managed.space.pinned_long_term()), (512, 512));
    let resident = |m: &common::Memory| m.resident()[100..612].iter().filter(|r| **r).count();
    assert_eq!(resident(&m), 512);
    // Everything else goes round twice, through a budget that is half as large.
    for _ in 0..2 {
        assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
        assert_eq!(resident(&m), 512);
    }
    managed.space.page_out(m.addr, m.addr + m.len, true);
    assert_eq!(resident(&m), 512);
    let report = managed.space.migrate(m.part(0, 700), Target::Device(0)).unwrap();
    assert_eq!(report.refused().filter(|(_, why)| *why == Refusal::Pinned).count(), 512);
    assert_eq!(report.there(), 188);
    drop(pin);
    assert_eq!((managed.space.pinned(), managed.space.pinned_long_term()), (0, 0));
    managed.space.page_out(m.addr, m.addr + m.len, true);
    assert_eq!(resident(&m), 0);
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn overlapping_pins_count_each_and_end_each() {
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(2 * MIB);
    (0..512).for_each(|i| m.write(i, i as u64));
    let a = managed.space.pin(m.part(0, 300), Pin::Short, false).unwrap();
    let b = managed.space.pin(m.part(200, 400), Pin::Short, true).unwrap();
    assert_eq!((managed.space.pinned(), managed.space.pinned_long_term()), (500, 0));
    let stays = |n: usize| {
        let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
        assert!(report.refused().all(|(_, why)| why == Refusal::Pinned));
        assert_eq!(report.refused().count(), n);
    };
    stays(400);
    drop(a);
    stays(200);
    drop(b);
    stays(0);
    assert!((0..512).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn the_limit_is_kept_and_said() {
    let managed = Managed::new(16 * MIB, &["mem:32M"]);
    let m = managed.map(16 * MIB);
    let first = managed.space.pin(m.part(0, 1500), Pin::Short, true).unwrap();
    let over = managed.space.pin(m.part(1500, 3000), Pin::Short, true).err().unwrap();
    assert_eq!(over, PinError::Limit { asked: 1500, pinned: 1500, limit: 2048 });
    assert_eq!(
        over.to_string(),
        "1500 pages more than the 1500 that are pinned would exceed the limit of 2048"
    );
    assert_eq!(managed.space.pinned(), 1500, "what failed pins nothing");
    drop(first);
    drop(managed.space.pin(m.part(1500, 3000), Pin::Short, true).unwrap());
    assert_eq!(managed.space.pinned(), 0);
}

#[test]
fn what_cannot_be_pinned_says_why_and_pins_nothing() {
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    let pin = |r, write| managed.space.pin(r, Pin::Short, write).err().unwrap();
    assert!(matches!(pin(m.addr + 1..m.addr + 4097, false), PinError::Range { .. }));
    assert!(matches!(pin(m.addr..m.addr, false), PinError::Range { .. }));
    assert_eq!(pin(0..PAGE_SIZE, false), PinError::NotManaged(0));
    (0..256).for_each(|i| m.write(i, i as u64));
    // SAFETY: our mapping.
    unsafe { assert_eq!(libc::mprotect(m.at(9) as *mut _, PAGE_SIZE, libc::PROT_READ), 0) };
    assert_eq!(pin(m.range(), true), PinError::NoAccess(m.at(9), true));
    drop(managed.space.pin(m.range(), Pin::Short, false).unwrap());
    assert_eq!(managed.space.pinned(), 0);
    assert_eq!(managed.space.migrate(m.part(0, 9), Target::Device(0)).unwrap().moved(), 9);
}

#[test]
fn lost_pages_cannot_be_pinned() {
    let managed = Managed::new(64 * MIB, &["inject:fail-load=*:mem:16M"]);
    let m = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.part(7, 8), Target::Device(0)).unwrap().moved(), 1);
    assert_eq!(
        managed.space.pin(m.range(), Pin::Short, false).err(),
        Some(PinError::NoAccess(m.at(7), false))
    );
    assert_eq!(managed.space.pinned(), 0);
    assert_eq!(
        managed.space.snapshot(m.part(7, 8)).unwrap()[0].place,
        Place::Device(0),
        "not poisoned by a pin"
    );
    drop(m);
    managed.assert_all_free();
}

#[test]
fn unmapping_and_dropping_pinned_memory_is_allowed() {
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    let other = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    let pin = managed.space.pin(m.range(), Pin::Short, true).unwrap();
    let (start, end) = (m.at(3), m.at(5));
    managed
        .space
        .change(|world| {
            managed.space.discard(world, start, end, || {
                // SAFETY: our mapping; what it holds is given up.
                match unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_DONTNEED) } {
                    0 => Ok(()),
                    _ => Err(rustix::io::Errno::INVAL),
                }
            })
        })
        .unwrap();
    // The pin stays with the addresses.
    assert_eq!(m.bytes(3), [0; PAGE_SIZE]);
    m.write(3, 33);
    let report = managed.space.migrate(m.part(3, 4), Target::Device(0)).unwrap();
    assert_eq!(report.refused().next(), Some((m.at(3), Refusal::Pinned)));
    assert!(m.is(3, 33) && m.is(2, 2) && m.is(5, 5));
    drop(m);
    // The addresses may be anyone's now: what the pin counted was the old memory's.
    let again = managed.map(MIB);
    again.write(0, 1);
    assert_eq!(managed.space.migrate(again.part(0, 1), Target::Device(0)).unwrap().moved(), 1);
    drop(pin);
    let pin = managed.space.pin(again.range(), Pin::Short, true).unwrap();
    assert_eq!(managed.space.pinned(), 256);
    drop(pin);
    drop((again, other));
    assert_eq!(managed.space.pinned(), 0);
    managed.assert_all_free();
}

#[test]
fn a_child_inherits_no_pins_and_a_write_pin_is_on_its_own_page() {
    if !common::alone("a_child_inherits_no_pins_and_a_write_pin_is_on_its_own_page") {
        return;
    }
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    let pin = managed.space.pin(m.range(), Pin::Short, true).unwrap();
    let child = managed.fork(|| {
        assert_eq!(managed.space.pinned(), 0);
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 256);
        assert!((0..256).all(|i| m.is(i, i as u64)));
    });
    assert!(ended_well(child));
    drop(pin);
    // After a fork the pages are shared until they are written: the pin makes them this process's own.
    let pin = managed.space.pin(m.range(), Pin::Short, true).unwrap();
    assert!((0..256).all(|i| m.is(i, i as u64)));
    drop(pin);
    drop(m);
    managed.assert_all_free();
}

/// The kernel reads and writes the pinned addresses while everything around them moves.
#[test]
fn transfers_to_pinned_pages_are_whole() {
    use std::os::unix::fs::FileExt;
    let managed = Managed::new(8 * MIB, &["mem:64M"]);
    let m = managed.map(16 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.path().join("f"))
        .unwrap();
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    for round in 0..40usize {
        let first = round * 97 % (m.pages() - 64);
        let pin = managed.space.pin(m.part(first, first + 64), Pin::Short, true).unwrap();
        std::thread::scope(|s| {
            s.spawn(|| managed.space.migrate(m.range(), Target::Device(0)).unwrap());
            // SAFETY: pinned, and nobody writes it.
            file.write_all_at(unsafe { pin.as_slice() }, 0).unwrap();
        });
        drop(pin);
        let mut back = vec![0u64; 64 * PAGE_SIZE / 8];
        // SAFETY: plain words as bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(back.as_mut_ptr().cast::<u8>(), 64 * PAGE_SIZE) };
        file.read_exact_at(bytes, 0).unwrap();
        let at = bytes.as_ptr() as usize;
        assert!((0..64).all(|i| common::is_page(at + i * PAGE_SIZE, (first + i) as u64)), "round {round}");
    }
    assert!((0..m.pages()).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}
