//! What the pool's tests look at: every account against the locations.

use super::*;

impl Pool {
    /// The process slot that holds the lock.
    pub fn holder(&self) -> u32 {
        self.head[LOCK].load(Relaxed) & 0xffff
    }
}

impl Held<'_> {
    fn list(&self, list: usize) -> Vec<usize> {
        let (mut chunks, mut next) = (vec![], self.head(list) as usize);
        while next != 0 {
            assert!(chunks.len() < self.pool.chunks, "list {list} has a loop");
            assert_eq!(self.get(next - 1, PREV), chunks.last().map_or(0, |c| c + 1));
            chunks.push(next - 1);
            next = self.get(next - 1, NEXT);
        }
        chunks
    }

    /// Asserts that everything derived agrees with the locations and that no chunk is lost.
    pub fn check(&self) {
        let pool = self.pool;
        let mut maps = vec![[0u64; MAP_WORDS]; pool.chunks];
        let mut payload = 0;
        for (pfn, loc) in pool.locs.iter().enumerate() {
            let Some(loc) = Loc::unpack(loc.load(Relaxed)) else { continue };
            let (chunk, class, slot) = self.slot_of(loc.unit).expect("a location is a slot");
            assert!(HEADER + loc.len <= TABLE[class].size && pfn < self.head(HIGH) as usize);
            assert_eq!(maps[chunk][slot / 64] & 1 << (slot % 64), 0, "two frames share a slot");
            maps[chunk][slot / 64] |= 1 << (slot % 64);
            payload += loc.len as u64;
        }
        assert_eq!(pool.sums[0].load(Relaxed), payload, "payload");
        let (mut used, mut slack, mut free) = (0, 0, [0; CLASSES]);
        let mut idle = [self.list(EMPTY), self.list(BARE)].concat();
        assert_eq!(self.head(EMPTY_COUNT) as usize, self.list(EMPTY).len());
        for (chunk, map) in maps.iter().enumerate() {
            let Some(class) = self.get(chunk, CLASS).checked_sub(1) else {
                assert!(chunk >= self.head(FRESH) as usize || idle.contains(&chunk), "chunk {chunk} is lost");
                continue;
            };
            used += 1;
            let count: usize = map.iter().map(|w| w.count_ones() as usize).sum();
            assert!(count > 0, "an empty chunk is divided");
            assert_eq!(self.get(chunk, COUNT), count);
            assert!(self.map(chunk).iter().zip(map).all(|(a, b)| a.load(Relaxed) == *b), "bitmap {chunk}");
            free[class] += TABLE[class].slots - count;
            slack += ((TABLE[class].slots - count) * TABLE[class].size) as u64;
            for list in PARTIAL..FREE {
                let here = Self::list_of(class, count) == Some(list);
                // Lists are short in tests.
                assert_eq!(self.list(list).contains(&chunk), here, "chunk {chunk}, list {list}");
            }
        }
        assert_eq!(self.head(USED), used);
        assert_eq!(pool.sums[1].load(Relaxed), slack);
        assert!((0..CLASSES).all(|c| self.head(FREE + c) as usize == free[c]));
        idle.sort_unstable();
        let all = idle.len();
        idle.dedup();
        assert_eq!(idle.len(), all, "a chunk is in two lists");
    }

    /// Overwrites everything that can be derived.
    pub fn scramble(&self) {
        for word in [EMPTY, EMPTY_COUNT, BARE, USED].into_iter().chain(PARTIAL..HEAD_WORDS) {
            self.set_head(word, 0xdead);
        }
        self.pool.sums.iter().for_each(|sum| sum.store(0xdead, Relaxed));
        self.pool.maps.iter().for_each(|map| map.store(0xdead, Relaxed));
        for chunk in 0..self.pool.chunks {
            [COUNT, NEXT, PREV].into_iter().for_each(|word| self.set(chunk, word, 0xdead));
        }
    }
}
