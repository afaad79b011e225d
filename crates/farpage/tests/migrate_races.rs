//! Migrations that race everything else: no byte is lost and no reference is left.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Managed, Memory, ended_well};
use farpage::PAGE_SIZE;
use farpage::migrate::Target;
use farpage::space::pin::Pin;

const MIB: usize = 1 << 20;
const PAGES: usize = 1024;
const TIME: Duration = Duration::from_millis(1500);

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Each page is written by one thread only, which knows what it wrote last.
fn write_and_check(m: &Memory, me: usize, of: usize, until: Instant, seeds: &mut [u64]) -> u64 {
    let mut random = Random(me as u64 + 77);
    let mut n = 0;
    while Instant::now() < until {
        let i = random.below(PAGES / of) * of + me;
        assert!(m.is(i, seeds[i]), "page {i} is not what was written");
        if random.below(2) == 0 {
            seeds[i] += 1 << 32;
            m.write(i, seeds[i]);
        }
        n += 1;
    }
    n
}

fn race(devices: &[&str], others: impl Fn(&Managed, &Memory, Instant, &AtomicBool) + Sync) {
    let managed = Managed::new(6 * MIB, devices);
    let m = managed.map(PAGES * PAGE_SIZE);
    (0..PAGES).for_each(|i| m.write(i, i as u64));
    let until = Instant::now() + TIME;
    let moved = AtomicU64::new(0);
    let quiet = AtomicBool::new(false);
    let seeds: Vec<Vec<u64>> = std::thread::scope(|s| {
        let (m, managed, moved, quiet, others) = (&m, &managed, &moved, &quiet, &others);
        for k in 0..2u64 {
            s.spawn(move || {
                let mut random = Random(k + 1);
                while Instant::now() < until {
                    let (a, b) = (random.below(PAGES), random.below(PAGES) + 1);
                    let to = match random.below(devices.len() + 1) {
                        0 => Target::System,
                        dev => Target::Device(dev as u8 - 1),
                    };
                    let report = managed.space.migrate(m.part(a.min(b - 1), a.max(b)), to);
                    moved.fetch_add(
                        report.unwrap_or_else(|e| panic!("{e}")).moved() as u64,
                        Ordering::Relaxed,
                    );
                }
            });
        }
        s.spawn(move || others(managed, m, until, quiet));
        let writers: Vec<_> = (0..2)
            .map(|me| {
                s.spawn(move || {
                    let mut seeds: Vec<u64> = (0..PAGES as u64).collect();
                    assert!(write_and_check(m, me, 2, until, &mut seeds) > 100);
                    seeds
                })
            })
            .collect();
        writers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    assert!(moved.load(Ordering::Relaxed) > PAGES as u64);
    assert!((0..PAGES).all(|i| m.is(i, seeds[i % 2][i])), "what was written is there");
    drop(m);
    managed.assert_all_free();
    assert_eq!(managed.space.pinned(), 0);
}

#[test]
fn faults_writes_pins_and_other_migrations() {
    race(&["mem:16M", "ram:16M"], |managed, m, until, _| {
        let mut random = Random(5);
        while Instant::now() < until {
            let first = random.below(PAGES - 32);
            let range = m.part(first, first + 1 + random.below(31));
            // Reclaim holds back at times: then there is no room to pin, which is an answer.
            let Ok(pin) = managed.space.pin(range.clone(), Pin::Short, random.below(2) == 0) else {
                continue;
            };
            let resident = m.resident();
            let pages = (range.start - m.addr) / PAGE_SIZE..(range.end - m.addr) / PAGE_SIZE;
            assert!(pages.into_iter().all(|i| resident[i]), "pinned pages are there");
            drop(pin);
        }
    });
}

#[test]
fn devices_that_fail() {
    race(&["inject:fail-store=%13,fail-load=%17:mem:16M", "inject:full=%5:ram:16M"], |_, _, _, _| {});
}

#[test]
fn small_devices_and_reclaim() {
    race(&["mem:1M", "ram:2M", "mem:8M"], |managed, m, until, _| {
        while Instant::now() < until {
            managed.space.page_out(m.addr, m.addr + m.len, true);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn snapshots_and_compaction() {
    race(&["mem:16M", "ram:16M"], |managed, m, until, _| {
        while Instant::now() < until {
            assert_eq!(managed.space.snapshot(m.range()).unwrap().len(), PAGES);
            managed.space.compact(0).unwrap();
            managed.space.compact(1).unwrap();
        }
    });
}

#[test]
fn memory_that_is_unmapped_dropped_and_moved_meanwhile() {
    let managed = Managed::new(16 * MIB, &["mem:16M", "ram:16M"]);
    let (lo, hi) = (AtomicU64::new(0), AtomicU64::new(0));
    let until = Instant::now() + TIME;
    std::thread::scope(|s| {
        let (managed, lo, hi) = (&managed, &lo, &hi);
        for k in 0..2 {
            s.spawn(move || {
                let mut random = Random(k + 9);
                while Instant::now() < until {
                    let (start, end) = (lo.load(Ordering::SeqCst), hi.load(Ordering::SeqCst));
                    if start < end {
                        let to = [Target::Device(0), Target::Device(1), Target::System][random.below(3)];
                        managed.space.migrate(start as usize..end as usize, to).unwrap();
                    }
                }
            });
        }
        s.spawn(move || {
            let mut round = 0u64;
            while Instant::now() < until {
                round += 1;
                let mut m = managed.map(2 * MIB + (round as usize % 7) * PAGE_SIZE);
                (0..m.pages()).for_each(|i| m.write(i, round << 32 | i as u64));
                lo.store(m.addr as u64, Ordering::SeqCst);
                hi.store((m.addr + m.len) as u64, Ordering::SeqCst);
                assert!((0..m.pages()).all(|i| m.is(i, round << 32 | i as u64)), "round {round}");
                let (from, to) = (m.at(100), m.at(200));
                managed
                    .space
                    .change(|world| {
                        managed.space.discard(world, from, to, || {
                            // SAFETY: our mapping.
                            match unsafe { libc::madvise(from as *mut _, to - from, libc::MADV_DONTNEED) } {
                                0 => Ok(()),
                                _ => Err(rustix::io::Errno::INVAL),
                            }
                        })
                    })
                    .unwrap();
                assert!((100..200).all(|i| m.bytes(i) == [0; PAGE_SIZE]));
                let old = (m.addr, m.len);
                m.addr = managed
                    .space
                    .change(|world| {
                        managed.space.remap(world, old, old.1, None, false, |from, len, new_len, to| {
                            let nowhere = std::ptr::null_mut();
                            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                            let room = to.unwrap_or_else(|| {
                                // SAFETY: the kernel chooses the address; the mapping goes where it is told.
                                unsafe { libc::mmap(nowhere, new_len, libc::PROT_NONE, kind, -1, 0) as usize }
                            });
                            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                            // SAFETY: our own mapping; the target is ours as well.
                            let at = unsafe {
                                libc::mremap(from as *mut _, len, new_len, flags, room as *mut libc::c_void)
                            };
                            if at == libc::MAP_FAILED {
                                let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
                                return Err(rustix::io::Errno::from_raw_os_error(e));
                            }
                            Ok(at as usize)
                        })
                    })
                    .unwrap();
                let fine = |i: usize| {
                    if (100..200).contains(&i) {
                        m.bytes(i) == [0; PAGE_SIZE]
                    } else {
                        m.is(i, round << 32 | i as u64)
                    }
                };
                assert!((0..m.pages()).all(fine), "moved, round {round}");
            }
            assert!(round > 10);
        });
    });
    managed.assert_all_free();
}

#[test]
fn forks() {
    if !common::alone("forks") {
        return;
    }
    let managed = Managed::new(16 * MIB, &["mem:32M", "ram:32M"]);
    let m = managed.map(PAGES * PAGE_SIZE);
    (0..PAGES).for_each(|i| m.write(i, i as u64));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (m, managed, stop) = (&m, &managed, &stop);
        s.spawn(move || {
            let mut random = Random(3);
            while !stop.load(Ordering::SeqCst) {
                let to = [Target::Device(0), Target::System, Target::Device(1)][random.below(3)];
                managed.space.migrate(m.range(), to).unwrap();
            }
        });
        let mut children = Vec::new();
        for k in 0..12u64 {
            children.push(managed.fork(|| {
                for to in [Target::Device(1), Target::System, Target::Device(0)] {
                    managed.space.migrate(m.range(), to).unwrap();
                    assert!((0..PAGES).all(|i| m.is(i, i as u64)));
                }
                (0..PAGES).step_by(5).for_each(|i| m.write(i, k << 40 | i as u64));
                managed.space.migrate(m.range(), Target::Device(1)).unwrap();
                assert!((0..PAGES).step_by(5).all(|i| m.is(i, k << 40 | i as u64)));
            }));
            assert!((0..PAGES).step_by(7).all(|i| m.is(i, i as u64)));
            if children.len() == 3 {
                assert!(children.drain(..).all(ended_well));
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!((0..PAGES).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}
