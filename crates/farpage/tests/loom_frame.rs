//! The frame table in every interleaving: `RUSTFLAGS="--cfg loom" cargo test --release --test loom_frame`.
//!
//! A frame's storage is modelled by a cell that loom watches: using it without an ordering that the counts give is
//! reported. Crash models kill a process before each of its atomic operations in turn.
#![cfg(loom)]

use std::time::Duration;

use farpage::frame::platform::{AtomicU32, AtomicU64, Ordering, crash};
use farpage::frame::{FrameTable, GetError, Owner, Pfn};
use loom::cell::UnsafeCell;
use loom::model;
use loom::sync::Arc;
use loom::thread;

/// The process that cleans up after dead ones.
const REAPER: Owner = 4;

/// A table of frames with their storage, and the page entry of owners 1, 2 and 3 (0: none, else the frame + 1).
struct World {
    table: FrameTable,
    storage: Vec<UnsafeCell<u32>>,
    entries: [AtomicU32; 4],
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn world(frames: usize) -> Arc<World> {
    let words = Vec::leak((0..64).map(|_| AtomicU32::new(0)).collect());
    let hints = Vec::leak(vec![AtomicU64::new(0)]);
    let ranges = [0..frames as Pfn; 1];
    let [cursor, waiters, high] = [(); 3].map(|()| leak(AtomicU32::new(0)));
    Arc::new(World {
        table: FrameTable::new(words, hints, cursor, waiters, high).limited_to(&ranges),
        storage: (0..frames).map(|_| UnsafeCell::new(0)).collect(),
        entries: [(); 4].map(|()| AtomicU32::new(0)),
    })
}

impl World {
    fn write(&self, pfn: Pfn, value: u32) {
        // SAFETY: loom checks that nobody else uses the cell.
        self.storage[pfn as usize].with_mut(|p| unsafe { *p = value });
    }

    fn read(&self, pfn: Pfn) -> u32 {
        // SAFETY: loom checks that nobody else writes the cell.
        self.storage[pfn as usize].with(|p| unsafe { *p })
    }

    /// Hands back the storage of a frame whose last reference is gone.
    fn free(&self, pfn: Pfn) {
        self.write(pfn, 0);
        self.table.release(pfn);
    }

    /// Allocates, writes, publishes.
    fn evict(&self, owner: Owner) -> Option<Pfn> {
        let pfn = self.table.alloc(owner)?;
        assert_eq!(self.read(pfn), 0, "the storage was handed back");
        self.write(pfn, u32::from(owner));
        self.publish(owner, pfn);
        Some(pfn)
    }

    fn publish(&self, owner: Owner, pfn: Pfn) {
        self.entries[owner as usize].store(pfn + 1, Ordering::Release);
        self.table.settle(pfn);
    }

    /// Clears the owner's entry and puts its reference.
    fn drop_entry(&self, owner: Owner, pfn: Pfn) {
        self.table.begin_put(pfn, owner);
        self.entries[owner as usize].store(0, Ordering::Release);
        if self.table.put_in_transit(pfn, owner) {
            self.free(pfn);
        }
    }

    /// As `fork`: `child` gets a reference to a frame that the caller holds.
    fn share(&self, child: Owner, pfn: Pfn) {
        loop {
            match self.table.get_in_transit(pfn, child) {
                Ok(()) => return self.publish(child, pfn),
                Err(GetError::Transit) => thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        }
    }

    /// Cleans up after a dead owner: his transfers, then the reference of his entry.
    fn reap(&self, owner: Owner) {
        let entry = self.entries[owner as usize].load(Ordering::Acquire);
        for pfn in self.table.in_transit(owner) {
            if self.table.recover(pfn, owner, entry == pfn + 1) {
                self.free(pfn);
            }
        }
        if entry != 0 && self.table.put(entry - 1, REAPER) {
            self.free(entry - 1);
        }
    }
}

/// A thread with its own handle of the world.
fn spawn<T: 'static>(w: &Arc<World>, f: impl FnOnce(&World) -> T + 'static) -> thread::JoinHandle<T> {
    let w = w.clone();
    thread::spawn(move || f(&w))
}

#[test]
fn a_get_has_the_page_or_fails() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        let reader = spawn(&w, move |w| match w.table.get(pfn) {
            Ok(()) => {
                assert_eq!(w.read(pfn), 1);
                if w.table.put(pfn, 2) {
                    w.free(pfn);
                }
            }
            Err(e) => assert_eq!(e, GetError::Free),
        });
        w.drop_entry(1, pfn);
        reader.join().unwrap();
        assert_eq!(w.table.used(), 0);
    });
}

#[test]
fn two_puts_free_once_and_after_all_use() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        w.share(2, pfn);
        let other = spawn(&w, move |w| {
            assert_eq!(w.read(pfn), 1);
            w.drop_entry(2, pfn);
        });
        assert_eq!(w.read(pfn), 1);
        w.drop_entry(1, pfn);
        other.join().unwrap();
        assert_eq!((w.table.used(), w.read(pfn)), (0, 0));
    });
}

#[test]
fn a_frame_has_one_user_at_a_time_and_no_hint_is_lost() {
    model(|| {
        let w = world(1);
        let users = [1, 2].map(|owner| {
            spawn(&w, move |w| {
                let Some(pfn) = w.evict(owner) else { return false };
                assert_eq!(w.read(pfn), u32::from(owner));
                w.drop_entry(owner, pfn);
                true
            })
        });
        let served = users.map(|user| user.join().unwrap());
        assert!(served.contains(&true));
        assert_eq!(w.table.used(), 0);
        assert_eq!(w.evict(3), Some(0));
    });
}

#[test]
fn two_allocations_get_two_frames() {
    model(|| {
        let w = world(2);
        let other = spawn(&w, |w| w.evict(2).unwrap());
        let mine = w.evict(1).unwrap();
        assert_ne!(mine, other.join().unwrap());
        assert_eq!(w.table.alloc(1), None);
    });
}

#[test]
fn a_frozen_page_is_its_freezers_alone() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        let reader = spawn(&w, move |w| match w.table.get(pfn) {
            Ok(()) => {
                w.read(pfn);
                assert!(!w.table.put(pfn, 2));
            }
            Err(e) => assert_eq!(e, GetError::Frozen),
        });
        if w.table.freeze(pfn, 1, 1) {
            w.write(pfn, 9);
            w.table.unfreeze(pfn, 1);
        }
        reader.join().unwrap();
        assert_eq!(w.table.count(pfn), 1);
    });
}

#[test]
fn a_freeze_and_a_transfer_exclude_each_other() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        w.share(2, pfn);
        let other = spawn(&w, move |w| w.drop_entry(2, pfn));
        if w.table.freeze(pfn, 2, 1) {
            assert_eq!(w.table.count(pfn), 2);
            w.table.unfreeze(pfn, 2);
        } else if w.table.freeze(pfn, 1, 1) {
            w.write(pfn, 9);
            w.table.unfreeze(pfn, 1);
        }
        other.join().unwrap();
        assert_eq!(w.table.count(pfn), 1);
    });
}

#[test]
fn a_waiter_for_idle_is_woken() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        let waiter = spawn(&w, move |w| {
            assert!(w.table.wait_idle(pfn, Duration::from_secs(3600)));
            assert_eq!(w.read(pfn), 0, "idle means that the storage is handed back");
        });
        w.drop_entry(1, pfn);
        waiter.join().unwrap();
    });
}

#[test]
fn transfers_in_and_out_keep_the_count() {
    model(|| {
        let w = world(1);
        let pfn = w.evict(1).unwrap();
        w.share(2, pfn);
        // 2 forks a child 3 while 1 drops its page.
        let forker = spawn(&w, move |w| w.share(3, pfn));
        w.drop_entry(1, pfn);
        forker.join().unwrap();
        assert_eq!(w.table.count(pfn), 2);
        assert!((1..4).all(|owner| w.table.in_transit(owner).is_empty()));
        w.drop_entry(2, pfn);
        w.drop_entry(3, pfn);
        assert_eq!(w.table.used(), 0);
    });
}

/// Kills owner 1 before each of its atomic operations, while owner 2 does `other`. After the dead is reaped the count
/// is the number of entries that name the frame, nobody is in transit, and a free frame can be had again.
fn crashes(
    shared: bool,
    victim: impl Fn(&World, Pfn) + Copy + Send + Sync + 'static,
    other: impl Fn(&World, Pfn) + Copy + Send + Sync + 'static,
) {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    let mut steps = 0;
    loop {
        // Executions in which the victim was killed: it is killed later in each round, until it never is.
        let killed: &'static AtomicU32 = leak(AtomicU32::new(0));
        model(move || {
            let w = world(1);
            if shared {
                let pfn = w.evict(2).unwrap();
                w.share(1, pfn);
            }
            // The reaper works while others may be waiting for it.
            let dying = spawn(&w, move |w| {
                if !crash(steps, || victim(w, 0)) {
                    killed.fetch_add(1, Relaxed);
                }
                w.reap(1);
            });
            other(&w, 0);
            dying.join().unwrap();
            let named = w.entries[2..].iter().filter(|e| e.load(Ordering::Acquire) == 1).count();
            assert_eq!(w.table.count(0), named as u32);
            assert!((1..=REAPER).all(|owner| w.table.in_transit(owner).is_empty()));
            w.table.format();
            assert_eq!(w.table.alloc(3).is_some(), named == 0);
        });
        if killed.load(Relaxed) == 0 {
            break;
        }
        steps += 1;
    }
    assert!(steps >= 4, "the victim takes more steps than {steps}");
}

#[test]
fn a_crash_while_evicting() {
    crashes(false, |w, _| _ = w.evict(1), |_, _| {});
}

#[test]
fn a_crash_while_evicting_beside_another() {
    crashes(false, |w, _| _ = w.evict(1), |w, _| _ = w.evict(2));
}

#[test]
fn a_crash_while_dropping_the_last_reference() {
    crashes(true, |w, pfn| w.drop_entry(1, pfn), |w, pfn| w.drop_entry(2, pfn));
}

#[test]
fn a_crash_while_dropping_a_shared_page() {
    crashes(
        true,
        |w, pfn| w.drop_entry(1, pfn),
        |w, pfn| {
            if w.table.get(pfn).is_ok() {
                assert_eq!(w.read(pfn), 2);
                assert!(!w.table.put(pfn, 2));
            }
        },
    );
}

#[test]
fn a_crash_while_frozen() {
    crashes(
        true,
        |w, pfn| {
            if w.table.freeze(pfn, 2, 1) {
                w.table.unfreeze(pfn, 2);
            }
            w.drop_entry(1, pfn);
        },
        |w, pfn| w.drop_entry(2, pfn),
    );
}
