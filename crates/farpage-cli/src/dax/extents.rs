//! Where a file has data and where holes, without an ioctl: `SEEK_DATA` and `SEEK_HOLE`.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The parts of `range` that have data; the rest are holes. A file system without holes has data everywhere. Moves the
/// descriptor's position.
pub fn data(file: BorrowedFd<'_>, range: Range<u64>) -> rustix::io::Result<Vec<Range<u64>>> {
    let mut parts = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < range.end => start,
            // Only a hole is left, or the file ends here.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(range.end);
        // Somebody may punch at the same time.
        if end > start {
            parts.push(start..end);
        }
        at = end.max(start + 1);
    }
    Ok(parts)
}

/// Their bytes.
pub fn len(parts: &[Range<u64>]) -> u64 {
    parts.iter().map(|part| part.end - part.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_seen() {
        let file = tempfile::tempfile().unwrap();
        let of = |range| data(file.as_fd(), range).unwrap();
        assert_eq!(of(0..4096), []);
        file.set_len(10 << 20).unwrap();
        for at in [1 << 20, 5 << 20] {
            file.write_all_at(&[1; 1 << 20], at).unwrap();
        }
        assert_eq!(of(0..10 << 20), [1 << 20..2 << 20, 5 << 20..6 << 20]);
        assert_eq!(of(3 << 19..(5 << 20) + 4096), [3 << 19..2 << 20, 5 << 20..(5 << 20) + 4096]);
        assert_eq!(len(&of(0..u64::MAX >> 1)), 2 << 20);
        assert_eq!(of(7 << 20..9 << 20), []);
    }
}
