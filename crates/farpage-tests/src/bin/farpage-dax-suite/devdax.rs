//! A device-dax device.

use std::path::Path;
use std::process::ExitCode;

use crate::run::say;

/// Tries the device.
pub fn run(device: &Path) -> ExitCode {
    say(&format!("SKIPPED devdax: farpage does not open {} yet", device.display()));
    say("suite: 0 passed, 0 failed, 1 skipped");
    ExitCode::SUCCESS
}
