//! Size classes: into how many equal slots a chunk may be divided.
//!
//! Class sizes follow from slot counts (a chunk divided by `n`), so that little is left over at the end of a
//! chunk, and they lie at most a 16th apart.

use super::pool::{CHUNK, UNIT};

/// Bytes of the smallest slot.
pub const MIN_SLOT: usize = 64;
/// The most slots a chunk can have.
pub const MAX_SLOTS: usize = CHUNK / MIN_SLOT;
/// Slots of a chunk of the largest class: one holds an uncompressed page with its header.
const FEWEST_SLOTS: usize = 15;

const fn slot_size(slots: usize) -> usize {
    CHUNK / slots / UNIT * UNIT
}

/// The next slot count whose slots are smaller, by a 16th or by one unit at least.
const fn next_slots(slots: usize) -> usize {
    let mut next = slots + if slots < 32 { 1 } else { slots / 16 };
    while slot_size(next) == slot_size(slots) {
        next += 1;
    }
    // As many slots of this size as fit.
    let most = CHUNK / slot_size(next);
    if most > MAX_SLOTS { MAX_SLOTS } else { most }
}

const fn count_classes() -> usize {
    let (mut classes, mut slots) = (1, FEWEST_SLOTS);
    while slots < MAX_SLOTS {
        slots = next_slots(slots);
        classes += 1;
    }
    classes
}

/// Number of classes.
pub const CLASSES: usize = count_classes();

/// One class.
#[derive(Debug, Clone, Copy)]
pub struct Class {
    /// Bytes of a slot, a multiple of [`UNIT`].
    pub size: usize,
    /// Slots of a chunk.
    pub slots: usize,
}

/// All classes, the smallest slots first.
pub const TABLE: [Class; CLASSES] = {
    let mut table = [Class { size: 0, slots: 0 }; CLASSES];
    let (mut i, mut slots) = (CLASSES, FEWEST_SLOTS);
    while i > 0 {
        i -= 1;
        table[i] = Class { size: slot_size(slots), slots };
        slots = next_slots(slots);
    }
    table
};

/// The largest object that has a class, in bytes.
pub const MAX_OBJECT: usize = TABLE[CLASSES - 1].size;

/// Class of each size in units.
const BY_UNITS: [u8; MAX_OBJECT / UNIT + 1] = {
    let mut map = [0; MAX_OBJECT / UNIT + 1];
    let (mut units, mut class) = (0, 0);
    while units < map.len() {
        if units * UNIT > TABLE[class].size {
            class += 1;
        }
        map[units] = class as u8;
        units += 1;
    }
    map
};

/// The smallest class whose slots hold `bytes` (at most [`MAX_OBJECT`]).
pub fn class_of(bytes: usize) -> usize {
    usize::from(BY_UNITS[bytes.div_ceil(UNIT)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_sound() {
        const { assert!(MAX_OBJECT >= crate::PAGE_SIZE + 16) };
        assert_eq!((TABLE[0].size, TABLE[0].slots), (MIN_SLOT, MAX_SLOTS));
        for pair in TABLE.windows(2) {
            assert!(pair[0].size < pair[1].size && pair[0].slots > pair[1].slots, "{pair:?}");
        }
        for (i, class) in TABLE.iter().enumerate() {
            assert!(class.size % UNIT == 0 && class.size * class.slots <= CHUNK, "{class:?}");
            assert_eq!(class_of(class.size), i);
        }
    }

    #[test]
    fn every_size_finds_the_smallest_class_and_wastes_little() {
        let (mut waste, mut bytes) = (0.0, 0.0);
        for size in 1..=MAX_OBJECT {
            let class = TABLE[class_of(size)];
            assert!(class.size >= size);
            assert!(class_of(size) == 0 || TABLE[class_of(size) - 1].size < size);
            if size >= 512 {
                let cost = CHUNK as f64 / class.slots as f64;
                assert!(cost / size as f64 <= 1.15, "{size}: {cost}");
                waste += cost - size as f64;
                bytes += size as f64;
            }
        }
        assert!(waste / bytes < 0.05, "mean waste {}", waste / bytes);
    }
}
