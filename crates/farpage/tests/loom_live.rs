//! Live references, unregistering and the ledger in every interleaving, as `loom_frame.rs`:
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_live`.
//!
//! The memory is modelled by cells that loom watches: one for the frame, and one that who removes the memory writes and
//! who uses it reads. Using it without an ordering that the protocol gives is reported.
#![cfg(loom)]

use std::time::{Duration, Instant};

use farpage::frame::ledger::{HolderKind, Ledger, Place};
use farpage::frame::live::{Live, Phase, STRIDE};
use farpage::frame::platform::{AtomicU32, AtomicU64, crash};
use farpage::frame::{BATCH, FrameTable, GetError, Owner, Pfn};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// Who cleans up after the dead.
const REAPER: Owner = 2;

struct World {
    table: FrameTable,
    live: Live,
    ledger: Ledger,
    storage: UnsafeCell<u32>,
    /// How often the memory was taken away.
    removed: UnsafeCell<u32>,
}

/// Every interleaving with at most three preemptions: all of them take hours.
fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Two frames, of which most models use one; process slots 0 to 2.
fn world() -> Arc<World> {
    let words = Vec::leak((0..64).map(|_| AtomicU32::new(0)).collect());
    let [cursor, waiters, high, state, records_used] = [(); 5].map(|()| leak(AtomicU32::new(0)));
    let table = FrameTable::new(words, Vec::leak(vec![AtomicU64::new(0)]), cursor, waiters, high);
    let slots = Vec::leak((0..2 * STRIDE + 1).map(|_| AtomicU32::new(0)).collect());
    let records = Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect());
    let w = World {
        table: table.limited_to(&[0..2; 1]),
        live: Live::new(state, slots),
        ledger: Ledger::new(records, records_used),
        storage: UnsafeCell::new(0),
        removed: UnsafeCell::new(0),
    };
    assert!(w.live.begin_open(0));
    w.live.finish_open(0);
    Arc::new(w)
}

impl World {
    fn write(&self, value: u32) {
        // SAFETY: loom checks that nobody else uses the cell.
        self.storage.with_mut(|p| unsafe { *p = value });
    }

    fn read(&self) -> u32 {
        // SAFETY: loom checks that nobody else writes the cell.
        self.storage.with(|p| unsafe { *p })
    }

    fn removals(&self) -> u32 {
        // SAFETY: loom checks that nobody else writes the cell.
        self.removed.with(|p| unsafe { *p })
    }

    /// The storage is frame 0's.
    fn free(&self, pfn: Pfn) {
        if pfn == 0 {
            self.write(0);
        }
        self.table.release_all(&mut [pfn]);
    }

    /// Allocates and writes; as `Pagemap::try_alloc`.
    fn alloc(&self, owner: Owner) -> Option<Pfn> {
        if !self.live.try_get(owner) {
            return None;
        }
        let pfn = self.table.alloc(owner);
        self.live.put(owner);
        let pfn = pfn?;
        self.write(u32::from(owner));
        self.table.settle(pfn);
        Some(pfn)
    }

    /// As `Pagemap::begin_run`, one step.
    fn grow(&self, place: Place, n: u32) -> u32 {
        loop {
            match self.ledger.grow(place, &self.table, n, false) {
                Err(GetError::Transit) => thread::yield_now(),
                taken => return taken.unwrap(),
            }
        }
    }

    /// As `Pagemap::shrink_run`, one step; frees what is to be freed.
    fn shrink(&self, place: Place, n: u32) -> u32 {
        let mut last = [0; BATCH];
        loop {
            let (dropped, lasts) = self.ledger.shrink(place, &self.table, n, &mut last);
            last[..lasts].iter().for_each(|pfn| self.free(*pfn));
            if dropped > 0 {
                return dropped;
            }
            thread::yield_now();
        }
    }

    fn put(&self, pfn: Pfn, owner: Owner) {
        if self.table.put(pfn, owner) {
            self.free(pfn);
        }
    }

    /// As `Pagemap::unregister`; false if another is at it or has done it.
    fn unregister(&self, owner: Owner) -> bool {
        if !self.live.begin_remove(owner) {
            return false;
        }
        self.live.drain(Instant::now() + Duration::from_secs(3600)).expect("no timeout in models");
        while self.table.in_use().next().is_some() {
            assert!(self.table.wait_idle(0, Duration::from_secs(3600)));
        }
        // SAFETY: loom checks that nobody else uses the cells.
        self.removed.with_mut(|p| unsafe { *p += 1 });
        self.write(0);
        self.live.finish_remove(owner, true);
        true
    }

    /// As `Pagemap::reap`.
    fn reap(&self, dead: Owner) {
        for pfn in self.table.in_transit(dead) {
            if self.table.recover(pfn, dead, self.ledger.publishes(dead, pfn)) {
                self.free(pfn);
            }
        }
        for (place, extent) in self.ledger.of(dead) {
            (0..extent.len).for_each(|i| self.put(extent.pfn + i, REAPER));
            self.ledger.end(place);
        }
        self.live.forget(dead);
        self.table.format();
    }
}

fn spawn<T: 'static>(w: &Arc<World>, f: impl FnOnce(&World) -> T + 'static) -> thread::JoinHandle<T> {
    let w = w.clone();
    thread::spawn(move || f(&w))
}

#[test]
fn who_has_looked_it_up_has_the_memory() {
    model(|| {
        let w = world();
        let user = spawn(&w, |w| {
            if w.live.try_get(1) {
                assert_eq!(w.removals(), 0);
                w.live.put(1);
            }
        });
        assert!(w.unregister(2));
        user.join().unwrap();
        assert!(!w.live.try_get(1));
        assert_eq!((w.removals(), w.live.phase()), (1, Phase::Gone));
    });
}

#[test]
fn unregistering_waits_for_who_allocates() {
    model(|| {
        let w = world();
        let user = spawn(&w, |w| {
            if let Some(pfn) = w.alloc(1) {
                assert_eq!((w.read(), w.removals()), (1, 0));
                w.put(pfn, 1);
            }
        });
        assert!(w.unregister(2));
        user.join().unwrap();
        assert_eq!((w.table.used(), w.alloc(1)), (0, None));
    });
}

#[test]
fn unregistering_waits_for_gets_and_puts() {
    model(|| {
        let w = world();
        let pfn = w.alloc(1).unwrap();
        let user = spawn(&w, move |w| {
            let second = w.live.try_get(1) && {
                let got = w.table.get(pfn).is_ok();
                w.live.put(1);
                got
            };
            assert_eq!((w.read(), w.removals()), (1, 0));
            w.put(pfn, 1);
            if second {
                w.put(pfn, 1);
            }
        });
        assert!(w.unregister(2));
        user.join().unwrap();
        assert_eq!(w.table.used(), 0);
    });
}

#[test]
fn of_two_one_removes() {
    model(|| {
        let w = world();
        let other = spawn(&w, |w| w.unregister(1));
        let mine = w.unregister(2);
        let theirs = other.join().unwrap();
        assert!(mine != theirs, "one of them");
        assert_eq!((w.removals(), w.live.phase()), (1, Phase::Gone));
    });
}

#[test]
fn who_was_late_does_not_remove_what_was_registered_again() {
    model(|| {
        let w = world();
        let late = spawn(&w, |w| w.unregister(1));
        if w.unregister(2) && w.live.begin_open(0) {
            w.live.finish_open(0);
            if let Some(pfn) = w.alloc(2) {
                assert_eq!(w.read(), 2);
                w.put(pfn, 2);
            }
        }
        late.join().unwrap();
        assert_eq!(w.table.used(), 0);
    });
}

#[test]
fn who_resumes_does_not_open_what_another_closes() {
    model(|| {
        let w = world();
        assert!(w.live.begin_remove(1));
        w.live.finish_remove(1, false);
        let other = spawn(&w, |w| {
            if w.live.begin_resume(1) {
                w.live.finish_open(1);
            }
            if w.live.try_get(1) {
                assert_eq!(w.removals(), 0);
                w.live.put(1);
            }
        });
        let removed = w.unregister(2);
        other.join().unwrap();
        assert_eq!(w.live.phase(), if removed { Phase::Gone } else { Phase::Live });
        assert_eq!(w.live.try_get(1), !removed);
    });
}

#[test]
fn who_gets_in_sees_what_was_registered() {
    model(|| {
        let w = world();
        assert!(w.unregister(2));
        let registering = spawn(&w, |w| {
            assert!(w.live.begin_open(0));
            w.write(7);
            w.live.finish_open(0);
        });
        if w.live.try_get(1) {
            assert_eq!(w.read(), 7);
            w.live.put(1);
        }
        registering.join().unwrap();
    });
}

/// Kills owner 1 before each of its atomic operations, while owner 2 does `other`; then the dead is reaped, and `after`
/// looks.
fn crashes(
    before: impl Fn(&World) + Copy + Send + Sync + 'static,
    victim: impl Fn(&World) + Copy + Send + Sync + 'static,
    other: impl Fn(&World) + Copy + Send + Sync + 'static,
    after: impl Fn(&World) + Copy + Send + Sync + 'static,
) {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    let mut steps = 0;
    loop {
        let killed: &'static AtomicU32 = leak(AtomicU32::new(0));
        model(move || {
            let w = world();
            before(&w);
            let dying = spawn(&w, move |w| {
                if !crash(steps, || victim(w)) {
                    killed.fetch_add(1, Relaxed);
                }
                w.reap(1);
            });
            other(&w);
            dying.join().unwrap();
            after(&w);
        });
        if killed.load(Relaxed) == 0 {
            break;
        }
        steps += 1;
    }
    assert!(steps >= 4, "the victim takes more steps than {steps}");
}

#[test]
fn a_crash_while_unregistering() {
    crashes(
        |_| {},
        |w| _ = w.unregister(1),
        |w| {
            if let Some(pfn) = w.alloc(2) {
                assert_eq!(w.read(), 2);
                w.put(pfn, 2);
            }
        },
        |w| {
            if w.live.phase() != Phase::Gone {
                assert!(w.unregister(2), "another goes on where it stopped");
            }
            assert!(w.live.begin_open(0));
        },
    );
}

#[test]
fn a_crash_while_resuming() {
    crashes(
        |w| {
            assert!(w.live.begin_remove(1));
            w.live.finish_remove(1, false);
        },
        |w| {
            if w.live.begin_resume(1) {
                w.live.finish_open(1);
            }
        },
        |w| _ = w.live.try_get(2).then(|| w.live.put(2)),
        |w| assert!(w.unregister(2)),
    );
}

#[test]
fn a_crash_while_looking_up() {
    crashes(
        |_| {},
        |w| {
            for _ in 0..2 {
                if w.live.try_get(1) {
                    w.live.put(1);
                }
            }
        },
        |w| assert!(w.unregister(2)),
        |w| assert_eq!(w.live.phase(), Phase::Gone),
    );
}

/// What the dead held is given back, and nothing else.
#[test]
fn a_crash_while_holding() {
    crashes(
        |w| assert_eq!(w.alloc(2), Some(0)),
        |w| {
            let place = w.ledger.begin(1, HolderKind::Mapping, 0).unwrap();
            assert_eq!(w.grow(place, 1), 1);
            assert_eq!(w.shrink(place, 1), 1);
            w.ledger.end(place);
        },
        |w| {
            w.table.get(0).unwrap();
            w.put(0, 2);
        },
        |w| {
            assert_eq!((w.table.count(0), w.read()), (1, 2));
            assert_eq!(w.ledger.iter().count(), 0);
            assert!(w.table.in_transit(1).is_empty());
        },
    );
}

#[test]
fn a_crash_while_holding_twice() {
    crashes(
        |w| assert_eq!(w.alloc(2), Some(0)),
        |w| {
            let places = [(); 2].map(|()| {
                let place = w.ledger.begin(1, HolderKind::Pin, 0).unwrap();
                assert_eq!(w.grow(place, 1), 1);
                place
            });
            for place in places {
                assert_eq!(w.shrink(place, 1), 1);
                w.ledger.end(place);
            }
        },
        |_| {},
        |w| assert_eq!((w.table.count(0), w.ledger.iter().count()), (1, 0)),
    );
}

#[test]
fn a_crash_while_a_hold_grows_over_another() {
    crashes(
        |w| {
            assert_eq!((w.alloc(2), w.alloc(2)), (Some(0), Some(1)));
            let place = w.ledger.begin(1, HolderKind::Pin, 1).unwrap();
            assert_eq!(w.grow(place, 1), 1);
        },
        |w| {
            let place = w.ledger.begin(1, HolderKind::Mapping, 0).unwrap();
            assert_eq!(w.grow(place, 1), 1);
            assert_eq!(w.grow(place, 1), 1);
        },
        |_| {},
        |w| assert_eq!((w.table.count(0), w.table.count(1), w.ledger.iter().count()), (1, 1, 0)),
    );
}

#[test]
fn a_crash_while_the_last_hold_goes() {
    crashes(
        |w| {
            assert_eq!(w.alloc(2), Some(0));
            let place = w.ledger.begin(1, HolderKind::Mapping, 0).unwrap();
            assert_eq!(w.grow(place, 1), 1);
        },
        |w| {
            let (place, _) = w.ledger.of(1).next().unwrap();
            assert_eq!(w.shrink(place, 1), 1);
            w.ledger.end(place);
        },
        |w| w.put(0, 2),
        |w| {
            assert_eq!((w.table.used(), w.ledger.iter().count()), (0, 0));
            assert_eq!(w.alloc(2), Some(0));
            assert_eq!(w.read(), 2);
        },
    );
}

/// Two frames in one step, and back one by one, all of which another hold of the same owner has as well.
#[test]
fn a_crash_while_a_batch_moves_over_another() {
    crashes(
        |w| {
            assert_eq!((w.alloc(2), w.alloc(2)), (Some(0), Some(1)));
            let place = w.ledger.begin(1, HolderKind::Pin, 0).unwrap();
            assert_eq!(w.grow(place, 2), 2);
        },
        |w| {
            let place = w.ledger.begin(1, HolderKind::Mapping, 0).unwrap();
            assert_eq!(w.grow(place, 2), 2);
            assert_eq!((w.shrink(place, 1), w.shrink(place, 1)), (1, 1));
            w.ledger.end(place);
        },
        |_| {},
        |w| assert_eq!((w.table.count(0), w.table.count(1), w.ledger.iter().count()), (1, 1, 0)),
    );
}

/// Two frames of fixed places in one step, while another takes and drops one of them; the reaper goes on in the dead's
/// name, and can be killed himself.
#[test]
fn a_crash_while_a_run_of_fixed_places_comes_and_goes() {
    crashes(
        |_| {},
        |w| {
            let place = w.ledger.begin(1, HolderKind::Pin, 0).unwrap();
            let mut len = 0;
            while len < 2 {
                match w.ledger.grow(place, &w.table, 2 - len, true) {
                    Ok(n) => len += n,
                    Err(_) if len == 0 => return, // the record is gone; another is at the frame
                    Err(_) => thread::yield_now(),
                }
            }
            while len > 0 {
                len -= w.shrink(place, len);
            }
            w.ledger.end(place);
        },
        |w| {
            if w.table.take_in_transit(1, 2).is_ok() {
                w.table.settle(1);
                w.put(1, 2);
            }
        },
        |w| {
            assert_eq!((w.table.used(), w.ledger.iter().count()), (0, 0));
            assert_eq!((w.alloc(2), w.alloc(2)), (Some(0), Some(1)), "and their hints are right");
        },
    );
}

#[test]
fn a_batch_wakes_who_waits() {
    model(|| {
        let w = world();
        let pfn = w.alloc(1).unwrap();
        let waiter = spawn(&w, move |w| {
            assert!(w.table.wait_idle(pfn, Duration::from_secs(3600)));
            assert_eq!(w.read(), 0);
        });
        let mut last = [0; BATCH];
        assert_eq!(w.table.put_all(&[pfn], 1, false, &mut last), 1);
        w.free(last[0]);
        waiter.join().unwrap();
    });
}
