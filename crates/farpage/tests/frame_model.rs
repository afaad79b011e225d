//! The frame table against a plain model: any sequence of operations has exactly the outcomes of the model.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farpage::frame::{FrameTable, GetError, Owner};
use proptest::prelude::*;

/// Frames: more than one group of hints, the last one not full.
const FRAMES: usize = 70;
const MAX_COUNT: u32 = (1 << 19) - 1;

struct Memory {
    words: &'static [AtomicU32],
    hints: &'static [AtomicU64],
    table: FrameTable,
}

fn memory(frames: usize) -> Memory {
    let rounded = frames.next_multiple_of(64);
    let words: &'static [AtomicU32] = Vec::leak((0..rounded).map(|_| AtomicU32::new(0)).collect());
    let hints: &'static [AtomicU64] = Vec::leak((0..rounded / 64).map(|_| AtomicU64::new(0)).collect());
    let head: &'static [AtomicU32] = Vec::leak((0..3).map(|_| AtomicU32::new(0)).collect());
    let table = FrameTable::new(words, hints, &head[0], &head[1], &head[2]);
    let ranges = [0..frames as u32; 1];
    Memory { words, hints, table: table.limited_to(&ranges) }
}

#[derive(Debug, Clone)]
enum Op {
    Alloc(Owner),
    Get(usize),
    GetInTransit(usize, Owner),
    Settle(usize),
    BeginPut(usize, Owner),
    PutInTransit(usize),
    Put(usize, Owner),
    Release(usize),
    Freeze(usize, u32, Owner),
    Unfreeze(usize, u32),
    /// The owner dies; a frame he was on is published in his entry where the bit of its number is set.
    Die(Owner, u64),
    LoseHints,
}

/// What the model knows of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Frame {
    count: u32,
    frozen: bool,
    transit: Owner,
    freeing: bool,
}

fn op() -> impl Strategy<Value = Op> {
    // Few frames are used much, so that counts grow.
    let frame = || prop_oneof![4 => 0..4usize, 1 => 0..FRAMES];
    let owner = || 1..4 as Owner;
    prop_oneof![
        6 => owner().prop_map(Op::Alloc),
        6 => frame().prop_map(Op::Get),
        4 => (frame(), owner()).prop_map(|(f, o)| Op::GetInTransit(f, o)),
        8 => frame().prop_map(Op::Settle),
        4 => (frame(), owner()).prop_map(|(f, o)| Op::BeginPut(f, o)),
        4 => frame().prop_map(Op::PutInTransit),
        6 => (frame(), owner()).prop_map(|(f, o)| Op::Put(f, o)),
        4 => frame().prop_map(Op::Release),
        3 => (frame(), 0..4u32, owner()).prop_map(|(f, n, o)| Op::Freeze(f, n, o)),
        3 => (frame(), 1..4u32).prop_map(|(f, n)| Op::Unfreeze(f, n)),
        1 => (owner(), any::<u64>()).prop_map(|(o, bits)| Op::Die(o, bits)),
        1 => Just(Op::LoseHints),
    ]
}

impl Frame {
    fn expected_get(self) -> Result<(), GetError> {
        match self {
            Self { count: 0, .. } => Err(GetError::Free),
            Self { frozen: true, .. } => Err(GetError::Frozen),
            _ => Ok(()),
        }
    }

    /// In the middle of a transfer, and neither frozen nor being freed.
    fn transferring(self) -> bool {
        self.transit != 0 && !self.frozen && !self.freeing
    }

    /// True: it was the last reference.
    fn drop_ref(&mut self, owner: Owner, in_transit: bool) -> bool {
        self.count -= 1;
        if self.count == 0 {
            (self.freeing, self.transit) = (true, owner);
        } else if in_transit {
            self.transit = 0;
        }
        self.freeing
    }
}

fn run(op: &Op, m: &Memory, model: &mut [Frame]) {
    let t = &m.table;
    match *op {
        Op::Alloc(owner) => match t.alloc(owner) {
            None => assert!(model.iter().all(|f| *f != Frame::default()), "a free frame was not found"),
            Some(pfn) => {
                let f = &mut model[pfn as usize];
                assert_eq!(*f, Frame::default(), "frame {pfn} was not free");
                *f = Frame { count: 1, transit: owner, ..*f };
            }
        },
        Op::Get(i) => {
            let expected = model[i].expected_get();
            assert_eq!(t.get(i as u32), expected);
            model[i].count += u32::from(expected.is_ok());
        }
        Op::GetInTransit(i, owner) => {
            let busy = model[i].transit != 0;
            let expected = if busy { Err(GetError::Transit) } else { model[i].expected_get() };
            assert_eq!(t.get_in_transit(i as u32, owner), expected);
            if expected.is_ok() {
                model[i].count += 1;
                model[i].transit = owner;
            }
        }
        Op::Settle(i) => {
            if model[i].transferring() {
                t.settle(i as u32);
                model[i].transit = 0;
            }
        }
        Op::BeginPut(i, owner) => {
            let expected = match model[i] {
                Frame { transit: 0, count: 0, .. } => Err(GetError::Free),
                Frame { transit: 0, .. } => Ok(()),
                _ => Err(GetError::Transit),
            };
            assert_eq!(t.try_begin_put(i as u32, owner), expected);
            if expected.is_ok() {
                model[i].transit = owner;
            }
        }
        Op::PutInTransit(i) => {
            let f = &mut model[i];
            if f.transferring() {
                let owner = f.transit;
                assert_eq!(t.put_in_transit(i as u32, owner), f.drop_ref(owner, true));
            }
        }
        Op::Put(i, owner) => {
            let f = &mut model[i];
            // Who is in transit has a reference of his own, so another's put is not the last.
            if f.count > u32::from(f.transit != 0) && !f.frozen {
                assert_eq!(t.put(i as u32, owner), f.drop_ref(owner, false));
            }
        }
        Op::Release(i) => {
            if model[i].freeing {
                t.release(i as u32);
                model[i] = Frame::default();
            }
        }
        Op::Freeze(i, n, owner) => {
            let f = &mut model[i];
            let can = n > 0 && f.count == n && f.transit == 0 && !f.frozen;
            assert_eq!(t.freeze(i as u32, n, owner), can);
            if can {
                (f.frozen, f.transit) = (true, owner);
            }
        }
        Op::Unfreeze(i, n) => {
            if model[i].frozen {
                t.unfreeze(i as u32, n);
                model[i] = Frame { count: n, ..Frame::default() };
            }
        }
        Op::Die(owner, bits) => {
            for pfn in t.in_transit(owner) {
                let (f, published) = (&mut model[pfn as usize], bits >> (pfn % 64) & 1 != 0);
                let free = t.recover(pfn, owner, published);
                if f.frozen {
                    (f.frozen, f.transit) = (false, 0);
                } else if !f.freeing && published {
                    f.transit = 0;
                } else if !f.freeing {
                    f.drop_ref(owner, true);
                }
                assert_eq!(free, f.freeing);
                // A second look finds nothing more to do, except to free.
                assert_eq!(t.recover(pfn, owner, published), f.freeing);
                if free {
                    t.release(pfn);
                    *f = Frame::default();
                }
            }
        }
        Op::LoseHints => {
            m.hints.iter().for_each(|hint| hint.store(u64::MAX, Ordering::Relaxed));
            t.format();
            // Beyond the frames that were ever used nothing can be lost: no process marks those.
            let high = model.iter().rposition(|f| *f != Frame::default()).map_or(0, |i| i / 64 + 1);
            m.hints[high..].iter().for_each(|hint| hint.store(0, Ordering::Relaxed));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn model_equals_table(ops in proptest::collection::vec(op(), 1..300)) {
        let memory = memory(FRAMES);
        let mut model = vec![Frame::default(); FRAMES];
        for op in &ops {
            run(op, &memory, &mut model);
            for (i, f) in model.iter().enumerate() {
                assert_eq!(memory.table.count(i as u32), f.count, "frame {i} after {op:?}");
            }
            assert_eq!(memory.table.used(), model.iter().filter(|f| **f != Frame::default()).count());
            for owner in 1..4 {
                let expected: Vec<_> =
                    (0..FRAMES as u32).filter(|&i| model[i as usize].transit == owner).collect();
                assert_eq!(memory.table.in_transit(owner), expected);
            }
        }
    }
}

#[test]
fn model_all_frames_can_be_had_and_given_back() {
    let m = memory(FRAMES);
    for _ in 0..3 {
        let all: Vec<_> = std::iter::from_fn(|| m.table.alloc(1)).collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..FRAMES as u32).collect::<Vec<_>>());
        for pfn in all {
            assert!(m.table.put_in_transit(pfn, 1));
            m.table.release(pfn);
        }
        assert_eq!(m.table.used(), 0);
    }
}

#[test]
fn model_a_table_without_frames_has_none() {
    assert_eq!(memory(0).table.alloc(1), None);
}

#[test]
fn model_lost_hints_are_found_again() {
    let m = memory(FRAMES);
    let all: Vec<_> = std::iter::from_fn(|| m.table.alloc(1)).collect();
    assert!(m.table.put_in_transit(all[66], 1));
    // He died between the two halves of `release`.
    m.words[m.table.place(66)].store(0, Ordering::Relaxed);
    assert_eq!(m.table.alloc(2), None);
    m.table.format();
    assert_eq!(m.table.alloc(2), Some(66));
}

#[test]
fn model_memory_of_unused_frames_is_not_looked_at() {
    let m = memory(64 * 1000);
    let pfn = m.table.alloc(1).unwrap();
    assert!(pfn < 64);
    // A word beyond the mark: it would show.
    m.words[m.table.place(64 * 500)].store(1 | 2 << 20, Ordering::Relaxed);
    assert_eq!(m.table.used(), 1);
    assert!(m.table.in_transit(2).is_empty());
}

#[test]
fn model_counts_end_at_their_maximum() {
    let m = memory(1);
    let pfn = m.table.alloc(1).unwrap();
    m.table.settle(pfn);
    m.words[0].store(MAX_COUNT - 1, Ordering::Relaxed);
    assert_eq!(m.table.get(pfn), Ok(()));
    assert_eq!(m.table.get(pfn), Err(GetError::Overflow));
    assert_eq!(m.table.get_in_transit(pfn, 3), Err(GetError::Overflow));
    assert_eq!(m.table.count(pfn), MAX_COUNT);
    assert!(m.table.freeze(pfn, MAX_COUNT, 4095));
    assert_eq!(m.table.in_transit(4095), vec![0]);
}

#[test]
#[should_panic(expected = "put of free frame")]
fn model_put_of_a_free_frame_is_reported() {
    let _ = memory(1).table.put(0, 1);
}

#[test]
#[should_panic(expected = "in transit of another")]
fn model_put_in_anothers_transit_is_reported() {
    let m = memory(1);
    let pfn = m.table.alloc(1).unwrap();
    let _ = m.table.put_in_transit(pfn, 2);
}

#[test]
fn model_waiting_for_idle() {
    let m = memory(1);
    let pfn = m.table.alloc(1).unwrap();
    assert!(!m.table.wait_idle(pfn, Duration::from_millis(20)));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let start = Instant::now();
            (m.table.wait_idle(pfn, Duration::from_secs(20)), start.elapsed())
        });
        assert!(m.table.put_in_transit(pfn, 1));
        // Being freed is not idle yet.
        assert!(!m.table.wait_idle(pfn, Duration::from_millis(20)));
        m.table.release(pfn);
        let (idle, after) = waiter.join().unwrap();
        assert!(idle && after < Duration::from_secs(10));
    });
}

#[test]
fn model_neighbours_are_on_different_cache_lines() {
    let table = memory(256).table;
    let mut places: Vec<usize> = (0..256).map(|pfn| table.place(pfn)).collect();
    for pair in places.windows(4) {
        let lines: std::collections::HashSet<usize> = pair.iter().map(|place| place / 16).collect();
        assert_eq!(lines.len(), 4);
    }
    // A group of 64 is four lines, and every frame has a place of its own.
    assert!(places.iter().enumerate().all(|(pfn, place)| pfn / 64 == place / 64));
    places.sort_unstable();
    assert_eq!(places, (0..256).collect::<Vec<_>>());
}
