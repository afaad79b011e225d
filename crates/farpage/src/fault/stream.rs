//! Streams: who reads page after page is given many at once.

use crate::PAGE_SIZE;
use crate::space::range::{GRANULE, GRANULE_PAGES, STRETCH};

/// Streams followed at once.
const STREAMS: usize = 16;

/// From which window on, in pages, what comes in ends with a granule: so whole staging slots are used up, and no piece of one is left.
const WIDE: usize = GRANULE_PAGES / 2;
/// From which on it ends with a page table: the kernel moves the pages of each by itself, and has other CPUs interrupted for each.
const TABLE: usize = STRETCH * GRANULE_PAGES;

/// A window of so many pages from `addr` on, shorter or longer so that it ends where it should.
pub(super) fn rounded(addr: usize, window: usize) -> usize {
    let unit = match window {
        ..WIDE => return window,
        WIDE..TABLE => GRANULE,
        TABLE.. => STRETCH * GRANULE,
    };
    let end = (addr + window * PAGE_SIZE) / unit * unit;
    let end = if end > addr { end } else { addr / unit * unit + unit };
    (end - addr) / PAGE_SIZE
}

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
    /// A fault at page `addr`: how many pages from there to bring in, at most `most`. 1 where no stream is seen.
    pub fn fault(&mut self, addr: usize, most: usize) -> usize {
        for s in &mut self.streams {
            // Once it is wide, a stream may skip what is there already.
            let reach = if s.window >= most { GRANULE } else { PAGE_SIZE };
            if s.window != 0 && addr >= s.next && addr < s.next + reach {
                let window = s.window;
                s.window = (s.window * 4).min(most);
                s.next = addr + PAGE_SIZE;
                return window.min(most);
            }
        }
        self.streams[self.oldest] = Stream { next: addr + PAGE_SIZE, window: 8 };
        self.oldest = (self.oldest + 1) % STREAMS;
        1
    }

    /// The pages from `from` to before `to` have been brought in: the stream that is about there goes on behind them.
    pub fn served(&mut self, from: usize, to: usize) {
        for s in &mut self.streams {
            if s.window != 0 && from <= s.next && s.next < to {
                s.next = to;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 512;

    #[test]
    fn what_comes_in_ends_with_a_granule_or_a_page_table() {
        let at = |page: usize| (1 << 30) + page * PAGE_SIZE;
        assert_eq!([1, 8, 31].map(|window| rounded(at(60), window)), [1, 8, 31]);
        assert_eq!(rounded(at(9), 32), 55, "up to the granule's end");
        assert_eq!(rounded(at(60), 32), 4, "not beyond it");
        assert_eq!(rounded(at(64), 128), 128);
        assert_eq!(rounded(at(64), 512), 448);
        assert_eq!(rounded(at(512), 512), 512);
        for page in 0..1100 {
            for window in [32, 64, 100, 511, 512] {
                let n = rounded(at(page), window);
                let unit = if window < 512 { 64 } else { 512 };
                assert!(
                    n > 0 && n <= window.max(unit) && (page + n).is_multiple_of(unit),
                    "{page} {window} {n}"
                );
            }
        }
    }

    #[test]
    fn sequential_faults_open_a_window_and_random_ones_do_not() {
        let mut s = Streams::default();
        let mut at = 1 << 30;
        for window in [1, 8, 32, 128, 512, 512] {
            assert_eq!(s.fault(at, MOST), window);
            s.served(at, at + window * PAGE_SIZE);
            at += window * PAGE_SIZE;
        }
        // What came in part goes on where it ended, and what another brought in is passed over.
        assert_eq!(s.fault(at, MOST), 512);
        s.served(at, at + 100 * PAGE_SIZE);
        assert_eq!(s.fault(at + 100 * PAGE_SIZE, MOST), 512);
        s.served(at + 100 * PAGE_SIZE, at + 200 * PAGE_SIZE);
        s.served(at + 200 * PAGE_SIZE, at + 600 * PAGE_SIZE);
        assert_eq!(s.fault(at + 600 * PAGE_SIZE, MOST), 512);
        for i in 0..100 {
            assert_eq!(s.fault((1 << 33) + i * 37 * GRANULE, MOST), 1);
        }
    }
}
