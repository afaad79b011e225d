//! What the integration tests share: the `farpage` binary, the C test programs, running a command plainly
//! and under `farpage run`, and a suite that counts what had to be skipped.
//!
//! Environment:
//! - `FARPAGE_BIN`: the binary to test instead of the one that cargo builds.
//! - `FARPAGE_TESTS=plain`: run only the plain half of each test (are the programs themselves right?).

mod binary;
mod compile;
mod job;
pub mod need;
mod stats;
mod suite;
pub mod tree;

pub use binary::{dmirror_library, farpage};
pub use compile::program;
pub use job::{Job, Outcome, Running, TestError, run_both, run_both_and, run_farpage, run_plain};
pub use stats::{Expect, Stats};
pub use suite::{Body, Test, Verdict, plain_only, suite};

/// Bytes in a mebibyte.
pub const MIB: u64 = 1 << 20;

/// A small generator for deterministic test data (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always gives the same sequence for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end` (0 where `end` is 0).
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.draw() % end }
    }
}
