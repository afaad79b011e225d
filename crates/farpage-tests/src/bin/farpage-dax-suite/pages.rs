//! Pages whose bytes follow from a number and a generation, and can be told from everything else.

use std::ops::Range;

use farpage::dax::DaxFile;
use farpage_tests::Rng;

use crate::{Outcome, ensure};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
const WORDS: usize = PAGE as usize / 8;
/// The first word of each.
pub const MARK: u64 = 0x6661_7270_6167_6521;

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nothing but zeros.
    Zeros,
    /// Its own, of this number and generation.
    Page(u64, u64),
}

/// The bytes of pages `range`, in bytes.
pub fn bytes(range: Range<u64>) -> Range<u64> {
    range.start * PAGE..range.end * PAGE
}

/// One page.
pub fn fill(number: u64, generation: u64) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    let mut rng = Rng::new(number << 32 ^ generation);
    for (i, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let value = match i {
            0 => MARK,
            1 => number,
            2 => generation,
            _ => rng.draw(),
        };
        *word = value.to_le_bytes();
    }
    page
}

/// What is in a page; an error if it is neither zeros nor a whole page of ours.
pub fn look(page: &[u8]) -> Outcome<Held> {
    if page.iter().all(|b| *b == 0) {
        return Ok(Held::Zeros);
    }
    let words: Vec<u64> = page.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
    ensure!(words.len() == WORDS, "{} bytes are no page", page.len());
    ensure!(words[0] == MARK, "a page begins with {:#018x} {:#018x}, which is not ours", words[0], words[1]);
    let (number, generation) = (words[1], words[2]);
    let right = fill(number, generation);
    if let Some(at) = page.iter().zip(&right).position(|(a, b)| a != b) {
        return Err(format!("page {number} of generation {generation} is wrong from byte {at} on").into());
    }
    Ok(Held::Page(number, generation))
}

/// Writes pages by a system call.
pub fn write(file: &DaxFile, range: Range<u64>, generation: u64) -> Outcome {
    const PIECE: u64 = 256;
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PIECE);
        let piece: Vec<u8> = (at..end).flat_map(|n| fill(n, generation)).collect();
        let written = file.write_at(&piece, at * PAGE)?;
        ensure!(written == piece.len(), "wrote {written} of {} bytes", piece.len());
        at = end;
    }
    Ok(())
}

/// Looks at memory of whole pages: each is page `first + i`, of the generation.
pub fn verify(memory: &[u8], first: u64, generation: u64) -> Outcome {
    for (i, page) in memory.chunks(PAGE as usize).enumerate() {
        let wanted = Held::Page(first + i as u64, generation);
        let found = look(page)?;
        ensure!(found == wanted, "page {i} of {} is {found:?}, not {wanted:?}", memory.len() / PAGE as usize);
    }
    Ok(())
}

/// Memory at an address, copied.
///
/// # Safety
/// It is mapped, and stays so meanwhile.
pub unsafe fn copy(at: *const u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    // SAFETY: the caller's promise; whole words, read once each, as others may write meanwhile.
    unsafe {
        let words = at.cast::<u64>();
        for (i, word) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = words.add(i).read_volatile().to_ne_bytes();
        }
    }
    out
}

/// What lies in a file, without farpage.
pub fn of_path(path: &std::path::Path) -> Outcome<Vec<u8>> {
    Ok(std::fs::read(path)?)
}
