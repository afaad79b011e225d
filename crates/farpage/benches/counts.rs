//! What counting costs, in nanoseconds: `cargo bench --bench counts`.
//!
//! A get or a put should cost at most 1.3 times one uncontended atomic read-modify-write, and two threads on different
//! frames should not disturb each other (what they then cost is what they cost alone; the last line of the four shows what
//! it costs when they do).

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use farpage::device::spec::Spec;
use farpage::device::{Attach, Device};
use farpage::frame::{FrameTable, Pfn};
use farpage::pagemap::{Pagemap, Registration};
use farpage::sys::{Peers, SharedArea};

const TURNS: u32 = 200_000;
const ROUNDS: usize = 15;
const ME: u16 = 1;

struct Everyone;
impl Peers for Everyone {
    fn is_alive(&self, _: u16) -> bool {
        true
    }
}

/// Nanoseconds of one of `n` in the fastest round.
fn best(n: u32, mut round: impl FnMut()) -> f64 {
    let once = |round: &mut dyn FnMut()| {
        let start = Instant::now();
        round();
        start.elapsed().as_secs_f64() * 1e9 / f64::from(n)
    };
    (0..ROUNDS).map(|_| once(&mut round)).fold(f64::MAX, f64::min)
}

/// Gets and puts of one frame, each.
fn get_put(frames: &FrameTable, pfn: Pfn) {
    for _ in 0..TURNS {
        black_box(frames.get(pfn).is_ok());
        black_box(frames.put(pfn, ME));
    }
}

/// The same in two threads on two CPUs, on two frames: nanoseconds of a get or a put of the slower one, in the middle one
/// of the rounds. (Not in the best: there one thread may have been alone.)
fn two_threads(frames: &FrameTable, pfns: [Pfn; 2]) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                let times = [(0, pfns[0]), (1, pfns[1])].map(|(cpu, pfn)| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        farpage::sys::bind(0, cpu);
                        barrier.wait();
                        let start = Instant::now();
                        (0..4).for_each(|_| get_put(frames, pfn));
                        start.elapsed().as_secs_f64() * 1e9 / f64::from(8 * TURNS)
                    })
                });
                times.map(|t| t.join().expect("no thread panics")).into_iter().fold(0.0, f64::max)
            })
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn main() {
    let spec: Spec = "ram:16M".parse().expect("a device");
    let area = SharedArea::anonymous(spec.shared_len()).expect("memory");
    let attach = Attach { area, path: None, peers: std::sync::Arc::new(Everyone), create: true };
    let device: Box<dyn Device> = spec.attach(attach).expect("a device");
    let counts = SharedArea::anonymous(Pagemap::shared_len(device.frames())).expect("memory");
    let map = Pagemap::register(Registration::paging(0, device), counts, true).expect("a pagemap");
    let pfns: Vec<Pfn> = (0..1024).map(|_| map.alloc(ME).expect("a frame")).collect();
    pfns.iter().for_each(|&pfn| map.frames.settle(pfn));
    let frames = &map.frames;

    let word = AtomicU32::new(0);
    let rmw = best(2 * TURNS, || {
        for _ in 0..TURNS {
            black_box(&word).fetch_add(1, Ordering::Acquire);
            black_box(&word).fetch_sub(1, Ordering::AcqRel);
        }
    });
    let line = |what: &str, ns: f64| println!("{what:<64} {ns:>7.2} ns {:>6.2} x", ns / rmw);
    line("one atomic read-modify-write, uncontended", rmw);
    let single = best(2 * TURNS, || get_put(frames, 0));
    line("get or put", single);
    line("get or put, two threads, frames far apart", two_threads(frames, [0, 512]));
    line("get or put, two threads, neighbouring frames", two_threads(frames, [0, 1]));
    line("get or put, two threads, frames of one group of 64", two_threads(frames, [5, 42]));
    line("get or put, two threads, the same frame", two_threads(frames, [0, 0]));

    let batch: Vec<Pfn> = pfns[..64].to_vec();
    let mut turns = 0u64;
    let batched = best(64 * 2000, || {
        for _ in 0..2000 {
            batch.iter().for_each(|&pfn| _ = frames.get(pfn));
            map.put(&batch, ME);
            turns += 1;
        }
    });
    line("get, and put in batches of 64, none the last", batched);
    let freeing = best(64 * 500, || {
        for _ in 0..500 {
            let mut fresh = [0; 64];
            fresh.iter_mut().for_each(|pfn| *pfn = map.alloc(ME).expect("a frame"));
            map.put_in_transit(&fresh, ME);
        }
    });
    line("alloc, and put in batches of 64, all the last", freeing);
    let freeing = best(64 * 500, || {
        for _ in 0..500 {
            let mut fresh = [0; 64];
            fresh.iter_mut().for_each(|pfn| *pfn = map.alloc(ME).expect("a frame"));
            fresh.iter().for_each(|pfn| map.put_in_transit(std::slice::from_ref(pfn), ME));
        }
    });
    line("alloc, and put one by one, all the last", freeing);
    let live = best(TURNS, || (0..TURNS).for_each(|_| _ = black_box(map.live(ME).is_ok())));
    line("a live reference, taken and given back", live);
    assert_eq!(frames.used(), 1024, "every reference was given back");
}
