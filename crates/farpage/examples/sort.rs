//! Out-of-core sort: numbers that do not fit DRAM, sorted in place as if they did.
//!
//! The region is *inline*: the thread that touches a page brings it in, without a switch to another thread. That suits a
//! program that computes, and passes nothing of the region to system calls.
//!
//!     cargo run --release --example sort [-- SIZE [DRAM]]              (default: 256M within 64M)

use std::error::Error;
use std::time::Instant;

use farpage::Domain;
use farpage::size::{format_size, parse_size};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size = parse_size(&args.next().unwrap_or("256M".into()))?;
    let dram = args.next().unwrap_or("64M".into());

    let space = Domain::builder().dram(&dram).device("ram").build()?.start_inline()?;
    let mut seed = 1u64;
    let mut random = |_| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed >> 32 // half of each word is zero: compresses to about half
    };
    let mut numbers = space.region_from_fn(size as usize / 8, &mut random)?;
    let sum = numbers.iter().fold(0u64, |sum, n| sum.wrapping_add(*n));

    let began = Instant::now();
    numbers.sort_unstable();
    let seconds = began.elapsed().as_secs_f64();

    if !numbers.is_sorted() || numbers.iter().fold(0u64, |sum, n| sum.wrapping_add(*n)) != sum {
        return Err("not sorted, or not the same numbers".into());
    }
    let stats = space.domain.stats();
    println!(
        "{} numbers ({}) sorted within {} of DRAM in {seconds:.1} s; {} pages went out, {} came back",
        numbers.len(),
        format_size(size),
        format_size(stats.dram_budget),
        stats.pages_out,
        stats.pages_in
    );
    Ok(())
}
