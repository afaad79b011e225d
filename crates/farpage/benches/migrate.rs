//! What a migration costs beside a plain copy: `cargo bench --bench migrate`.
//!
//! 64 MiB to an uncompressed device and back, as a share of the bandwidth of `memcpy` between two such buffers; then pins,
//! snapshots. The best of several rounds, and the median.

#[path = "../tests/managed/mod.rs"]
mod managed;

use std::time::Instant;

use farpage::PAGE_SIZE;
use farpage::migrate::Target;
use farpage::space::pin::Pin;
use managed::Managed;

const MIB: usize = 1 << 20;
const LEN: usize = 64 * MIB;
const ROUNDS: usize = 15;

/// Nanoseconds: the best and the median.
fn best_and_median(mut all: Vec<f64>) -> (f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[0], all[all.len() / 2])
}

fn time(mut f: impl FnMut() -> f64) -> (f64, f64) {
    best_and_median((0..ROUNDS).map(|_| f()).collect())
}

fn took(f: impl FnOnce()) -> f64 {
    let before = Instant::now();
    f();
    before.elapsed().as_nanos() as f64
}

fn main() {
    let pages = (LEN / PAGE_SIZE) as f64;
    let managed = Managed::new(2048 * MIB, &["mem:256M"]);
    let m = managed.map(LEN);
    (0..m.pages()).for_each(|i| m.write(i, i as u64));
    let source: Vec<u64> = (0..LEN as u64 / 8).collect();
    let mut target = vec![1u64; LEN / 8];
    let (mut copy, mut out, mut back) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // In turn: a machine that is shared is not as fast in one second as in the next.
        copy.push(took(|| std::hint::black_box(&mut target).copy_from_slice(std::hint::black_box(&source))));
        out.push(took(|| {
            assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), m.pages());
        }));
        back.push(took(|| {
            assert_eq!(managed.space.migrate(m.range(), Target::System).unwrap().moved(), m.pages());
        }));
    }
    let [copy, out, back] = [copy, out, back].map(best_and_median);
    let line = |what: &str, t: (f64, f64)| {
        println!(
            "{what:28} {:5.2} GB/s best, {:5.2} median; {:.3} µs a page; {:3.0}% of memcpy (medians)",
            LEN as f64 / t.0,
            LEN as f64 / t.1,
            t.1 / pages / 1000.0,
            100.0 * copy.1 / t.1
        );
    };
    line("memcpy 64 MiB", copy);
    line("to mem and not back", out);
    line("back", back);
    line("both, each counted once", ((out.0 + back.0) / 2.0, (out.1 + back.1) / 2.0));
    for mib in [2, 16, 64] {
        let range = m.addr..m.addr + mib * MIB;
        let pages = (mib * MIB / PAGE_SIZE) as f64;
        for write in [false, true] {
            let t = time(|| took(|| drop(managed.space.pin(range.clone(), Pin::Short, write).unwrap())));
            println!("pin and unpin {mib:2} MiB, write {write:5}: {:.1} ns a page", t.1 / pages);
        }
    }
    drop(m);
    let m = managed.map(1024 * MIB);
    (0..m.pages()).step_by(2).for_each(|i| m.write(i, i as u64));
    managed.space.migrate(m.part(0, 64 * 256), Target::Device(0)).unwrap();
    let t = time(|| took(|| assert_eq!(managed.space.snapshot(m.range()).unwrap().len(), m.pages())));
    println!("snapshot of 1 GiB, every second page there, 64 MiB on the device: {:.2} ms", t.1 / 1e6);
}
