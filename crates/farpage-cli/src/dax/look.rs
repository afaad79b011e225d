//! A look at a mapping: which of it the kernel maps by 2 MiB pages.
//!
//! `/proc/PID/smaps` does not tell: it counts no page of a DAX file as huge. The page map does (`PAGEMAP_SCAN`, since Linux 6.7),
//! and before that the count of faults: where one page of 2 MiB was mapped a touch of its middle and of its end is
//! none.

use std::ops::Range;

use farpage::PAGE_SIZE;
use farpage::sys::{PageScan, populate};

/// Bytes of a huge page.
pub const HUGE: u64 = 2 << 20;

/// Bytes of the file that could be mapped by huge pages, and those that are.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Huge {
    /// Whole aligned pieces of 2 MiB without a hole.
    pub possible: u64,
    /// Those that are mapped by one page.
    pub mapped: u64,
}

/// Touches one page of each piece, as a program that reads would, and looks. `addr` is where `start` of the file is mapped, and
/// `data` the parts of the mapping that are no holes.
pub fn huge_pages(addr: usize, start: u64, data: &[Range<u64>]) -> Huge {
    let mut huge = Huge::default();
    let scan = PageScan::open().ok();
    for piece in data.iter().flat_map(pieces) {
        huge.possible += HUGE;
        let at = addr + (piece - start) as usize;
        if (at as u64).is_multiple_of(HUGE) && is_huge(scan.as_ref(), at) {
            huge.mapped += HUGE;
        }
    }
    huge
}

/// Where aligned pieces of 2 MiB begin that are all in `part`.
fn pieces(part: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let first = part.start.next_multiple_of(HUGE);
    let end = part.end;
    (first..end).step_by(HUGE as usize).filter(move |piece| end - piece >= HUGE)
}

fn is_huge(scan: Option<&PageScan>, at: usize) -> bool {
    let touch = |addr| populate(addr, PAGE_SIZE, false).is_ok();
    if !touch(at) {
        return false;
    }
    let mut huge = 0;
    let counted = scan.map(|scan| {
        scan.kinds(at, at + HUGE as usize, |from, to, kind| huge += if kind.huge { to - from } else { 0 })
    });
    match counted {
        Some(Ok(())) => huge == HUGE as usize,
        // An older kernel.
        _ => {
            let before = crate::sys::faults();
            touch(at + HUGE as usize / 2)
                && touch(at + HUGE as usize - PAGE_SIZE)
                && crate::sys::faults() == before
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_aligned_pieces_count() {
        let of = |part: Range<u64>| pieces(&part).collect::<Vec<_>>();
        assert_eq!(of(0..HUGE), [0]);
        assert_eq!(of(1..2 * HUGE + 5), [HUGE]);
        assert_eq!(of(0..3 * HUGE), [0, HUGE, 2 * HUGE]);
        assert!(of(1..2 * HUGE - 1).is_empty());
        assert!(of(0..0).is_empty());
    }

    #[test]
    fn both_ways_of_looking_agree() {
        use farpage::sys::{collapse, map_anonymous, write_fault};
        let len = HUGE as usize;
        let base = map_anonymous(3 * len).unwrap();
        let at = base.next_multiple_of(len);
        write_fault(at, 2 * len);
        if collapse(at, len).is_err() {
            return crate::skipped!("no huge page can be had here");
        }
        let scan = PageScan::open().unwrap();
        assert!(is_huge(Some(&scan), at) && is_huge(None, at));
        farpage::sys::unmap(base, 3 * len).unwrap();

        // Small pages: of a file on which nothing was touched yet.
        let file = tempfile::tempfile().unwrap();
        file.set_len(HUGE).unwrap();
        let how = farpage::sys::dax::How { write: true, sync: false };
        farpage::sys::dax::map_file_at(std::os::fd::AsFd::as_fd(&file), 0, at, len, how).unwrap();
        assert!(!is_huge(None, at) && !is_huge(Some(&scan), at));
        farpage::sys::unmap(at, len).unwrap();
    }
}
