//! Compaction: objects of sparse chunks move into fuller ones, while others read them.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use super::*;

impl Held<'_> {
    /// Moves the objects of sparse chunks into fuller ones, at most `most` chunks, while more than a 16th of
    /// the divided chunks is free (`full`: as long as a chunk can be gained). Returns the chunks gained.
    ///
    /// Readers take no lock, so one may be reading an object while it is moved. The order here is: copy the
    /// bytes, switch the location, and only then (a Release fence later) may anyone write to the old slot. A
    /// reader copies the bytes and then (an Acquire fence later) reads the location again. If he copied a byte
    /// that was written to the old slot after the move, the fences order our switch before his second look: he
    /// sees another location and starts again. `moves` makes it another one even if the object has come back to
    /// the old slot meanwhile. What he decompresses is always his own copy of bytes that were the object.
    pub fn compact(&self, most: usize, full: bool) -> usize {
        let mut gained = 0;
        while gained < most {
            let slack = self.pool.sums[1].load(Relaxed);
            let used = u64::from(self.head(USED)) * CHUNK as u64;
            if !full && (slack <= used / 16 || slack < 4 * CHUNK as u64) {
                break;
            }
            // The class with the most free bytes of which a chunk can be emptied into others.
            let free = |class: usize| self.head(FREE + class) as usize * TABLE[class].size;
            let class = (0..CLASSES).filter(|&c| self.sparsest(c, full).is_some()).max_by_key(|&c| free(c));
            let Some((class, victim)) = class.and_then(|class| Some((class, self.sparsest(class, full)?)))
            else {
                break;
            };
            if !self.evacuate(victim, class, full) {
                break;
            }
            gained += 1;
        }
        gained
    }

    /// The sparsest chunk of `class`, if what it holds has room in other chunks.
    fn sparsest(&self, class: usize, full: bool) -> Option<usize> {
        let room: usize = self.near(class, full).map(|class| self.head(FREE + class) as usize).sum();
        // Its own free slots are no room, so `room` has to be a whole chunk.
        if room < TABLE[class].slots {
            return None;
        }
        (PARTIAL + class * GROUPS..PARTIAL + (class + 1) * GROUPS)
            .find_map(|list| (self.head(list) as usize).checked_sub(1))
    }

    /// Moves every object of `victim` elsewhere. False: some could not be moved.
    fn evacuate(&self, victim: usize, class: usize, full: bool) -> bool {
        // Out of its list while we look for other slots; `set_count` expects it there again.
        let list = |count| Self::list_of(class, count);
        let mut moved = 0;
        list(self.get(victim, COUNT)).inspect(|l| self.unlink(*l, victim));
        for (i, word) in self.map(victim).iter().enumerate() {
            let mut bits = word.load(Relaxed);
            while bits != 0 {
                let slot = i * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                moved += usize::from(self.move_object(victim, class, slot, full));
            }
        }
        let count = self.get(victim, COUNT);
        list(count).inspect(|l| self.push(*l, victim));
        debug_assert!(moved <= count);
        self.set_count(victim, class, count - moved);
        if count == moved {
            self.retire(victim, class);
        }
        count == moved
    }

    /// Moves one object to another chunk of its class. Its old slot's bit is cleared, the count is the caller's.
    fn move_object(&self, chunk: usize, class: usize, slot: usize, full: bool) -> bool {
        let pool = self.pool;
        let unit = (chunk * UNITS + slot * TABLE[class].size / UNIT) as u32;
        let mut bytes = [0; MAX_OBJECT];
        let bytes = &mut bytes[..TABLE[class].size];
        pool.data.read(unit as usize * UNIT, &mut bytes[..HEADER]);
        let pfn = u32::from_ne_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
        // The header of an object that is being stored is not there yet: then the location of the frame that
        // it seems to name is not this slot, or it says `busy`.
        let Some(word) = pool.locs.get(pfn) else { return false };
        // Acquire pairs with the storer's Release, which cleared `busy`: the bytes are all there.
        let old = word.load(Acquire);
        let Some(loc) = Loc::unpack(old).filter(|loc| loc.unit == unit && !loc.busy) else { return false };
        let Some(to) = self.alloc_near(class, full) else { return false };
        let len = HEADER + loc.len;
        pool.data.read(unit as usize * UNIT, &mut bytes[..len]);
        pool.data.write(to as usize * UNIT, &bytes[..len]);
        // Release: a reader who sees the new location sees the bytes there.
        word.store(Loc { unit: to, moves: loc.moves + 1, ..loc }.pack(), Release);
        // Whatever is written to the old slot from now on comes after the switch (see `compact`).
        fence(Release);
        let map = &self.map(chunk)[slot / 64];
        map.store(map.load(Relaxed) & !(1 << (slot % 64)), Relaxed);
        true
    }
}
