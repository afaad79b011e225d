//! The data that the access program works on: pages of a chosen compressibility in which every read can
//! be checked.
//!
//! A page is a copy of one of [`TEMPLATES`] prepared pages with its first word replaced by a *stamp*:
//! the page's number (salted with the seed) in the high half and a version in the low half. So what a
//! page must hold follows from the seed, its number and its version, a page that comes back in the wrong
//! place shows at once, and a lost write shows in the sum of the versions.

use std::str::FromStr;

/// 64-bit words of a page.
pub const WORDS: usize = 512;

/// Prepared pages: 256 KiB, so that copying from them costs what a cached copy costs.
pub const TEMPLATES: usize = 64;

/// What the pages hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Content {
    /// One contiguous part of pseudo-random bytes, again and again: an LZ4 form of 1/ratio that is one long literal run
    /// and one long match, and so decompresses fast.
    Ratio(f64),
    /// Words of a small vocabulary: an LZ4 form of many short matches, which decompresses slowly.
    Text,
}

impl FromStr for Content {
    type Err = String;

    fn from_str(s: &str) -> Result<Content, String> {
        if s == "text" {
            return Ok(Content::Text);
        }
        match s.parse::<f64>() {
            Ok(r) if (1.0..=200.0).contains(&r) => Ok(Content::Ratio(r)),
            _ => Err(format!("'{s}' is not a ratio from 1 to 200, nor 'text'")),
        }
    }
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Content::Ratio(r) => write!(f, "{r}"),
            Content::Text => f.write_str("text"),
        }
    }
}

/// A small fast generator of pseudo-random numbers (SplitMix64); for test data only.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Two generators with the same seed give the same numbers.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }
}

/// The prepared pages and the salt of the stamps.
pub struct Template {
    pages: Vec<[u64; WORDS]>,
    salt: u32,
}

impl Template {
    /// The pages that `content` and `seed` stand for.
    pub fn new(content: Content, seed: u64) -> Template {
        let mut random = Random::new(seed);
        let salt = random.next_u64() as u32;
        let pages = (0..TEMPLATES).map(|_| page(content, &mut random)).collect();
        Template { pages, salt }
    }

    /// What page `page` holds, but for its first word.
    pub fn of(&self, page: usize) -> &[u64; WORDS] {
        &self.pages[page % TEMPLATES]
    }

    /// The first word of page `page` at `version`. Adding 1 to the word is the next version.
    pub fn stamp(&self, page: usize, version: u32) -> u64 {
        u64::from(page as u32 ^ self.salt) << 32 | u64::from(version)
    }

    /// The version in a first word, or `None` if the word is not that of page `page`.
    pub fn version(&self, page: usize, word: u64) -> Option<u32> {
        ((word >> 32) as u32 == page as u32 ^ self.salt).then_some(word as u32)
    }
}

fn page(content: Content, random: &mut Random) -> [u64; WORDS] {
    let mut page = [0; WORDS];
    match content {
        Content::Ratio(ratio) => {
            let noise = (WORDS as f64 / ratio).round() as usize;
            // Not one repeated word: LZ4 copies a match that is 8 bytes back word by word, each waiting for the
            // one before, which takes 1.1 µs for 3 KiB where a match further back takes 0.1.
            for i in 0..WORDS {
                page[i] = if i < noise { random.next_u64() } else { page[i - noise] };
            }
        }
        Content::Text => {
            const WORDS_OF_TEXT: [&str; 24] = [
                "page ",
                "frame ",
                "the ",
                "of ",
                "a ",
                "memory ",
                "device ",
                "count ",
                "returns ",
                "to ",
                "kernel, ",
                "is ",
                "fault ",
                "and ",
                "moves ",
                "in ",
                "when ",
                "reader ",
                "last. ",
                "free ",
                "who ",
                "holds ",
                "reference ",
                "it ",
            ];
            let mut bytes = Vec::with_capacity(WORDS * 8 + 16);
            while bytes.len() < WORDS * 8 {
                if random.below(8) == 0 {
                    bytes.extend_from_slice(random.below(100_000).to_string().as_bytes());
                    bytes.push(b' ');
                } else {
                    bytes.extend_from_slice(WORDS_OF_TEXT[random.below(WORDS_OF_TEXT.len())].as_bytes());
                }
            }
            for (word, bytes) in page.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_pages() {
        let (a, b, c) = (
            Template::new(Content::Ratio(2.0), 7),
            Template::new(Content::Ratio(2.0), 7),
            Template::new(Content::Ratio(2.0), 8),
        );
        assert_eq!(a.of(3), b.of(3));
        assert_ne!(a.of(3), c.of(3));
        assert_ne!(a.of(3), a.of(4));
        assert_eq!(a.of(3), a.of(3 + TEMPLATES));
    }

    #[test]
    fn ratio_sets_the_share_of_noise() {
        for (ratio, noise) in [(1.0, 512), (2.0, 256), (4.0, 128)] {
            let t = Template::new(Content::Ratio(ratio), 1);
            let page = t.of(0);
            let different: std::collections::HashSet<_> = page.iter().collect();
            assert_eq!(different.len(), noise, "{ratio}");
            assert!((noise..512).all(|i| page[i] == page[i - noise]), "{ratio}");
        }
    }

    #[test]
    fn text_is_text_and_not_one_pattern() {
        let t = Template::new(Content::Text, 1);
        assert!(t.of(0).iter().flat_map(|w| w.to_le_bytes()).all(|b| (b' '..=b'z').contains(&b)));
        assert!(t.of(0).iter().collect::<std::collections::HashSet<_>>().len() > 300);
    }

    #[test]
    fn stamps_know_their_page_and_count_versions() {
        let t = Template::new(Content::Text, 9);
        assert_eq!(t.version(70_000, t.stamp(70_000, 0) + 5), Some(5));
        assert_eq!(t.version(70_001, t.stamp(70_000, 5)), None);
        assert_eq!(t.version(70_000, 0), None);
    }

    #[test]
    fn below_stays_below_and_reaches_all() {
        let mut random = Random::new(1);
        let mut seen = [0; 10];
        (0..1000).for_each(|_| seen[random.below(10)] += 1);
        assert!(seen.iter().all(|n| *n > 50), "{seen:?}");
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn bad_content_is_refused() {
        for bad in ["0", "0.5", "nan", "inf", "-2", "x", "", "201"] {
            assert!(bad.parse::<Content>().is_err(), "{bad}");
        }
        assert_eq!("4".parse(), Ok(Content::Ratio(4.0)));
        assert_eq!("text".parse(), Ok(Content::Text));
    }
}
