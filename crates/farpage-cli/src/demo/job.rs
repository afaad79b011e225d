//! The job of `farpage demo`: sorts records in memory, looks some up, and sums them up. What must come out
//! can be computed without holding the records: see [`Records::expected`].

use std::io::{self, Write};

use xxhash_rust::xxh3::Xxh3;

use crate::bench::data::Random;

/// Bytes of a record.
pub const RECORD: u64 = 64;

/// A record: a key and some text about it.
#[derive(Clone, Copy)]
struct Record {
    key: u64,
    text: [u8; 56],
}

impl Record {
    fn add_to(&self, sum: &mut Xxh3) {
        sum.update(&self.key.to_le_bytes());
        sum.update(&self.text);
    }
}

/// What the job found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Result {
    /// Checksum of all records in order.
    pub digest: u128,
    /// Look-ups that found the record they should.
    pub found: u64,
}

/// The parts of the job, in order.
pub const PHASES: [&str; 4] = ["fill", "sort", "look up", "check"];

/// `n` records whose keys are 0 to n-1 in an order that no sort can guess: record `i` has the key
/// `factor * i + shift` modulo `n`.
pub struct Records {
    n: u64,
    factor: u64,
    shift: u64,
}

impl Records {
    /// As many records as fit in `bytes`, at least one.
    pub fn in_bytes(bytes: u64) -> Records {
        let n = (bytes / RECORD).max(1);
        let mut factor = (n as f64 * 0.618_034) as u64 | 1;
        while gcd(factor, n) != 1 {
            factor += 2;
        }
        Records { n, factor, shift: n / 3 }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.n
    }

    fn key(&self, i: u64) -> u64 {
        ((u128::from(self.factor) * u128::from(i) + u128::from(self.shift)) % u128::from(self.n)) as u64
    }

    fn record(&self, i: u64) -> Record {
        let key = self.key(i);
        let mut text = *b"customer 0000000000 of Farpage Lane, balance 000000000 ;";
        digits(&mut text[9..19], i);
        digits(&mut text[45..54], Random::new(i).next_u64() >> 36);
        Record { key, text }
    }

    /// The checksum that the sorted records must have, computed without sorting or storing them: the
    /// record with key `k` is number `(k - shift) / factor` modulo `n`.
    pub fn expected(&self) -> u128 {
        let inverse = u128::from(inverse(self.factor % self.n, self.n));
        let mut sum = Xxh3::new();
        for key in 0..self.n {
            let distance = u128::from((key + self.n - self.shift) % self.n);
            self.record((distance * inverse % u128::from(self.n)) as u64).add_to(&mut sum);
        }
        sum.digest128()
    }

    /// Does the job: fills memory with the records, sorts them in place, looks up `lookups` random keys,
    /// sums up. Calls `progress` with the phase and the share of it that is done.
    pub fn run(&self, lookups: u64, mut progress: impl FnMut(usize, f64)) -> Result {
        let every = (self.n / 100).max(1);
        let mut records = Vec::with_capacity(self.n as usize);
        for i in 0..self.n {
            records.push(self.record(i));
            if i % every == 0 {
                progress(0, i as f64 / self.n as f64);
            }
        }
        sort(&mut records, 0.0, 1.0, &mut |share| progress(1, share));
        let mut random = Random::new(self.n);
        let mut found = 0;
        for i in 0..lookups {
            // A record's text names its number, from which its key follows.
            let key = random.below(self.n as usize) as u64;
            let record = records.binary_search_by_key(&key, |r| r.key).ok().map(|at| &records[at]);
            found +=
                u64::from(record.is_some_and(|r| r.key == key && self.key(number(&r.text[9..19])) == key));
            if i % (lookups / 100).max(1) == 0 {
                progress(2, i as f64 / lookups as f64);
            }
        }
        let mut sum = Xxh3::new();
        for (i, record) in records.iter().enumerate() {
            record.add_to(&mut sum);
            if (i as u64).is_multiple_of(every) {
                progress(3, i as f64 / self.n as f64);
            }
        }
        progress(3, 1.0);
        say_what_is_wrong(&records);
        Result { digest: sum.digest128(), found }
    }
}

/// Names the pieces of memory whose records are not the ones that belong there, on stderr: what a
/// search for the fault needs. Sorted records have the keys 0, 1, 2, ….
fn say_what_is_wrong(records: &[Record]) {
    let right = |(i, record): &(usize, &Record)| record.key == *i as u64;
    let mut rest = records.iter().enumerate().filter(|r| !right(r)).peekable();
    for _ in 0..10 {
        let Some((first, record)) = rest.next() else { return };
        let mut last = first;
        while rest.next_if(|(i, _)| *i == last + 1).is_some() {
            last += 1;
        }
        let _ = writeln!(
            io::stderr(),
            "farpage demo: records {first} to {last} are wrong, {} KiB at {:p}; the first has the key {} and says {:?}",
            (last - first + 1) as u64 * RECORD / 1024,
            record,
            record.key,
            String::from_utf8_lossy(&record.text),
        );
    }
}

/// Sorts in place: halves the slice around its median until a part is small enough to be sorted at
/// once. `progress` gets the share that is sorted, between `from` and `to` here.
fn sort(records: &mut [Record], from: f64, to: f64, progress: &mut impl FnMut(f64)) {
    const AT_ONCE: usize = (16 << 20) / RECORD as usize;
    if records.len() <= AT_ONCE {
        records.sort_unstable_by_key(|r| r.key);
        return progress(to);
    }
    let middle = records.len() / 2;
    let (left, _, right) = records.select_nth_unstable_by_key(middle, |r| r.key);
    sort(left, from, (from + to) / 2.0, progress);
    sort(right, (from + to) / 2.0, to, progress);
}

/// Prints what happens line by line, for the parent: `PHASE SHARE`, at last `= DIGEST FOUND`.
pub fn run_and_print(bytes: u64, lookups: u64) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut print = |line: String| out.write_all(line.as_bytes()).and_then(|()| out.flush());
    let mut failure = Ok(());
    let result = Records::in_bytes(bytes).run(lookups, |phase, share| {
        if let Err(error) = print(format!("{phase} {share:.3}\n")) {
            failure = Err(error);
        }
    });
    failure?;
    print(format!("= {:032x} {}\n", result.digest, result.found))
}

/// One line of [`run_and_print`].
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    /// A phase, and the share of it that is done.
    Progress(usize, f64),
    /// The end.
    Result(Result),
}

/// Reads a line; `None` for anything else.
pub fn parse(line: &str) -> Option<Line> {
    let mut fields = line.split_ascii_whitespace();
    match fields.next()? {
        "=" => {
            let digest = u128::from_str_radix(fields.next()?, 16).ok()?;
            Some(Line::Result(Result { digest, found: fields.next()?.parse().ok()? }))
        }
        phase => {
            let phase = phase.parse().ok().filter(|p| *p < PHASES.len())?;
            Some(Line::Progress(phase, fields.next()?.parse().ok()?))
        }
    }
}

fn digits(to: &mut [u8], mut n: u64) {
    for digit in to.iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        n /= 10;
    }
}

fn number(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |n, d| n * 10 + u64::from(d.wrapping_sub(b'0')))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `x` with `a * x = 1` modulo `n`, for `a` and `n` without a common factor (extended Euclid).
fn inverse(a: u64, n: u64) -> u64 {
    let (mut r, mut next_r) = (i128::from(n), i128::from(a));
    let (mut t, mut next_t) = (0, 1);
    while next_r != 0 {
        let q = r / next_r;
        (r, next_r) = (next_r, r - q * next_r);
        (t, next_t) = (next_t, t - q * next_t);
    }
    t.rem_euclid(i128::from(n)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_gives_what_is_expected() {
        for bytes in [0, 64, 128, 6400, 65536, 99_968, 40 << 20] {
            let records = Records::in_bytes(bytes);
            let mut last = (0, 0.0);
            let result = records.run(50, |phase, share| {
                assert!((phase, share) >= last && share <= 1.0, "{phase} {share} after {last:?}");
                last = (phase, share);
            });
            assert_eq!(result, Result { digest: records.expected(), found: 50 }, "{bytes}");
            assert_eq!(last, (3, 1.0));
        }
    }

    #[test]
    fn keys_are_a_permutation_in_disorder() {
        let records = Records::in_bytes(64 * 1000);
        let mut keys: Vec<u64> = (0..1000).map(|i| records.key(i)).collect();
        let ascents = keys.windows(2).filter(|w| w[0] < w[1]).count();
        assert!((300..700).contains(&ascents), "{ascents}");
        keys.sort_unstable();
        assert_eq!(keys, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn another_record_gives_another_checksum() {
        let records = Records::in_bytes(6400);
        let other = Records { shift: records.shift + 1, ..records };
        assert_ne!(Records::in_bytes(6400).expected(), other.expected());
    }

    #[test]
    fn lines_are_read_back() {
        let result = Result { digest: 0xabc << 100, found: 7 };
        assert_eq!(parse(&format!("= {:032x} {}", result.digest, result.found)), Some(Line::Result(result)));
        assert_eq!(parse("2 0.250"), Some(Line::Progress(2, 0.25)));
        for bad in ["", "9 0.1", "1", "1 x", "= xyz 1", "= 1", "hello world"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
