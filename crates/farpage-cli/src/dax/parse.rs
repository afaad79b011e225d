//! Parts of files and times, as people write them on the command line.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use farpage::size::{SizeError, format_size, parse_size};

/// The largest offset that the kernel knows (`off_t`).
const MAX_OFFSET: u64 = i64::MAX as u64;
/// The longest time, in milliseconds: 2^32 seconds, 136 years.
const MAX_MS: u64 = 1000 << 32;

/// A part of a file: never empty, never beyond what an offset can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    offset: u64,
    len: u64,
}

/// Why a text is not a part of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// No colon.
    #[error("`{0}` is not a part of a file (write OFFSET:LENGTH, for example 4M:64K)")]
    Syntax(String),
    /// One of the two is not a size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Nothing.
    #[error("`{0}` has no bytes")]
    Empty(String),
    /// It ends beyond the longest file.
    #[error("`{0}` ends beyond what a file can be (2^63 - 1 bytes)")]
    TooLarge(String),
}

impl Part {
    /// Its bytes.
    pub fn range(self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

impl FromStr for Part {
    type Err = PartError;

    fn from_str(text: &str) -> Result<Self, PartError> {
        let (offset, len) = text.split_once(':').ok_or_else(|| PartError::Syntax(text.to_owned()))?;
        let (offset, len) = (parse_size(offset)?, parse_size(len)?);
        if len == 0 {
            return Err(PartError::Empty(text.to_owned()));
        }
        match offset.checked_add(len) {
            Some(end) if end <= MAX_OFFSET => Ok(Self { offset, len }),
            _ => Err(PartError::TooLarge(text.to_owned())),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", format_size(self.offset), format_size(self.len))
    }
}

/// Bytes of a file as `0..64M`: exact, in the largest unit that is.
pub fn show(range: &Range<u64>) -> String {
    format!("{}..{}", format_size(range.start), format_size(range.end))
}

/// Why a text is not a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimeError {
    /// Not a whole number with an optional unit.
    #[error("`{0}` is not a time (write a whole number with ms, s, m, h or d, for example 500ms or 10s)")]
    Syntax(String),
    /// More than 136 years.
    #[error("time `{0}` is too long (at most 136 years)")]
    TooLarge(String),
}

/// Units in milliseconds, the longest first; a number without one is seconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A time such as `500ms`, `10s`, `2m`, or `10` (seconds).
pub fn parse_time(text: &str) -> Result<Duration, TimeError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let syntax = || TimeError::Syntax(text.to_owned());
    let ms = match unit {
        "" => 1000,
        unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(syntax)?.1,
    };
    if number.is_empty() {
        return Err(syntax());
    }
    // Only digits are left, so the one way to fail is overflow.
    let total = number.parse::<u64>().ok().and_then(|n| n.checked_mul(ms)).filter(|total| *total <= MAX_MS);
    total.map(Duration::from_millis).ok_or_else(|| TimeError::TooLarge(text.to_owned()))
}

/// The shortest exact form of whole milliseconds.
#[cfg(test)]
fn show_time(time: Duration) -> String {
    let ms = time.as_millis() as u64;
    let whole = UNITS.iter().find(|(_, unit)| ms != 0 && ms.is_multiple_of(*unit));
    whole.map_or_else(|| "0s".to_owned(), |(name, unit)| format!("{}{name}", ms / unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part(text: &str) -> Result<Range<u64>, PartError> {
        text.parse::<Part>().map(Part::range)
    }

    #[test]
    fn reads_what_people_write() {
        assert_eq!(part("0:4096"), Ok(0..4096));
        assert_eq!(part("4m:64K"), Ok(4 << 20..(4 << 20) + (64 << 10)));
        assert_eq!(part("9223372036854775806:1"), Ok(i64::MAX as u64 - 1..i64::MAX as u64));
        let time = |text| parse_time(text).map(|t| t.as_millis());
        assert_eq!(time("0"), Ok(0));
        assert_eq!(time("10"), Ok(10_000));
        assert_eq!(time("500ms"), Ok(500));
        assert_eq!((time("2s"), time("2m"), time("2h")), (Ok(2000), Ok(120_000), Ok(7_200_000)));
        assert_eq!(time("1d"), Ok(86_400_000));
    }

    #[test]
    fn says_what_is_wrong() {
        for bad in ["", "4096", "4M-8M", "-1"] {
            assert_eq!(part(bad), Err(PartError::Syntax(bad.to_owned())), "{bad}");
        }
        for (bad, piece) in
            [(":", ""), ("1:", ""), (":1", ""), ("a:1", "a"), ("1:-1", "-1"), ("1:2:3", "2:3")]
        {
            assert_eq!(part(bad), Err(SizeError::Syntax(piece.to_owned()).into()), "{bad}");
        }
        assert_eq!(part("7:0"), Err(PartError::Empty("7:0".into())));
        for large in ["9223372036854775807:1", "0:8388608T", "18446744073709551615:18446744073709551615"] {
            assert_eq!(part(large), Err(PartError::TooLarge(large.to_owned())));
        }
        for bad in ["", "s", "-1s", "1.5s", "1 s", "1S", "1min", "1sms", "١"] {
            assert_eq!(parse_time(bad), Err(TimeError::Syntax(bad.to_owned())), "{bad}");
        }
        for large in ["4294967297", "18446744073709551615d", "99999999999999999999999ms"] {
            assert_eq!(parse_time(large), Err(TimeError::TooLarge(large.to_owned())));
        }
        assert_eq!(show_time(Duration::ZERO), "0s");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            if let Ok(part) = text.parse::<Part>() {
                prop_assert!(part.range().start < part.range().end && part.range().end <= MAX_OFFSET);
            }
            if let Ok(time) = parse_time(&text) {
                // What is added to an instant must not overflow.
                prop_assert!(std::time::Instant::now().checked_add(time).is_some());
            }
        }

        #[test]
        fn texts_that_are_nearly_right(text in "[0-9]{0,21}[KMGTkmgtdhs:]{0,2}[0-9]{0,21}(ms|[KMGTdhms])?") {
            let _either = (text.parse::<Part>(), parse_time(&text));
        }

        #[test]
        fn parts_are_written_as_they_are_read(offset in 0..MAX_OFFSET, len in 1..MAX_OFFSET, shift in 0..40u32) {
            let (offset, len) = (offset >> shift << shift, len >> shift << shift);
            prop_assume!(len > 0 && offset.checked_add(len).is_some_and(|end| end <= MAX_OFFSET));
            let part = Part { offset, len };
            prop_assert_eq!(part.to_string().parse(), Ok(part));
        }

        #[test]
        fn times_are_written_as_they_are_read(ms in 0..=MAX_MS, round in prop::sample::select(vec![1u64, 1000, 60_000])) {
            let time = Duration::from_millis(ms / round * round);
            prop_assert_eq!(parse_time(&show_time(time)), Ok(time));
        }
    }
}
