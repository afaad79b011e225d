//! DAX files where something has run out: descriptors, and memory for counts. Each case in a process of its own.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use farpage::Pin;
use farpage::dax::{Change, DaxError, DaxOptions, TableError, Wait};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
/// Set in such a process: the directory for it.
const ALONE: &str = "FARPAGE_TEST_ALONE";

/// Whether this is that process; else it is started, by a shell that does `first` in a mount namespace of its own.
fn alone(name: &str, first: Option<&str>) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!("{} && exec \"$0\" --exact {name} --nocapture", first.unwrap_or("true"));
    let exe = std::env::current_exe().unwrap();
    let command = |script: &str| {
        let mut command = Command::new(if first.is_some() { "unshare" } else { "sh" });
        command.args(first.map(|_| ["-m", "sh"]).iter().flatten()).args(["-c", script]).arg(&exe);
        command.env(ALONE, dir.path()).stdin(Stdio::null());
        command
    };
    if let Some(first) = first
        && !command(first).output().is_ok_and(|out| out.status.success())
    {
        let _ = writeln!(std::io::stderr(), "SKIPPED: needs to mount a tmpfs");
        return false;
    }
    let out = command(&script).output().unwrap();
    assert!(out.status.success(), "{}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    false
}

#[test]
fn without_descriptors_mappings_give_way_all_the_same() {
    if !alone("without_descriptors_mappings_give_way_all_the_same", None) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = DaxOptions::new().page_cache(true).tables(dir.path());
    let file = options.create(dir.path().join("file")).unwrap();
    file.write_at(&[1; 8 * 4096], 0).unwrap();
    let map = file.map(0..8 * PAGE).unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..before }).unwrap();
    let mut files = Vec::new();
    let full = loop {
        match std::fs::File::open("/dev/null") {
            Ok(file) => files.push(file),
            Err(e) => break e,
        }
    };
    assert_eq!(Errno::from_io_error(&full), Some(Errno::MFILE));
    let wait = Wait { timeout: std::time::Duration::from_secs(2), stop: None };
    file.change(Change::PunchHole(0..2 * PAGE), &wait).unwrap();
    file.change(Change::Truncate(4 * PAGE), &wait).unwrap();
    assert!(matches!(map.read(4 * 4096, &mut [0]), Err(DaxError::Cut { .. })));
    // SAFETY: inside the mapping.
    assert_eq!(unsafe { (map.as_ptr().read_volatile(), map.as_ptr().add(3 * 4096).read_volatile()) }, (0, 1));
}

#[test]
fn a_full_directory_of_tables_is_an_error() {
    const MOUNT: &str = "mount -t tmpfs -o size=1m none $FARPAGE_TEST_ALONE";
    if !alone("a_full_directory_of_tables_is_an_error", Some(MOUNT)) {
        return;
    }
    let full = std::path::PathBuf::from(std::env::var_os(ALONE).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let options = DaxOptions::new().page_cache(true).tables(&full).lease(false);
    let path = dir.path().join("file");
    std::fs::File::create_new(&path).unwrap().set_len(2000 * HUGE).unwrap();
    let filler = |dir: &Path| {
        let mut file = std::fs::File::create(dir.join("filler")).unwrap();
        while file.write(&[1; 4096]).is_ok() {}
    };
    let names = || std::fs::read_dir(&full).unwrap().count();

    // There is no room for a table: that is said, and nothing stays.
    filler(&full);
    for _ in 0..2 {
        let error = options.open(&path).unwrap_err();
        let DaxError::Table { why: TableError::Sys(Errno::NOSPC), .. } = error else { panic!("{error}") };
        assert_eq!(names(), 1);
    }
    std::fs::remove_file(full.join("filler")).unwrap();

    // There is, but then no more for counts.
    let file = options.open(&path).unwrap();
    let map = file.map(0..4 * PAGE).unwrap();
    let mut pins = Vec::new();
    let error = loop {
        // All but one page of a huge page: each has a count of its own.
        let at = pins.len() as u64 * 3 * HUGE;
        assert!(at < 1900 * HUGE, "it is never full");
        match file.pin(at + PAGE..at + HUGE, Pin::Short) {
            Ok(pin) => pins.push(pin),
            Err(e) => break e,
        }
    };
    assert!(matches!(error, DaxError::Hold { .. }), "{error}");
    assert!(error.to_string().contains("/dev/shm"), "{error}");
    assert!(pins.len() > 50, "{} pins", pins.len());
    assert!(file.map(1990 * HUGE + PAGE..1991 * HUGE).is_err());
    // What there is goes on: who looks at the counts needs no memory for those that were never used.
    let wait = Wait { timeout: std::time::Duration::from_millis(50), stop: None };
    let error = file.change(Change::Truncate(PAGE), &wait).unwrap_err();
    assert!(matches!(error, DaxError::Held { .. }), "{error}");
    drop(pins.split_off(1));
    file.change(Change::Truncate(HUGE), &wait).unwrap();
    assert!(file.audit().is_empty());
    drop((pins, map));
    file.truncate(0).unwrap();
    drop(file);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(names(), 0);
}
