//! Sets of small numbers: of a granule's pages (one `u64`), and of slots.

/// `len` set bits from `first`.
pub fn mask(first: usize, len: usize) -> u64 {
    if len == 0 { 0 } else { (u64::MAX >> (64 - len)) << first }
}

/// The runs of set bits, as (first, length).
pub fn runs(mut bits: u64) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros() as usize;
        let len = (!(bits >> first)).trailing_zeros().min(64 - first as u32) as usize;
        bits &= !mask(first, len);
        Some((first, len))
    })
}

/// The members of the set, in order.
pub fn members(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let first = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(first)
    })
}

/// A set of numbers below a limit.
pub struct BitSet(Vec<u64>);

impl BitSet {
    /// An empty set of numbers below `n`.
    pub fn new(n: usize) -> Self {
        Self(vec![0; n.div_ceil(64)])
    }

    /// Puts `i` in, or takes it out.
    pub fn set(&mut self, i: usize, there: bool) {
        let bit = 1 << (i % 64);
        if there { self.0[i / 64] |= bit } else { self.0[i / 64] &= !bit }
    }

    /// Whether `i` is in it.
    pub fn has(&self, i: usize) -> bool {
        self.0[i / 64] & (1 << (i % 64)) != 0
    }

    /// The first of eight consecutive members that begin at a multiple of eight.
    pub fn eight(&self) -> Option<usize> {
        let at = |word: u64| word.to_le_bytes().iter().position(|&b| b == u8::MAX);
        self.0.iter().enumerate().find_map(|(w, &word)| at(word).map(|i| w * 64 + i * 8))
    }

    /// The first run of `want` consecutive members, or else the longest one, as (first, length); `None` if the set is
    /// empty.
    pub fn run(&self, want: usize) -> Option<(usize, usize)> {
        let mut best = (0, 0);
        // The run that ends where we look.
        let mut open = (0, 0);
        for (w, &word) in self.0.iter().enumerate() {
            for (first, len) in runs(word) {
                let first = w * 64 + first;
                open = if open.0 + open.1 == first { (open.0, open.1 + len) } else { (first, len) };
                if open.1 >= want {
                    return Some((open.0, want));
                }
                if open.1 > best.1 {
                    best = open;
                }
            }
        }
        (best.1 > 0).then_some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_run_is_the_first_long_enough_or_the_longest(members in prop::collection::btree_set(0usize..300, 0..300), want in 1usize..90) {
            let mut set = BitSet::new(300);
            (0..300).for_each(|i| set.set(i, true));
            (0..300).filter(|i| !members.contains(i)).for_each(|i| set.set(i, false));
            let len_at = |i: usize| (i..300).take_while(|j| members.contains(j)).count();
            let found = set.run(want);
            match (0..300).find(|&i| len_at(i) >= want) {
                Some(first) => prop_assert_eq!(found, Some((first, want))),
                None => prop_assert_eq!(found.map_or(0, |r| r.1), (0..300).map(len_at).max().unwrap_or(0)),
            }
            if let Some((first, len)) = found {
                prop_assert!(len_at(first) >= len);
            }
            prop_assert_eq!(set.eight(), (0..300).step_by(8).find(|&i| len_at(i) >= 8));
        }

        #[test]
        fn runs_cover_the_set(bits: u64) {
            let mut seen = 0;
            for (first, len) in runs(bits) {
                prop_assert_eq!(seen & mask(first, len), 0);
                seen |= mask(first, len);
            }
            prop_assert_eq!(seen, bits);
            let each: Vec<usize> = members(bits).collect();
            let there: Vec<usize> = (0..64).filter(|i| bits & (1 << i) != 0).collect();
            prop_assert_eq!(each, there);
        }
    }
}
