//! The summary at the end of a run.

use std::fmt::Write;

use serde_json::Value;

use crate::human::human;

const PAGE: u64 = farpage::PAGE_SIZE as u64;

/// What the user must be told even without `--stats`.
pub fn warnings(stats: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let count = |name| number(stats, name);
    if count("processes") == 0 {
        out.push(
            "no process of the program loaded farpage's library, so nothing was managed: \
             look for messages of the loader (ld.so) above"
                .into(),
        );
    }
    if count("leaked_frames") > 0 {
        out.push(format!(
            "{} device frames were still in use after the program's end: please report this bug",
            count("leaked_frames")
        ));
    }
    out
}

/// The readable summary, one line a subject.
pub fn summary(stats: &Value) -> String {
    let n = |name| number(stats, name);
    let pages = |name| format!("{} ({})", n(name), human(n(name).saturating_mul(PAGE)));
    let mut lines: Vec<(String, String)> = vec![
        (
            "processes".into(),
            format!("{} managed, {} not, {} reaped", n("processes"), n("unmanaged"), n("reaped")),
        ),
        ("DRAM".into(), format!("{} at most, budget {}", human(n("dram_peak")), human(n("dram_budget")))),
        (
            "faults".into(),
            format!(
                "{} ({} fresh, {} staged, {} from a device)",
                n("faults"),
                n("faults_zero"),
                n("refaults_staged"),
                n("faults_device")
            ),
        ),
        ("pages out".into(), pages("pages_out")),
        ("pages in".into(), format!("{}, {} of them ahead of use", pages("pages_in"), n("prefetched"))),
        (
            "spared".into(),
            format!("{} clean, {} of one value: no transfer needed", n("pages_clean"), n("pages_same")),
        ),
        ("pinned".into(), format!("{} pages left in place for the kernel", n("pinned_skips"))),
        (
            "errors".into(),
            format!(
                "{} stores, {} loads, {} pages poisoned",
                n("store_errors"),
                n("load_errors"),
                n("poisoned")
            ),
        ),
        ("over budget".into(), pages("over_budget")),
        ("leaked".into(), format!("{} frames", n("leaked_frames"))),
    ];
    for device in stats.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let d = |name| number(device, name);
        let name = device.get("name").and_then(Value::as_str).unwrap_or("device");
        lines.push((
            name.into(),
            format!("{} of {} used at most", human(d("peak").max(d("used"))), human(d("capacity"))),
        ));
    }
    let width = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for (label, text) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "farpage: {label:<width$}  {text}");
    }
    out
}

fn number(stats: &Value, name: &str) -> u64 {
    stats.get(name).and_then(Value::as_u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_summary_is_aligned_and_in_readable_units() {
        let stats = json!({
            "processes": 3, "reaped": 1, "dram_budget": 256u64 << 20, "dram_peak": 255u64 << 20, "pages_out": 1024,
            "devices": [{"name": "ram:1G", "capacity": 1u64 << 30, "used": 1 << 17, "peak": 1 << 20}],
        });
        let text = summary(&stats);
        assert!(text.contains("farpage: DRAM         255M at most, budget 256M\n"), "{text}");
        assert!(text.contains("farpage: pages out    1024 (4M)\n"), "{text}");
        assert!(text.contains("farpage: ram:1G       1M of 1G used at most\n"), "{text}");
        assert_eq!(text.lines().count(), 11);
        assert!(warnings(&stats).is_empty());
    }

    #[test]
    fn what_went_wrong_is_said() {
        assert_eq!(warnings(&json!({"processes": 0})).len(), 1);
        assert_eq!(warnings(&json!({"processes": 1, "leaked_frames": 2})).len(), 1);
    }
}
