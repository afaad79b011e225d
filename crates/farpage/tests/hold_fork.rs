//! Forks while other threads make and drop holds: the child has the locks of none of them.

mod managed;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use farpage::frame::ledger::HolderKind;
use managed::{Managed, ended_well};

#[test]
fn a_child_holds_frames_whatever_its_parents_threads_were_at() {
    if !managed::alone("a_child_holds_frames_whatever_its_parents_threads_were_at") {
        return;
    }
    let managed = Managed::new(16 << 20, &["mem:16M"]);
    let space = managed.space;
    let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
    let hold = |len: u32| space.domain.pagemap(0).alloc_held(space.me(), HolderKind::Pin, len, 1).unwrap();
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    drop(hold(900));
                    made.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let children: Vec<_> = (0..40)
            .map(|_| {
                std::thread::sleep(std::time::Duration::from_micros(300));
                managed.fork(|| {
                    // SAFETY: ends this process, should it wait for ever.
                    unsafe { libc::alarm(20) };
                    for _ in 0..3 {
                        let held = hold(10);
                        let frames = &held.map().frames;
                        assert!((held.pfn()..held.pfn() + 10).all(|pfn| frames.count(pfn) == 1));
                    }
                })
            })
            .collect();
        let well = children.into_iter().filter(|&child| ended_well(child)).count();
        stop.store(true, Ordering::SeqCst);
        assert_eq!(well, 40, "children that ended well");
    });
    assert!(made.load(Ordering::Relaxed) > 40);
    managed.assert_all_free();
}
