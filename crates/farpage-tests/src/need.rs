//! What a test needs of the machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The program `name` on the `PATH`, or why there is none.
pub fn tool(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
        .ok_or_else(|| format!("{name} is not installed"))
}

/// A Python that has NumPy: the one on the `PATH`, else the system's.
pub fn python_with_numpy() -> Result<PathBuf, String> {
    let mut candidates: Vec<PathBuf> = tool("python3").into_iter().collect();
    candidates.push("/usr/bin/python3".into());
    for python in candidates {
        let out = std::process::Command::new(&python)
            .args(["-c", "import sys, numpy; print(sys.executable)"])
            .output();
        if let Ok(out) = out
            && out.status.success()
        {
            // Past the shims of version managers: those are shell scripts, and many processes.
            return Ok(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
        }
    }
    Err("no python3 with NumPy".to_owned())
}

/// A device file that can be opened for reading and writing.
pub fn device(path: &Path) -> Result<(), String> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(|e| format!("{}: {e}", path.display()))
}
