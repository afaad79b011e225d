//! A histogram of latencies with buckets of constant relative width (about 3%).

/// Sub-buckets of each power of two, as a power of two.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB;

/// Counts of values in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Histogram {
    /// An empty one; 15 KiB.
    pub fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], total: 0, max: 0 }
    }

    /// Counts one value, in ns.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// Forgets the values below about `ns`: those whose whole bucket lies below it.
    pub fn drop_below(&mut self, ns: u64) {
        for count in &mut self.counts[..bucket(ns)] {
            self.total -= std::mem::take(count);
        }
    }

    /// Values counted.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The value in ns that a share `q` (0 to 1) of the values do not exceed, to within a bucket's
    /// width; 0 where nothing was counted.
    pub fn quantile(&self, q: f64) -> u64 {
        let rank = ((self.total as f64 * q).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(v: u64) -> usize {
    if v < SUB as u64 {
        return v as usize;
    }
    let exponent = 63 - v.leading_zeros();
    let sub = (v >> (exponent - SUB_BITS)) as usize & (SUB - 1);
    (exponent - SUB_BITS + 1) as usize * SUB + sub
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = bucket / SUB - 1;
    let lowest = ((SUB + bucket % SUB) as u64) << shift;
    lowest + ((1u64 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_values_in_order() {
        let values = (0..200).chain((8..64).flat_map(|e| [(1 << e) - 1, 1 << e, (1 << e) + 1]));
        let mut last = 0;
        for v in values.chain([u64::MAX]) {
            let b = bucket(v);
            assert!(b < BUCKETS && upper(b) >= v, "{v}");
            assert!(b >= last || v < 300, "{v}");
            assert!(upper(b) - v <= v / SUB as u64, "{v} {}", upper(b));
            last = b;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_known_values() {
        let mut h = Histogram::new();
        assert_eq!(h.quantile(0.5), 0);
        (1..=1000).for_each(|v| h.record(v * 100));
        for (q, want) in [(0.5, 50_000.0), (0.99, 99_000.0), (0.999, 99_900.0), (1.0, 100_000.0)] {
            let got = h.quantile(q) as f64;
            assert!((got / want - 1.0).abs() < 0.04, "{q}: {got}");
        }
        assert_eq!((h.count(), h.max), (1000, 100_000));
    }

    #[test]
    fn small_values_are_forgotten() {
        let mut h = Histogram::new();
        [10, 900, 1500, 2000].into_iter().for_each(|v| h.record(v));
        h.drop_below(1000);
        assert_eq!((h.count(), h.quantile(1.0)), (2, 2000));
        assert!((1500..1560).contains(&h.quantile(0.5)));
    }

    #[test]
    fn merging_adds() {
        let (mut a, mut b) = (Histogram::new(), Histogram::new());
        (0..99).for_each(|_| a.record(10));
        b.record(5000);
        a.merge(&b);
        assert_eq!((a.count(), a.max, a.quantile(0.99), a.quantile(1.0)), (100, 5000, 10, 5000));
    }
}
