//! Sizes as people write them: `4096`, `64K`, `256M`, `1G`, `2T` (binary units).

/// Why a text is not a size.
///
/// See the example of [`parse_size`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with an optional unit.
    #[error("`{0}` is not a size (write bytes, or a number with K, M, G or T, for example 256M)")]
    Syntax(String),
    /// More than 2^64 − 1 bytes.
    #[error("size `{0}` is too large")]
    TooLarge(String),
}

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Whether `text` is written like a size (it may still be too large).
///
/// ```
/// use farpage::size::looks_like_size;
/// assert!(looks_like_size("64k") && looks_like_size("99999999T") && !looks_like_size("64kb"));
/// ```
pub fn looks_like_size(text: &str) -> bool {
    let digits = text.strip_suffix(|c: char| unit_shift(c).is_some()).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Bytes of a size such as `4096`, `64k` or `1G` (1024³). Units are K, M, G and T in either case.
///
/// ```
/// use farpage::size::{SizeError, format_size, parse_size};
///
/// assert_eq!(parse_size("1536M"), Ok(1536 << 20));
/// assert_eq!(format_size(1536 << 20), "1536M");
/// assert_eq!(parse_size("1.5G"), Err(SizeError::Syntax("1.5G".into())));
/// assert_eq!(parse_size("99999999T"), Err(SizeError::TooLarge("99999999T".into())));
/// ```
///
/// # Errors
/// [`SizeError`], which says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    if !looks_like_size(text) {
        return Err(SizeError::Syntax(text.to_owned()));
    }
    let too_large = || SizeError::TooLarge(text.to_owned());
    let shift = text.chars().next_back().and_then(unit_shift);
    let digits = &text[..text.len() - usize::from(shift.is_some())];
    // Only digits are left, so the one way to fail is overflow.
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    number.checked_mul(1 << shift.unwrap_or(0)).ok_or_else(too_large)
}

/// The shortest exact form: `parse_size(&format_size(n)) == Ok(n)`.
///
/// See the example of [`parse_size`].
pub fn format_size(bytes: u64) -> String {
    UNITS
        .iter()
        .rev()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

fn unit_shift(c: char) -> Option<u32> {
    UNITS.iter().find(|(unit, _)| unit.eq_ignore_ascii_case(&c)).map(|(_, shift)| *shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64k"), Ok(64 << 10));
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1g"), Ok(1 << 30));
        assert_eq!(parse_size("16777215T"), Ok(16_777_215 << 40));
    }

    #[test]
    fn says_what_is_wrong() {
        for bad in ["", "M", "-1", "+1", "1.5G", "1 M", "1MB", "12X", "0x10", "١"] {
            assert_eq!(parse_size(bad), Err(SizeError::Syntax(bad.to_owned())), "{bad}");
        }
        for large in ["16777216T", "18446744073709551616", "99999999999999999999999G"] {
            assert_eq!(parse_size(large), Err(SizeError::TooLarge(large.to_owned())));
        }
    }

    #[test]
    fn formats_exactly() {
        assert_eq!(format_size(0), "0");
        assert_eq!(format_size(1023), "1023");
        assert_eq!(format_size(1536 << 20), "1536M");
        assert_eq!(format_size(3 << 40), "3T");
    }
}
