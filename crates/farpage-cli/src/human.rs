//! Sizes for people to read, rounded; `farpage::size` writes exact ones.

/// Bytes as `1G`, `1.5M`, `12K`, `7`.
pub fn human(bytes: u64) -> String {
    for (unit, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10) >> shift;
            let (whole, rest) = (tenths / 10, tenths % 10);
            return if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}.{rest}{unit}") };
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_rounded_down_to_a_tenth() {
        assert_eq!(human(0), "0");
        assert_eq!(human(1023), "1023");
        assert_eq!(human(1 << 20), "1M");
        assert_eq!(human((3 << 29) + 1), "1.5G");
        assert_eq!(human(u64::MAX), "16777215.9T");
    }
}
