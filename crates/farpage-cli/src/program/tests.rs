use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn file(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// A copy of this test program, which is a dynamic glibc program, with some bytes changed.
fn changed(dir: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read("/proc/self/exe").unwrap();
    change(&mut bytes);
    file(dir, name, &bytes, 0o755)
}

fn refusal(path: &Path) -> Refusal {
    match resolve(path.as_os_str(), None) {
        Err(ProgramError::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

/// Where the program header with the loader's path begins.
fn interp_header(bytes: &[u8]) -> usize {
    let at = usize::from_ne_bytes(bytes[32..40].try_into().unwrap());
    (at..).step_by(56).find(|&a| bytes[a..a + 4] == 3u32.to_ne_bytes()).unwrap()
}

#[test]
fn path_lookup_follows_execvp() {
    let tmp = tempfile::tempdir().unwrap();
    let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    fs::create_dir(a.join("tool")).unwrap();
    file(&b, "tool", b"echo\n", 0o755);
    file(&a, "data", b"x", 0o644);
    let path = std::env::join_paths([&a, &b]).unwrap();
    // A directory of that name is passed over.
    let tool = resolve(OsStr::new("tool"), Some(&path)).unwrap();
    assert_eq!(tool, Program { path: b.join("tool"), through_shell: true });
    assert!(
        matches!(resolve(OsStr::new("data"), Some(&path)), Err(ProgramError::NotExecutable(p)) if p == a.join("data"))
    );
    assert!(matches!(resolve(OsStr::new("nothing"), Some(&path)), Err(ProgramError::NotFound(_))));
    assert!(matches!(resolve(OsStr::new(""), Some(&path)), Err(ProgramError::NotFound(_))));
    assert!(!resolve(OsStr::new("sh"), None).unwrap().through_shell);
}

#[test]
fn a_dynamic_program_is_accepted() {
    let tmp = tempfile::tempdir().unwrap();
    let path = changed(tmp.path(), "same", |_| {});
    assert_eq!(resolve(path.as_os_str(), None).unwrap(), Program { path, through_shell: false });
}

#[test]
fn programs_that_cannot_be_preloaded_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let no_interp = changed(dir, "static", |b| {
        let at = interp_header(b);
        b[at] = 4;
    });
    assert_eq!(refusal(&no_interp), Refusal::Static);
    assert!(matches!(refusal(&changed(dir, "bits32", |b| b[4] = 1)), Refusal::Architecture(_)));
    assert!(matches!(refusal(&changed(dir, "arm", |b| b[18] ^= 1)), Refusal::Architecture(_)));
    assert!(matches!(refusal(&changed(dir, "object", |b| b[16] = 1)), Refusal::Damaged(_)));
    assert!(matches!(refusal(&changed(dir, "short", |b| b.truncate(40))), Refusal::Damaged(_)));
    assert!(matches!(refusal(&changed(dir, "headers", |b| b[32..40].fill(0xff))), Refusal::Damaged(_)));
    assert_eq!(refusal(&file(dir, "bin", b"\x01\x00\x02", 0o755)), Refusal::UnknownFormat);

    let rename = |name: &'static [u8]| {
        move |b: &mut Vec<u8>| {
            let header = interp_header(b);
            let at = usize::from_ne_bytes(b[header + 8..header + 16].try_into().unwrap());
            b[at..at + name.len()].copy_from_slice(name);
            b[header + 32..header + 40].copy_from_slice(&name.len().to_ne_bytes());
        }
    };
    let musl = changed(dir, "musl", rename(b"/lib/ld-musl-x.so.1\0"));
    assert_eq!(refusal(&musl), Refusal::Loader("/lib/ld-musl-x.so.1".into()));
    let gone = changed(dir, "gone", rename(b"/x/ld-linux-x.so.2\0"));
    assert_eq!(refusal(&gone), Refusal::LoaderMissing("/x/ld-linux-x.so.2".into()));
    let unterminated = changed(dir, "unterminated", rename(b"/x/ld-linux-x.so.2"));
    assert!(matches!(refusal(&unterminated), Refusal::Damaged(_)));
}

#[test]
fn scripts_lead_to_their_interpreter() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let script = file(dir, "s", b"#! /bin/sh -e\n", 0o755);
    assert_eq!(resolve(script.as_os_str(), None).unwrap(), Program { path: script, through_shell: false });

    let missing = file(dir, "m", b"#!/no/such/interpreter\n", 0o755);
    assert_eq!(resolve(missing.as_os_str(), None).unwrap_err().exit_code(), EXIT_NOT_FOUND);
    let empty = file(dir, "e", b"#!\n", 0o755);
    assert!(matches!(resolve(empty.as_os_str(), None), Err(ProgramError::NotExecutable(_))));

    let no_interp = changed(dir, "static", |b| {
        let at = interp_header(b);
        b[at] = 4;
    });
    let line = format!("#!{}\n", no_interp.display());
    assert_eq!(refusal(&file(dir, "over-static", line.as_bytes(), 0o755)), Refusal::Static);

    let looped = file(dir, "loop", format!("#!{}\n", dir.join("loop").display()).as_bytes(), 0o755);
    assert!(matches!(resolve(looped.as_os_str(), None), Err(ProgramError::TooDeep(p)) if p == looped));
}

#[test]
fn privileges_that_change_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    if rustix::fs::statvfs(tmp.path()).unwrap().f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID) {
        crate::skipped!("the temporary directory is mounted nosuid");
        return;
    }
    let own = changed(tmp.path(), "own", |_| {});
    fs::set_permissions(&own, fs::Permissions::from_mode(0o6755)).unwrap();
    // Its own user's and group's: nothing changes.
    resolve(own.as_os_str(), None).unwrap();
    let link = tmp.path().join("link");
    symlink(&own, &link).unwrap();
    if !rustix::process::getuid().is_root() {
        crate::skipped!("only root can give a file away");
        return;
    }
    std::os::unix::fs::chown(&own, Some(1), None).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(refusal(&link), Refusal::SetUser(1));
    std::os::unix::fs::chown(&own, Some(0), Some(1)).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o2755)).unwrap();
    assert_eq!(refusal(&own), Refusal::SetGroup(1));
}
