//! Cuts against those who take references, in every interleaving:
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_cuts`.
//!
//! The block of a page is a cell that loom watches: who holds a reference and has found no cut reads it, who cuts writes it
//! when the counts are 0.
#![cfg(loom)]

use farpage::frame::cuts::{CUTS, Cuts, Phase};
use farpage::frame::platform::{AtomicU32, AtomicU64};
use farpage::frame::{FrameTable, GetError, Owner, Pfn};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

struct World {
    table: FrameTable,
    cuts: Cuts,
    blocks: [UnsafeCell<u32>; 2],
}

/// Every interleaving with at most three preemptions.
fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn world() -> Arc<World> {
    let words = Vec::leak((0..64).map(|_| AtomicU32::new(0)).collect());
    let [cursor, waiters, high] = [(); 3].map(|()| leak(AtomicU32::new(0)));
    let table = FrameTable::new(words, Vec::leak(vec![AtomicU64::new(0)]), cursor, waiters, high);
    // Two records are enough, and loom looks at each.
    let two = || -> &'static [AtomicU64] { Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect()) };
    assert!(CUTS >= 2);
    let cuts = Cuts::new(two(), two());
    Arc::new(World { table: table.limited_to(&[0..2; 1]), cuts, blocks: Default::default() })
}

impl World {
    /// A reference, if no cut is in the way; as `dax::file::Inner::try_run`.
    fn try_hold(&self, pfn: Pfn, owner: Owner) -> bool {
        loop {
            match self.table.take_in_transit(pfn, owner) {
                Ok(()) => break,
                Err(GetError::Transit) => thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        }
        self.table.settle(pfn);
        let stays = self.cuts.over(&(pfn..pfn + 1)).is_none();
        if !stays {
            self.give_back(pfn, owner);
        }
        stays
    }

    fn give_back(&self, pfn: Pfn, owner: Owner) {
        if self.table.put(pfn, owner) {
            self.table.release(pfn);
        }
    }

    fn read(&self, pfn: Pfn) -> u32 {
        // SAFETY: loom checks that nobody else writes the cell.
        self.blocks[pfn as usize].with(|p| unsafe { *p })
    }

    /// As `dax::change`.
    fn cut(&self, pfn: Pfn, owner: Owner) {
        let mut cut = self.cuts.begin(owner, &(pfn..pfn + 1)).expect("a free record");
        while self.table.first_used(pfn, pfn + 1).is_some() {
            if cut.phase == Phase::Pins {
                self.cuts.advance(&mut cut);
            }
            thread::yield_now();
        }
        // SAFETY: loom checks that nobody else uses the cell.
        self.blocks[pfn as usize].with_mut(|p| unsafe { *p += 1 });
        self.cuts.end(&cut);
    }
}

fn spawn(w: &Arc<World>, f: impl FnOnce(&World) + 'static) -> thread::JoinHandle<()> {
    let w = w.clone();
    thread::spawn(move || f(&w))
}

#[test]
fn who_has_a_page_has_it_until_he_gives_it_back() {
    model(|| {
        let w = world();
        let user = spawn(&w, |w| {
            if w.try_hold(0, 1) {
                assert_eq!(w.read(0), w.read(0));
                w.give_back(0, 1);
            }
        });
        w.cut(0, 2);
        user.join().unwrap();
        assert!(w.try_hold(0, 1), "the cut is over");
        assert_eq!(w.read(0), 1);
    });
}

#[test]
fn a_record_that_is_used_again_is_not_taken_for_what_it_was() {
    model(|| {
        let w = world();
        let user = spawn(&w, |w| {
            if w.try_hold(1, 1) {
                assert_eq!(w.read(1), w.read(1));
                w.give_back(1, 1);
            }
        });
        w.cut(0, 2);
        w.cut(1, 2);
        user.join().unwrap();
    });
}

#[test]
fn what_a_dead_cutter_left_is_in_nobodys_way() {
    model(|| {
        let w = world();
        w.cuts.begin(2, &(0..2)).unwrap();
        let user = spawn(&w, |w| {
            if w.try_hold(0, 1) {
                w.give_back(0, 1);
            }
        });
        assert!(w.cuts.forget(2) && !w.cuts.any());
        w.cut(0, 3);
        user.join().unwrap();
        assert!(w.try_hold(0, 1));
    });
}

/// Who gives up mappings goes by the phase: those of a cut that still waits for pins are in use.
#[test]
fn a_phase_is_seen_with_the_pages_of_its_cut() {
    model(|| {
        let w = world();
        let agent = spawn(&w, |w| {
            for cut in w.cuts.iter() {
                match cut.phase {
                    Phase::Mappings => assert_eq!(cut.pages, 0..1),
                    Phase::Pins => assert!(cut.pages == (0..1) || cut.pages == (1..2), "{:?}", cut.pages),
                }
            }
        });
        let mut first = w.cuts.begin(2, &(0..1)).unwrap();
        w.cuts.advance(&mut first);
        w.cuts.end(&first);
        let second = w.cuts.begin(2, &(1..2)).unwrap();
        assert!(second.id() != first.id());
        w.cuts.end(&second);
        agent.join().unwrap();
    });
}
