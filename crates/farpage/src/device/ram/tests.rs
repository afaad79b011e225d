//! Tests of the compressed pool: contents, waste, recovery after a death, corruption.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::device::spec::Spec;
use crate::device::testing::{
    self, Living, ME, Random, in_child, load, load_all, page, page_with, status, store, store_all,
};

fn ram(size: &str) -> (Ram, Arc<Living>) {
    let spec: Spec = format!("ram:{size}").parse().unwrap();
    let (attach, peers) = testing::attach(&spec);
    (Ram::attach(spec.size().unwrap(), attach), peers)
}

fn check(ram: &Ram) {
    ram.pool.lock(ME, &*ram.peers).check();
}

/// Stores `pages` and checks that each comes back, alone and in a batch, with its checksum.
fn round_trip(dev: &dyn Device, pages: &[(Pfn, Page)]) {
    assert!(store_all(dev, pages).iter().all(Result::is_ok));
    let pfns: Vec<_> = pages.iter().map(|(pfn, _)| *pfn).collect();
    for ((pfn, page), loaded) in pages.iter().zip(load_all(dev, &pfns)) {
        let (bytes, sum) = loaded.unwrap();
        assert!(bytes.0 == page.0, "frame {pfn}");
        assert_eq!(sum, Sum::of(page));
        assert_eq!(dev.sum(*pfn), sum);
        assert!(load(dev, *pfn).unwrap().0 == page.0);
    }
}

#[test]
fn pages_of_every_kind_come_back() {
    let (ram, _) = ram("4M");
    let text: Vec<u8> = b"one page and another page of words ".iter().copied().cycle().take(4096).collect();
    let mut pages = vec![(7000, Page(text.try_into().unwrap())), (7001, Page([0; 4096]))];
    pages.extend((0..150).map(|n| (n * 3, page_with(n, n as usize * 4096 / 149))));
    round_trip(&ram, &pages);
    check(&ram);
}

#[test]
fn free_is_idempotent_and_returns_everything() {
    let (ram, _) = ram("4M");
    let pages: Vec<_> = (0..500).map(|n| (n, page(n))).collect();
    round_trip(&ram, &pages);
    assert!(ram.usage().payload > 500 * 2048 && ram.usage().used > ram.usage().payload);
    for _ in 0..2 {
        ram.free(&(0..500).collect::<Vec<_>>(), ME);
        check(&ram);
        assert_eq!(ram.usage().payload, 0);
        assert!(ram.usage().used <= 8 * CHUNK as u64, "{:?}", ram.usage());
    }
    assert_eq!(load(&ram, 3).err(), Some(DeviceError::Corrupt));
    assert_eq!(ram.sum(3), Sum::default());
}

#[test]
fn empty_chunks_go_back_to_the_kernel() {
    let (ram, _) = ram("16M");
    let pages: Vec<_> = (0..3000).map(|n| (n, page_with(n, 4096))).collect();
    assert!(store_all(&ram, &pages).iter().all(Result::is_ok));
    assert!(resident(&ram) >= 12 << 20);
    ram.free(&(0..3000).collect::<Vec<_>>(), ME);
    assert!(resident(&ram) <= 1 << 20, "{}", resident(&ram));
    assert!(ram.usage().peak >= 12 << 20 && ram.usage().used <= 1 << 20, "{:?}", ram.usage());
    round_trip(&ram, &pages[..100]);
}

/// Bytes of the pool that the kernel holds memory for.
fn resident(ram: &Ram) -> usize {
    let data = ram.pool.data();
    let mut pages = vec![0u8; data.len() / 4096];
    // SAFETY: the vector has a byte for each page of the range.
    assert_eq!(unsafe { libc::mincore(data.addr() as *mut _, data.len(), pages.as_mut_ptr()) }, 0);
    pages.iter().filter(|p| **p & 1 != 0).count() * 4096
}

#[test]
fn a_full_pool_says_so_and_goes_on() {
    let (ram, _) = ram("1M");
    let pages: Vec<_> = (0..400).map(|n| (n, page_with(n, 4096))).collect();
    let results = store_all(&ram, &pages);
    let fit = results.iter().filter(|r| r.is_ok()).count();
    assert!((232..=256).contains(&fit), "{fit}");
    assert!(results.iter().all(|r| matches!(r, Ok(()) | Err(DeviceError::Full))));
    for ((pfn, page), result) in pages.iter().zip(&results) {
        assert_eq!(load(&ram, *pfn).ok().map(|p| p.0), result.is_ok().then_some(page.0));
    }
    // Small pages fit nowhere either, until something is freed.
    assert_eq!(store(&ram, 900, &page(1)), Err(DeviceError::Full));
    ram.free(&[results.iter().position(Result::is_ok).unwrap() as Pfn], ME);
    assert_eq!(store(&ram, 900, &page(1)), Ok(()), "a slot that is too large will do");
    check(&ram);
}

#[test]
fn what_is_out_of_range_is_refused() {
    let (ram, _) = ram("1M");
    let einval = DeviceError::Io(libc::EINVAL);
    assert_eq!(store(&ram, ram.frames(), &page(0)), Err(einval.clone()));
    assert_eq!(load(&ram, u32::MAX).err(), Some(einval));
    ram.free(&[u32::MAX], ME);
    assert_eq!(ram.sum(u32::MAX), Sum::default());
}

/// Random stores and frees with pages of changing compressibility; contents, accounts and waste are checked.
#[test]
fn waste_stays_low_whatever_happens() {
    let (ram, _) = ram("64M");
    let mut random = Random(42);
    let mut model = HashMap::<Pfn, u32>::new();
    let make = |seed: u32| page_with(seed, 300 + seed as usize % 3700);
    let mut seed = 0;
    for round in 0..40 {
        // Each round likes another size, so that classes grow and shrink.
        let bias = random.below(3700) as u32;
        for _ in 0..8 {
            let mut batch = vec![];
            while model.len() + batch.len() < 12_000 && batch.len() < 64 * (1 + round % 3) {
                seed += 1;
                let pfn = random.below(60_000) as Pfn;
                if !model.contains_key(&pfn) && !batch.iter().any(|(p, _, _)| *p == pfn) {
                    let s = seed * 3700 + (bias + random.below(400) as u32) % 3700;
                    batch.push((pfn, s, make(s)));
                }
            }
            let pages: Vec<_> = batch.iter().map(|(pfn, _, page)| (*pfn, page.clone())).collect();
            assert!(store_all(&ram, &pages).iter().all(Result::is_ok));
            model.extend(batch.iter().map(|(pfn, seed, _)| (*pfn, *seed)));
        }
        if round % 4 == 3 {
            let mut gone: Vec<_> = model.keys().copied().collect();
            gone.sort_unstable();
            gone.retain(|_| random.below(3) != 0);
            gone.chunks(64).for_each(|some| ram.free(some, ME));
            model.retain(|pfn, _| gone.binary_search(pfn).is_err());
        }
        check(&ram);
        let usage = ram.usage();
        if usage.payload > 8 << 20 {
            let waste = usage.used as f64 / usage.payload as f64;
            assert!(waste <= 1.15, "round {round}: {waste} {usage:?}");
        }
    }
    for (pfn, seed) in &model {
        assert!(load(&ram, *pfn).unwrap().0 == make(*seed).0, "frame {pfn}");
    }
}

thread_local! {
    /// What happens in this thread between a reader's look at the location and his copying of the bytes.
    static INTERRUPT: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

pub fn interrupt() {
    // Taken out first: what happens may read as well.
    let happens = INTERRUPT.with_borrow_mut(Option::take);
    if let Some(happens) = happens {
        happens();
    }
}

/// An object is moved, and its old place used for another, after a reader has found out where it is.
#[test]
fn a_reader_who_is_late_looks_again() {
    let ram: &'static Ram = Box::leak(Box::new(ram("4M").0));
    let pages: Vec<_> = (0..1200).map(|n| (n, page(n))).collect();
    assert!(store_all(ram, &pages).iter().all(Result::is_ok));
    let kept: Vec<Pfn> = (0..1200).filter(|n| n % 5 == 0).collect();
    let gone: Vec<Pfn> = (0..1200).filter(|n| n % 5 != 0).collect();
    let word = |pfn: Pfn| ram.pool.locs()[pfn as usize].load(Ordering::Relaxed);
    // `free` itself may compact; enough is left to be moved.
    ram.free(&gone, ME);
    for pfn in kept {
        let before = word(pfn);
        INTERRUPT.set(Some(Box::new(move || {
            let held = ram.pool.lock(ME, &*ram.peers);
            held.compact(1000, true);
            drop(held);
            let others: Vec<_> = (2000..2900).map(|n| (n, page(n))).collect();
            assert!(store_all(ram, &others).iter().all(Result::is_ok));
        })));
        assert!(load(ram, pfn).unwrap().0 == page(pfn).0, "frame {pfn}");
        if word(pfn) != before {
            return;
        }
        ram.free(&(2000..2900).collect::<Vec<_>>(), ME);
    }
    panic!("no object was moved while it was being read");
}

/// Threads load frames that never change while others make compaction move them.
#[test]
fn readers_see_whole_pages_while_objects_move() {
    let (ram, _) = ram("16M");
    let ram = &ram;
    let kept: Vec<Pfn> = (0..2000).map(|n| n * 4).collect();
    let pages: Vec<_> = (0..8000).map(|n| (n, page(n))).collect();
    assert!(store_all(ram, &pages[..6000]).iter().all(Result::is_ok));
    let stop = AtomicBool::new(false);
    let moves = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let moved = |pfn: u32| {
                Loc::unpack(ram.pool.locs()[pfn as usize].load(Ordering::Relaxed)).map_or(0, |loc| loc.moves)
            };
            for round in 0..5 {
                let others: Vec<_> = (0..6000).filter(|n| n % 4 != 0).collect();
                others.chunks(64).for_each(|some| ram.free(some, ME));
                let held = ram.pool.lock(ME, &*ram.peers);
                held.compact(1000, true);
                drop(held);
                let again: Vec<_> = others.iter().map(|n| (*n, page(n + round * 7919))).collect();
                assert!(store_all(ram, &again).iter().all(Result::is_ok));
            }
            moves.store((0..1500).map(|n| moved(n * 4)).sum(), Ordering::Relaxed);
            stop.store(true, Ordering::Relaxed);
        });
        let mut random = Random(7);
        while !stop.load(Ordering::Relaxed) {
            let pfn = kept[random.below(1500)];
            let mut loaded = Page([0; 4096]);
            let mut ops = [LoadOp { pfn, page: &mut loaded, result: Err(DeviceError::Corrupt) }];
            ram.load(&mut ops);
            let sum = ops[0].result.clone().expect("a moved object is still there");
            assert_eq!(sum, Sum::of(&loaded));
            assert_eq!(sum, Sum::of(&pages[pfn as usize].1));
        }
    });
    assert!(moves.load(Ordering::Relaxed) > 100, "objects were moved: {moves:?}");
    check(ram);
}

#[test]
fn nonsense_in_the_pool_is_corrupt_and_nothing_worse() {
    let (ram, _) = ram("1M");
    let mut random = Random(99);
    let pages: Vec<_> = (0..200).map(|n| (n, page_with(n, 1000))).collect();
    assert!(store_all(&ram, &pages).iter().all(Result::is_ok));
    let data = ram.pool.data();
    let mut wrong = 0;
    for _ in 0..20_000 {
        let (at, byte) = (random.below(300 << 10), random.next() as u8);
        data.write(at, &[byte]);
        let pfn = random.below(200) as u32;
        let mut page = Page([0; 4096]);
        let mut ops = [LoadOp { pfn, page: &mut page, result: Err(DeviceError::Corrupt) }];
        ram.load(&mut ops);
        let result = ops[0].result.clone();
        wrong += usize::from(result != Ok(Sum::of(&page)));
    }
    assert!(wrong > 1000, "{wrong}");
    for _ in 0..20_000 {
        let pfn = random.below(200);
        ram.pool.locs()[pfn].store(random.next() << random.below(40) as u32, Ordering::Relaxed);
        let mut page = Page([0; 4096]);
        ram.load(&mut [LoadOp { pfn: pfn as u32, page: &mut page, result: Err(DeviceError::Corrupt) }]);
    }
}

#[test]
fn processes_share_the_pool() {
    let (ram, _) = ram("8M");
    let children: Vec<_> = (0..3u32)
        .map(|child| {
            in_child(|| {
                let owner = child as u16 + 2;
                let mine = |n: u32| n * 3 + child;
                for round in 0..6 {
                    let pages: Vec<_> = (0..300).map(|n| (mine(n), page(mine(n) + round * 1000))).collect();
                    round_trip(&ram, &pages);
                    if round < 5 {
                        ram.free(&(0..300).map(mine).collect::<Vec<_>>(), owner);
                    }
                }
            })
        })
        .collect();
    for child in children {
        assert_eq!(status(child), 0);
    }
    check(&ram);
    for n in 0..900 {
        assert!(load(&ram, n).unwrap().0 == page(n + 5000).0, "{n}");
    }
}

/// Kills a process in the middle of storing and freeing, many times. What others have stored stays; what it had
/// is freed by whoever cleans up; and nothing is lost of the pool.
#[test]
fn a_killed_process_leaves_a_sound_pool() {
    let (ram, peers) = ram("8M");
    let kept: Vec<_> = (0..400).map(|n| (n * 2, page_with(n, 200 + n as usize * 9))).collect();
    assert!(store_all(&ram, &kept).iter().all(Result::is_ok));
    let before = ram.usage().payload;
    let mut random = Random(5);
    let mut held_at_death = 0;
    let started = Box::leak(Box::new(testing_flag()));
    for round in 0..60u16 {
        let owner = round + 10;
        started.store(0, Ordering::SeqCst);
        let child = in_child(|| {
            let mine: Vec<Pfn> = (0..400).map(|n| n * 2 + 1).collect();
            let pages: Vec<_> = mine.iter().map(|n| (*n, page_with(*n, *n as usize % 3000))).collect();
            started.store(1, Ordering::SeqCst);
            loop {
                for some in pages.chunks(64) {
                    let mut ops: Vec<_> = some
                        .iter()
                        .map(|(pfn, page)| StoreOp { pfn: *pfn, page, sum: Sum::default(), result: Ok(()) })
                        .collect();
                    ram.store(&mut ops, owner);
                }
                mine.chunks(50).for_each(|some| ram.free(some, owner));
            }
        });
        while started.load(Ordering::SeqCst) == 0 {
            crate::sys::yield_now();
        }
        for _ in 0..random.below(20_000) {
            std::hint::spin_loop();
        }
        // SAFETY: our child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert_eq!(status(child), libc::SIGKILL);
        peers.dead.lock().unwrap().insert(owner);
        held_at_death += usize::from(ram.pool.holder() == u32::from(owner));
        ram.repair(ME);
        check(&ram);
        ram.free(&(0..400).map(|n| n * 2 + 1).collect::<Vec<_>>(), ME);
        check(&ram);
        assert_eq!(ram.usage().payload, before);
    }
    eprintln!("killed {held_at_death} times of 60 while holding the lock");
    for (pfn, page) in &kept {
        assert!(load(&ram, *pfn).unwrap().0 == page.0);
    }
}

/// A word that a child shares.
fn testing_flag() -> &'static AtomicU32 {
    &crate::sys::SharedArea::anonymous(4096).unwrap().atomics32()[0]
}

/// Rebuilding from the locations gives what was there, for a pool with every kind of chunk.
#[test]
fn a_rebuilt_pool_is_the_same_pool() {
    let (ram, peers) = ram("8M");
    let pages: Vec<_> = (0..1500).map(|n| (n, page_with(n, n as usize * 4096 / 1500))).collect();
    assert!(store_all(&ram, &pages).iter().all(Result::is_ok));
    let gone: Vec<_> = (0..1500).filter(|n| n % 3 == 0 || (500..800).contains(n)).collect();
    ram.free(&gone, ME);
    let before = ram.usage();
    // A holder that dies: the lock is taken over, with everything derived overwritten by nonsense.
    let held = ram.pool.lock(77, &*ram.peers);
    held.scramble();
    std::mem::forget(held);
    peers.dead.lock().unwrap().insert(77);
    ram.repair(ME);
    check(&ram);
    assert_eq!(ram.usage().payload, before.payload);
    for (pfn, page) in &pages {
        assert_eq!(load(&ram, *pfn).is_ok_and(|p| p.0 == page.0), !gone.contains(pfn));
    }
    round_trip(&ram, &pages);
}
