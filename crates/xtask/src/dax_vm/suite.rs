//! Our programs that run in the virtual machine: the test program, built so that it needs no libraries there, and the command.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{VmError, output, words};

/// Its name, here and there.
pub const NAME: &str = "farpage-dax-suite";
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Builds the program below `target`; gives where it lies.
pub fn build(target: &Path) -> Result<PathBuf, VmError> {
    // The compiler gives the path of a file that it has, and else just the name.
    let libc = output(Command::new("cc").arg("-print-file-name=libc.a")).unwrap_or_default();
    if !Path::new(libc.trim()).is_absolute() {
        return Err(VmError::Missing("no C compiler with a static C library (gcc, libc6-dev)".to_owned()));
    }
    let folder = target.join("build");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--release", "--package", "farpage-tests", "--bin", NAME]);
    // The platform is named so that the flags are not applied to build scripts and macros as well.
    cargo.args(["--target", PLATFORM, "--target-dir"]).arg(&folder);
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "false").env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    run(cargo)?;
    Ok(folder.join(PLATFORM).join("release").join(NAME))
}

/// Builds the command as its users do; gives where it lies.
pub fn command() -> Result<PathBuf, VmError> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--release", "--package", "farpage-cli", "--target-dir"]).arg(&target);
    run(cargo)?;
    Ok(target.join("release/farpage"))
}

fn run(mut cargo: Command) -> Result<(), VmError> {
    // What the compiler says is shown as it comes.
    let why = match cargo.status() {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => status.to_string(),
        Err(e) => e.to_string(),
    };
    Err(VmError::Command { command: words(&cargo), why })
}
