//! A vector larger than DRAM: prefix sums of numbers, and searches in them.
//!
//!     cargo run --release --example paged_vector [-- SIZE [DRAM]]      (default: 256M within 32M)

use std::error::Error;
use std::time::Instant;

use farpage::Domain;
use farpage::size::{format_size, parse_size};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size = parse_size(&args.next().unwrap_or("256M".into()))? as usize;
    let dram = args.next().unwrap_or("32M".into());

    // A budget, a device that compresses, and a space whose faults threads of its own resolve.
    let space = Domain::builder().dram(&dram).device("ram").build()?.start()?;
    // Zeros; nothing of it takes memory before it is touched.
    let mut sums = space.region::<u64>(size / 8)?;

    let began = Instant::now();
    let mut sum = 0;
    for (i, s) in sums.iter_mut().enumerate() {
        sum += step(i);
        *s = sum;
    }
    // Where the sums pass a value: accesses all over the vector.
    for k in 1..=1000 {
        let value = sum / 1000 * k;
        let i = sums.partition_point(|&s| s < value);
        if sums[i] < value || (i > 0 && sums[i - 1] >= value) {
            return Err("the sums are not what was written".into());
        }
    }
    println!("{} prefix sums and 1000 searches in {:.1} s", sums.len(), began.elapsed().as_secs_f64());

    let stats = space.domain.stats();
    println!(
        "{} of data in at most {} of DRAM: {} pages went out, {} came back",
        format_size(size as u64),
        format_size(stats.dram_peak),
        stats.pages_out,
        stats.pages_in
    );
    if stats.dram_peak > stats.dram_budget {
        return Err("the budget was not kept".into());
    }
    Ok(())
}

fn step(i: usize) -> u64 {
    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52
}
