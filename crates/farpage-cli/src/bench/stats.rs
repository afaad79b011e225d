//! Medians and ratios over rounds.

/// The middle value (the mean of the two middle ones); `None` where there is none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let mid = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[mid]),
        _ => Some((sorted[mid - 1] + sorted[mid]) / 2.0),
    }
}

/// How many times `ours` goes into `theirs`: above 1 where we are faster.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Ratio {
    /// The ratio of the two medians.
    pub of_medians: f64,
    /// The ratio within each round.
    pub rounds: Vec<f64>,
}

/// Compares times of the same rounds; `None` where one side has no usable time.
pub fn ratio(theirs: &[f64], ours: &[f64]) -> Option<Ratio> {
    let of_medians = median(theirs)? / median(ours).filter(|m| *m > 0.0)?;
    let rounds = theirs.iter().zip(ours).filter(|(_, o)| **o > 0.0).map(|(t, o)| t / o).collect();
    Some(Ratio { of_medians, rounds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[f64::NAN, 5.0]), Some(5.0));
    }

    #[test]
    fn ratios() {
        let r = ratio(&[10.0, 20.0, 30.0], &[5.0, 4.0, 10.0]).unwrap();
        assert_eq!(r, Ratio { of_medians: 4.0, rounds: vec![2.0, 5.0, 3.0] });
        assert_eq!(ratio(&[1.0], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
    }
}
