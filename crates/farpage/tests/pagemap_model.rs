//! Pagemaps against a plain model: any sequence of allocations, holds, mappings, puts, deaths and attempts to unregister
//! has exactly the counts, the frees and the errors of the model, for every memory type.
#![cfg(not(loom))]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{ME, watched};
use farpage::frame::ledger::HolderKind;
use farpage::frame::{Owner, Pfn};
use farpage::pagemap::{Hold, HoldError, MemoryType, NotLive, RefError, UnregisterError};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    /// A run of frames, held; length and alignment.
    AllocHeld(Owner, u32, u32),
    /// Frames of an existing hold are held once more.
    HoldAgain(Owner, usize, u32, u32),
    Drop(usize),
    /// Plain references to the first frame of a hold.
    Get(usize, u32),
    /// All plain references, in batches.
    PutAll,
    /// The owner is killed: his holds are left in the ledger.
    Die(Owner),
    Unregister,
    Resume,
}

fn op() -> impl Strategy<Value = Op> {
    let owner = || 2..5 as Owner;
    prop_oneof![
        6 => (owner(), 1..150u32, prop::sample::select(vec![1, 2, 64, 128])).prop_map(|(o, n, a)| Op::AllocHeld(o, n, a)),
        6 => (owner(), any::<usize>(), 0..70u32, 1..100u32).prop_map(|(o, i, at, n)| Op::HoldAgain(o, i, at, n)),
        7 => any::<usize>().prop_map(Op::Drop),
        4 => (any::<usize>(), 1..4u32).prop_map(|(i, n)| Op::Get(i, n)),
        2 => Just(Op::PutAll),
        1 => owner().prop_map(Op::Die),
        1 => Just(Op::Unregister),
        1 => Just(Op::Resume),
    ]
}

#[derive(Default)]
struct Model {
    counts: BTreeMap<Pfn, u32>,
    freed: BTreeMap<Pfn, u32>,
    live: bool,
}

impl Model {
    fn add(&mut self, pfn: Pfn, len: u32) {
        (pfn..pfn + len).for_each(|pfn| *self.counts.entry(pfn).or_default() += 1);
    }

    fn drop(&mut self, pfn: Pfn, len: u32) {
        for pfn in pfn..pfn + len {
            let count = self.counts.get_mut(&pfn).unwrap();
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&pfn);
                *self.freed.entry(pfn).or_default() += 1;
            }
        }
    }

    /// Whether a run of free frames exists, by looking everywhere.
    fn has_run(&self, len: u32, align: u32) -> bool {
        (0..=1024 - len).step_by(align as usize).any(|at| self.counts.range(at..at + len).next().is_none())
    }
}

fn run(memory_type: MemoryType, ops: &[Op]) {
    let (map, watched) = watched(memory_type);
    let mut model = Model { live: true, ..Model::default() };
    let mut holds: Vec<(Owner, Hold<'_>)> = Vec::new();
    let mut plain: Vec<Pfn> = Vec::new();
    for op in ops {
        match *op {
            Op::AllocHeld(owner, len, align) => match map.alloc_held(owner, HolderKind::Pin, len, align) {
                Ok(hold) => {
                    assert!(model.live);
                    assert_eq!((hold.len(), hold.pfn() % align), (len, 0));
                    assert!(model.counts.range(hold.pfn()..hold.pfn() + len).next().is_none(), "was in use");
                    model.add(hold.pfn(), len);
                    holds.push((owner, hold));
                }
                Err(HoldError::Full(n)) => {
                    assert!(model.live && n == len && !model.has_run(len, align), "{len} {align}");
                }
                Err(e) => assert_eq!((e, model.live), (NotLive::Unregistering.into(), false)),
            },
            Op::HoldAgain(owner, i, at, len) if !holds.is_empty() => {
                let pfn = holds[i % holds.len()].1.pfn() + at;
                let all = (pfn..pfn + len).all(|pfn| model.counts.contains_key(&pfn));
                match map.hold(owner, HolderKind::Mapping, pfn, len) {
                    Ok(hold) => {
                        assert!(model.live && all);
                        model.add(pfn, len);
                        holds.push((owner, hold));
                    }
                    Err(HoldError::NotLive(e)) => assert!(!model.live && e == NotLive::Unregistering),
                    Err(HoldError::NoFrame(..)) => assert!(pfn + len > 1024),
                    Err(e) => assert!(matches!(e, HoldError::Frame(..)) && !all, "{e}"),
                }
            }
            Op::Drop(i) if !holds.is_empty() => {
                let (_, hold) = holds.swap_remove(i % holds.len());
                model.drop(hold.pfn(), hold.len());
            }
            Op::Get(i, n) if !holds.is_empty() => {
                let pfn = holds[i % holds.len()].1.pfn();
                for _ in 0..n {
                    match map.get(pfn, ME) {
                        Ok(()) => {
                            model.add(pfn, 1);
                            plain.push(pfn);
                        }
                        Err(e) => {
                            assert_eq!((e, model.live), (RefError::NotLive(NotLive::Unregistering), false));
                        }
                    }
                }
            }
            Op::PutAll => {
                map.put(&plain, ME);
                plain.drain(..).for_each(|pfn| model.drop(pfn, 1));
            }
            Op::Die(owner) => {
                let (dead, alive): (Vec<_>, Vec<_>) = holds.into_iter().partition(|(o, _)| *o == owner);
                holds = alive;
                for (_, hold) in dead {
                    model.drop(hold.pfn(), hold.len());
                    std::mem::forget(hold);
                }
                map.reap(owner, ME);
            }
            Op::Unregister if !model.counts.is_empty() => {
                let error = map.unregister(&mut (), ME, Duration::ZERO).unwrap_err();
                let UnregisterError::Held { held, total, .. } = error else { panic!("{error}") };
                assert_eq!(total, model.counts.len());
                for h in held {
                    assert_eq!(Some(&h.refs), model.counts.get(&h.pfn));
                    let unknown = plain.iter().filter(|pfn| **pfn == h.pfn).count() as u32;
                    assert_eq!(h.unknown(), unknown, "{h}");
                }
                model.live = false;
            }
            Op::Resume => {
                assert_eq!(map.resume(ME), !model.live);
                model.live = true;
            }
            _ => {}
        }
        assert_eq!(
            map.frames.in_use().collect::<Vec<_>>(),
            model.counts.clone().into_iter().collect::<Vec<_>>()
        );
        let records: u32 = map.ledger.iter().map(|(_, e)| e.len).sum();
        assert_eq!(records, holds.iter().map(|(_, h)| h.len()).sum::<u32>());
        assert!(map.ledger.iter().all(|(_, e)| !e.moving));
    }
    holds.into_iter().for_each(|(_, hold)| model.drop(hold.pfn(), hold.len()));
    map.put(&plain, ME);
    plain.iter().for_each(|pfn| model.drop(*pfn, 1));
    let mut freed = BTreeMap::new();
    watched.calls().concat().into_iter().for_each(|pfn| *freed.entry(pfn).or_default() += 1);
    assert_eq!(freed, model.freed, "each frame once for each time that its last reference went");
    map.unregister(&mut (), ME, Duration::ZERO).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn model_equals_pagemap(
        memory_type in prop::sample::select(vec![
            MemoryType::Private,
            MemoryType::Coherent,
            MemoryType::Generic,
            MemoryType::P2pDma,
        ]),
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        run(memory_type, &ops);
    }
}
