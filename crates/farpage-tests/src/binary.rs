//! The binary under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where this test was built: `target/<profile>`, and the profile's name as cargo's `--profile` wants it.
pub(crate) fn target_dir() -> Result<(PathBuf, String), String> {
    let exe = std::env::current_exe().map_err(|e| format!("where is this test: {e}"))?;
    // target/<profile>/deps/<test>, or target/<profile>/<bin>
    let mut dir = exe.parent().unwrap_or(Path::new("/")).to_path_buf();
    if dir.file_name().is_some_and(|n| n == "deps") {
        dir.pop();
    }
    let profile = match dir.file_name().and_then(|n| n.to_str()) {
        Some("debug") | None => "dev".to_owned(),
        Some(name) => name.to_owned(),
    };
    Ok((dir, profile))
}

/// The path of the built `farpage` binary. It is brought up to date with cargo first, so that no test runs
/// against yesterday's binary; `FARPAGE_BIN` names another one.
pub fn farpage() -> Result<&'static Path, String> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PATH.get_or_init(find).as_deref().map_err(Clone::clone)
}

fn find() -> Result<PathBuf, String> {
    if let Some(given) = std::env::var_os("FARPAGE_BIN") {
        let path = PathBuf::from(given);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!("FARPAGE_BIN: no file {}", path.display()))
        };
    }
    let (dir, profile) = target_dir()?;
    let binary = dir.join("farpage");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(cargo)
        .args(["build", "--quiet", "--profile", &profile, "-p", "farpage-preload", "-p", "farpage-cli"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("LD_PRELOAD")
        .output()
        .map_err(|e| format!("cargo build: {e}"))?;
    if !out.status.success() {
        return Err(format!("cargo build of farpage failed:\n{}", String::from_utf8_lossy(&out.stderr)));
    }
    if binary.is_file() { Ok(binary) } else { Err(format!("cargo built no {}", binary.display())) }
}

/// The path of `libfarpage_dmirror.so`, brought up to date with cargo first.
pub fn dmirror_library() -> Result<&'static Path, String> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PATH.get_or_init(|| {
        let (dir, profile) = target_dir()?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let out = Command::new(cargo)
            .args(["build", "--quiet", "--profile", &profile, "-p", "farpage-dmirror"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env_remove("LD_PRELOAD")
            .output()
            .map_err(|e| format!("cargo build: {e}"))?;
        if !out.status.success() {
            return Err(format!(
                "cargo build of the HMM test device failed:\n{}",
                String::from_utf8_lossy(&out.stderr)
            ));
        }
        let path = dir.join("libfarpage_dmirror.so");
        if path.is_file() { Ok(path) } else { Err(format!("cargo built no {}", path.display())) }
    })
    .as_deref()
    .map_err(Clone::clone)
}
