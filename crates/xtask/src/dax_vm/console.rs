//! What the kernel of a virtual machine has said.

/// What a sound kernel never says.
const TROUBLE: [&str; 13] = [
    "Kernel panic",
    "kernel BUG at",
    "BUG:",
    "WARNING:",
    "Oops",
    "general protection fault",
    "blocked for more than",
    "Bad page state",
    "refcount_t:",
    "EXT4-fs error",
    "Metadata corruption",
    "Corruption of in-memory data",
    "Unmount and run xfs_repair",
];

/// What the init script writes into the kernel's log before and after a scenario.
const BEGIN: &str = "farpage: begin ";
const END: &str = "farpage: end ";

/// The lines that tell of trouble, each with the scenario during which it was said (empty if between scenarios).
pub fn trouble(console: &str) -> Vec<(String, String)> {
    by_scenario(console).filter(|(_, line)| TROUBLE.iter().any(|word| line.contains(word))).collect()
}

/// What the kernel said about DAX and persistent memory during `scenario`.
pub fn about_dax(console: &str, scenario: &str) -> Vec<String> {
    let words = ["dax", "pmem", "nvdimm", "nd_"];
    by_scenario(console)
        .filter(|(of, line)| of == scenario && words.iter().any(|w| line.to_lowercase().contains(w)))
        .map(|(_, line)| line)
        .collect()
}

/// Every line without its time, with the scenario that was running.
fn by_scenario(console: &str) -> impl Iterator<Item = (String, String)> {
    let mut scenario = String::new();
    console.lines().filter_map(move |line| {
        let line = line.trim_end();
        let line = match line.split_once("] ") {
            Some((time, rest)) if time.starts_with('[') => rest,
            _ => line,
        };
        if let Some(name) = line.strip_prefix(BEGIN) {
            scenario = name.to_owned();
            return None;
        }
        if line.starts_with(END) {
            scenario.clear();
            return None;
        }
        Some((scenario.clone(), line.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "[    0.1] Linux version\r\n[    1.0] nd_pmem namespace0.0: unable to guarantee\r\n\
        [    2.0] farpage: begin xfs-dax\r\n[    2.1] XFS (pmem0): DAX enabled. Warning: EXPERIMENTAL\r\n\
        [    2.2] WARNING: CPU: 0 PID: 1 at fs/dax.c:1\r\n[    2.3] farpage: end xfs-dax\r\n\
        [    3.0] Kernel panic - not syncing\r\n";

    #[test]
    fn trouble_is_found_with_the_scenario_that_it_belongs_to() {
        let expected =
            [("xfs-dax", "WARNING: CPU: 0 PID: 1 at fs/dax.c:1"), ("", "Kernel panic - not syncing")];
        assert_eq!(trouble(CONSOLE), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn lines_about_dax_belong_to_their_scenario() {
        let expected =
            ["XFS (pmem0): DAX enabled. Warning: EXPERIMENTAL", "WARNING: CPU: 0 PID: 1 at fs/dax.c:1"];
        assert_eq!(about_dax(CONSOLE, "xfs-dax"), expected);
        assert_eq!(about_dax(CONSOLE, "ext4-dax"), [""; 0]);
    }
}
