//! The location word: where a frame's object lies in the pool.

use crate::PAGE_SIZE;

/// Where an object lies, in one 64-bit word that is read and changed at once. 0: nowhere.
///
/// From the low end: 32 bits `unit` (offset in the pool in units of 32 bytes), 13 bits `len` (1 to 4096 bytes;
/// 4096: the page itself, not compressed), 1 bit `busy`, 18 bits `moves`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loc {
    /// Offset in the pool, in units.
    pub unit: u32,
    /// Bytes of the object, without its header.
    pub len: usize,
    /// Allocated, but its bytes are not all there yet: not to be moved.
    pub busy: bool,
    /// How often the object has been moved (modulo 2^18): a reader sees a move there and back.
    pub moves: u32,
}

const MOVES: u32 = (1 << 18) - 1;

impl Loc {
    /// The word of a frame without an object.
    pub const NONE: u64 = 0;

    /// The location as a word, never 0.
    pub fn pack(self) -> u64 {
        debug_assert!((1..=PAGE_SIZE).contains(&self.len));
        u64::from(self.unit)
            | (self.len as u64) << 32
            | u64::from(self.busy) << 45
            | u64::from(self.moves & MOVES) << 46
    }

    /// The location that `word` says, if it says a possible one.
    pub fn unpack(word: u64) -> Option<Self> {
        let len = (word >> 32) as usize & 0x1fff;
        (1..=PAGE_SIZE).contains(&len).then_some(Self {
            unit: word as u32,
            len,
            busy: word >> 45 & 1 != 0,
            moves: (word >> 46) as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for unit in [0, 1, u32::MAX] {
            for len in [1, 2048, 4096] {
                for (busy, moves) in [(false, 0), (true, MOVES), (false, 7)] {
                    let loc = Loc { unit, len, busy, moves };
                    assert_ne!(loc.pack(), Loc::NONE);
                    assert_eq!(Loc::unpack(loc.pack()), Some(loc));
                }
            }
        }
        let over = Loc { unit: 0, len: 1, busy: false, moves: MOVES + 1 };
        assert_eq!(Loc::unpack(over.pack()).unwrap().moves, 0);
        assert_eq!(Loc::unpack(Loc::NONE), None);
        assert_eq!(Loc::unpack(4097 << 32), None);
    }
}
