//! The C programs of `programs/`, compiled when a test first wants them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::binary::target_dir;
use crate::suite::Verdict;

/// Compiles `programs/<name>.c` (`cc -O2 -pthread`) and returns the program's path. Where the machine has no
/// C compiler the verdict is a skip.
///
/// # Errors
/// `Err(Ok(verdict))` is a skip, `Err(Err(text))` a failure: the program does not compile.
pub fn program(name: &str) -> Result<PathBuf, Result<Verdict, String>> {
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(name) {
        return Ok(path.clone());
    }
    let path = compile(name)?;
    built.insert(name.to_owned(), path.clone());
    Ok(path)
}

fn compile(name: &str) -> Result<PathBuf, Result<Verdict, String>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(format!("{name}.c"));
    let dir = target_dir().map_err(Err)?.0.join("farpage-test-programs");
    std::fs::create_dir_all(&dir).map_err(|e| Err(format!("{}: {e}", dir.display())))?;
    let path = dir.join(name);
    // Compiled under another name first: another test binary may be running the old one.
    let fresh = dir.join(format!("{name}.{}", std::process::id()));
    let cc = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let out = Command::new(&cc)
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
        .arg(&fresh)
        .arg(&source)
        .output();
    let out = match out {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Ok(Verdict::Skipped(format!("no C compiler ({})", cc.display()))));
        }
        Err(e) => return Err(Err(format!("{}: {e}", cc.display()))),
        Ok(out) => out,
    };
    if !out.status.success() {
        return Err(Err(format!("{}:\n{}", source.display(), String::from_utf8_lossy(&out.stderr))));
    }
    std::fs::rename(&fresh, &path).map_err(|e| Err(format!("{}: {e}", path.display())))?;
    Ok(path)
}
