//! Streams: who reads page after page is given many at once.

use crate::PAGE_SIZE;
use crate::space::range::{GRANULE, GRANULE_PAGES};

/// Streams followed at once.
const STREAMS: usize = 16;
/// The most granules brought in ahead of a stream.
const AHEAD: usize = 8;

#[derive(Clone, Copy, Default)]
struct Stream {
    /// The first page not brought in yet.
    next: usize,
    /// Pages to bring in at the next fault.
    window: usize,
}

/// The latest streams.
#[derive(Default)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    oldest: usize,
}

impl Streams {
    /// A fault at page `addr`: how many pages from there to bring in. 1 where no stream is seen.
    pub fn fault(&mut self, addr: usize) -> usize {
        // A fault a little behind `next` is one in a granule that was still being brought in.
        for s in &mut self.streams {
            if s.window != 0 && addr >= s.next && addr < s.next + GRANULE {
                let hit = addr == s.next || s.window >= GRANULE_PAGES;
                if !hit {
                    continue;
                }
                s.window = (s.window * 4).min(GRANULE_PAGES * AHEAD);
                s.next = addr + s.window.min(GRANULE_PAGES) * PAGE_SIZE;
                return s.window;
            }
        }
        self.streams[self.oldest] = Stream { next: addr + PAGE_SIZE, window: 2 };
        self.oldest = (self.oldest + 1) % STREAMS;
        1
    }

    /// The stream that would fault at `from` has been served up to `to`.
    pub fn served(&mut self, from: usize, to: usize) {
        for s in &mut self.streams {
            if s.window > 2 && from <= s.next && s.next < to {
                s.next = to;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_faults_open_a_window_and_random_ones_do_not() {
        let mut s = Streams::default();
        let base = 1 << 30;
        assert_eq!(s.fault(base), 1);
        assert_eq!(s.fault(base + PAGE_SIZE), 8);
        assert_eq!(s.fault(base + 9 * PAGE_SIZE), 32);
        assert_eq!(s.fault(base + 41 * PAGE_SIZE), 128);
        for i in 0..100 {
            assert_eq!(s.fault((1 << 33) + i * 37 * GRANULE), 1);
        }
    }
}
