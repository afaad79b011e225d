//! Exclusive access, and compaction.

mod managed;

use farpage::PAGE_SIZE;
use farpage::migrate::Target;
use farpage::space::exclusive::ExclusiveError;
use farpage::space::snapshot::Place;
use managed::{Managed, ended_well};

const MIB: usize = 1 << 20;

#[test]
fn the_device_has_it_until_the_cpu_touches_it() {
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    let device = managed.space.exclusive(m.range()).unwrap();
    assert_eq!(device.pages(), 256);
    let state = managed.space.snapshot(m.range()).unwrap();
    assert!(state.iter().all(|p| p.exclusive() && p.place == Place::Staged));
    assert_eq!(m.resident_count(), 0);
    // The device reads what the CPU wrote and writes what the CPU reads, over page boundaries.
    let mut seen = vec![0; 3 * PAGE_SIZE];
    device.read(m.at(4) + 32, &mut seen).unwrap();
    assert_eq!(seen[..8], [4u64.to_ne_bytes()].concat()[..]);
    device.write(m.at(9) + 4000, &[7; 200]).unwrap();
    assert_eq!(device.pages(), 256);
    assert_eq!((m.bytes(9)[3999 + 1], m.bytes(10)[103], m.bytes(10)[104] == 7), (7, 7, false));
    assert!(!device.is_still_exclusive(m.at(9)) && !device.is_still_exclusive(m.at(10)));
    assert_eq!(device.write(m.at(9), &[1]), Err(ExclusiveError::Lost(m.at(9))));
    assert!(device.is_still_exclusive(m.at(200)), "only the run that was touched came back");
    // Going to a device under pressure changes nothing for whoever has it.
    managed.space.page_out(m.addr, m.addr + m.len, true);
    assert!(device.is_still_exclusive(m.at(200)) && !device.is_still_exclusive(m.at(9)));
    device.write(m.at(200), &[9; PAGE_SIZE]).unwrap();
    assert_eq!(m.bytes(200), [9; PAGE_SIZE]);
    assert!(!device.is_still_exclusive(m.at(200)));
    assert_eq!(device.read(m.addr + m.len, &mut [0]), Err(ExclusiveError::Outside(m.addr + m.len)));
    drop(device);
    assert!(m.is(100, 100));
    drop(m);
    managed.assert_all_free();
}

/// Pages may be on their way to storage at that moment: what was copied of them then is not what they are.
#[test]
fn what_a_device_writes_stays_while_its_pages_are_stored() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::time::{Duration, Instant};
    const PAGES: usize = 64;
    let space =
        farpage::Domain::builder().dram("8M").device("inject:delay-store=50ms:ram:64M").build().unwrap();
    let space = space.start_inline().unwrap();
    let ours = space.region_from_fn(PAGES * 512, |i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).unwrap();
    let mut others = space.region::<u64>(24 << 17).unwrap();
    let at = |page: usize| ours.as_ptr() as usize + page * PAGE_SIZE + 8;
    let device = space.exclusive(ours.pages(..)).unwrap();
    let (until, enough) = (Instant::now() + Duration::from_secs(4), AtomicBool::new(false));
    let mut written = 0u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in (0..others.len()).step_by(512).cycle() {
                if enough.load(Relaxed) || Instant::now() > until {
                    break;
                }
                (0..512).for_each(|k| others[i + k] = (i * k) as u64 ^ 0x1234_5678_9abc);
            }
        });
        let mut last = [0u64; PAGES];
        while Instant::now() < until {
            for (page, last) in last.iter_mut().enumerate() {
                let mut bytes = [0; 8];
                if *last != 0 && device.read(at(page), &mut bytes).is_ok() {
                    let found = u64::from_ne_bytes(bytes);
                    enough.store(found != *last, Relaxed);
                    assert_eq!(found, *last, "page {page}, after {written} writes");
                }
                if device.write(at(page), &(written + 1).to_ne_bytes()).is_ok() {
                    written += 1;
                    *last = written;
                }
            }
        }
    });
    assert!(written >= PAGES as u64, "{written}");
}

#[test]
fn a_fork_takes_everything_back() {
    if !managed::alone("a_fork_takes_everything_back") {
        return;
    }
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    (0..256).for_each(|i| m.write(i, i as u64));
    let device = managed.space.exclusive(m.range()).unwrap();
    device.write(m.at(3), &3333u64.to_ne_bytes()).unwrap();
    let child = managed.fork(|| {
        assert_eq!(m.bytes(3)[..8], 3333u64.to_ne_bytes());
        assert!((10..256).all(|i| m.is(i, i as u64)));
    });
    assert_eq!(device.pages(), 0);
    assert!(ended_well(child));
    assert_eq!(m.bytes(3)[..8], 3333u64.to_ne_bytes());
    drop(device);
    drop(m);
    managed.assert_all_free();
}

#[test]
fn unmapped_pages_and_pinned_ones_are_not_exclusive() {
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(MIB);
    (0..200).for_each(|i| m.write(i, i as u64));
    let pin = managed.space.pin(m.part(5, 6), farpage::space::pin::Pin::Short, true).unwrap();
    let device = managed.space.exclusive(m.range()).unwrap();
    assert!(!device.is_still_exclusive(m.at(5)), "pinned");
    assert!(!device.is_still_exclusive(m.at(201)), "no page there");
    assert_eq!(device.pages(), 199);
    drop(pin);
    drop(m);
    assert_eq!(device.pages(), 0);
    drop(device);
    managed.assert_all_free();
}

#[test]
fn a_device_is_compacted_and_shrinks_while_in_use() {
    for (device, given) in [("mem:16M", true), ("ram:16M", false)] {
        let managed = Managed::new(64 * MIB, &[device]);
        let m = managed.map(12 * MIB);
        let n = m.pages();
        (0..n).for_each(|i| m.write(i, i as u64));
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), n);
        // Every third page comes back: holes all over the device.
        (0..n).step_by(3).for_each(|i| {
            managed.space.migrate(m.part(i, i + 1), Target::System).unwrap();
        });
        let used = n - n.div_ceil(3);
        assert_eq!(managed.used(0), used);
        let frames = &managed.space.domain.pagemap(0).frames;
        let highest = || (0..frames.len() as u32).filter(|&p| frames.count(p) != 0).max().unwrap() as usize;
        assert!(highest() >= n - 2);
        let compacted = managed.space.compact(0).unwrap();
        assert_eq!((compacted.stayed, compacted.in_use), (0, 0), "{device}");
        assert!(compacted.moved > 0);
        assert!(highest() < used.next_multiple_of(512), "the rest is free, in one run");
        assert_eq!(managed.used(0), used);
        assert_eq!(compacted.given_back > 0, given);
        // Smaller for good: what does not fit is refused, nothing is lost.
        let shrunk = managed.space.shrink(0, used as u32 + 10).unwrap();
        assert_eq!(shrunk.in_use, 0);
        let report = managed.space.migrate(m.range(), Target::Device(0)).unwrap();
        assert_eq!(report.moved(), 10);
        assert!((0..n).all(|i| m.is(i, i as u64)), "{device}");
        managed.space.shrink(0, u32::MAX).unwrap();
        assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().there(), n);
        drop(m);
        managed.assert_all_free();
    }
}

#[test]
fn shared_frames_stay_and_are_told() {
    if !managed::alone("shared_frames_stay_and_are_told") {
        return;
    }
    let managed = Managed::new(64 * MIB, &["mem:16M"]);
    let m = managed.map(4 * MIB);
    (0..1024).for_each(|i| m.write(i, i as u64));
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), 1024);
    managed.space.migrate(m.part(0, 512), Target::System).unwrap();
    let mut ends = [0; 2];
    // SAFETY: two descriptors come back.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = managed.fork(|| {
        // Until the parent has looked.
        // SAFETY: our own descriptors.
        unsafe {
            libc::close(ends[1]);
            libc::read(ends[0], [0u8; 1].as_mut_ptr().cast(), 1);
        }
        assert!((0..1024).all(|i| m.is(i, i as u64)));
    });
    let compacted = managed.space.compact(0).unwrap();
    assert_eq!((compacted.moved, compacted.stayed, compacted.in_use), (0, 512, 512));
    // SAFETY: our own descriptor.
    unsafe { libc::close(ends[1]) };
    assert!(ended_well(child));
    // SAFETY: our own descriptor.
    unsafe { libc::close(ends[0]) };
    assert!((0..1024).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}
