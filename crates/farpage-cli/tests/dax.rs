//! `farpage dax` with real processes, on files of the page cache: what needs a DAX file system is tried in a virtual machine.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{FARPAGE, public_copy, refusal, root, skipped};

/// `farpage dax WHAT FILE --page-cache ARGS`.
fn dax(what: &str, file: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(FARPAGE);
    command.args(["dax", what, "--page-cache"]).arg(file).args(args).stdin(Stdio::null());
    command
}

fn file(pages: usize) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![7; pages * 4096]).unwrap();
    (dir, path)
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// A process that holds something; killed when dropped.
struct Holder(Child);

impl Holder {
    /// Starts it, and returns when it holds.
    fn start(mut command: Command) -> Self {
        let mut holder = Self(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(holder.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "it ended");
        holder
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::from_named_raw(signal).unwrap()).unwrap();
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn ls(args: &[&str]) -> String {
    let output = Command::new(FARPAGE).args(["dax", "ls"]).args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A killed user's table goes when that user looks: root does not touch it.
fn sweep(farpage: &Path, uid: u32) {
    assert!(Command::new(farpage).args(["dax", "ls"]).uid(uid).output().unwrap().status.success());
}

/// What is only looked at or held need not be writable.
#[test]
fn a_file_that_may_not_be_written_is_listed_mapped_and_held() {
    let (dir, path) = file(16);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let bin = tempfile::tempdir().unwrap();
    let farpage = public_copy(bin.path());
    // Root may write everything: somebody else, if there is somebody else to be.
    let as_other = |what: &str, args: &[&str]| {
        let mut command = Command::new(&farpage);
        command.args(["dax", what]).args(args).arg(&path).stdin(Stdio::null());
        if what != "ls" {
            command.arg("--page-cache");
        }
        if root() {
            command.uid(65534).gid(65534);
        }
        command
    };
    let holder = Holder::start(as_other("hold", &[]));
    let listed = as_other("ls", &[]).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout);
    assert!(
        listed.status.success() && text.contains(&format!("{} farpage: pin of 0..64K", holder.pid())),
        "{listed:?}"
    );
    let mapped = as_other("map", &[]).output().unwrap();
    assert!(mapped.status.success(), "{mapped:?}");
    let (_, why) = refusal(as_other("punch", &["--timeout", "1s"]).arg("0:4096"));
    assert!(why.contains("ermission denied"), "{why}");
    drop(holder);
    if root() {
        sweep(&farpage, 65534);
    }
}

#[test]
fn a_punch_waits_for_another_process_and_names_it_or_goes_through() {
    let (_dir, path) = file(16);
    let mut holder = Holder::start(dax("hold", &path, &["--range", "16K:8K", "--for", "1h"]));
    for (what, args) in
        [("punch", &["12K:8K"][..]), ("zero", &["16K:4K"]), ("collapse", &["0:4K"]), ("truncate", &["4K"])]
    {
        let began = Instant::now();
        let (code, text) = refusal(dax(what, &path, args).args(["--timeout", "200ms"]));
        assert_eq!(code, 124, "{text}");
        assert!(began.elapsed() >= Duration::from_millis(200));
        assert!(text.contains(&format!("pid {} (farpage) has a pin of 0x4000..", holder.pid())), "{text}");
        assert_eq!(len(&path), 16 * 4096);
    }
    // What is outside does not wait.
    ok(&mut dax("punch", &path, &["0:16K", "--timeout", "0"]));
    ok(&mut dax("truncate", &path, &["24K", "--timeout", "0"]));
    let waiting = dax("punch", &path, &["16K:8K"]).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    holder.signal(libc::SIGINT);
    assert_eq!(holder.wait().code(), Some(0), "Ctrl-C is how it ends");
    let Output { status, stderr, .. } = waiting.wait_with_output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    assert_eq!(fs::read(&path).unwrap(), [0; 24 << 10]);
}

#[test]
fn all_four_changes() {
    let (_dir, path) = file(8);
    ok(&mut dax("punch", &path, &["0:4K"]));
    ok(&mut dax("zero", &path, &["8K:1"]));
    let mut expected = vec![7; 8 * 4096];
    expected[..4096].fill(0);
    expected[8192] = 0;
    assert_eq!(fs::read(&path).unwrap(), expected);
    let collapse = dax("collapse", &path, &["0:8K"]).output().unwrap();
    if collapse.status.success() {
        expected.drain(..8192);
        assert_eq!(fs::read(&path).unwrap(), expected);
    } else {
        assert_eq!(collapse.status.code(), Some(125));
        skipped(&format!("collapse: {}", String::from_utf8_lossy(&collapse.stderr)));
    }
    ok(&mut dax("truncate", &path, &["1M"]));
    assert_eq!(len(&path), 1 << 20);
    ok(&mut dax("truncate", &path, &["5"]));
    assert_eq!(fs::read(&path).unwrap(), &expected[..5]);
}

#[test]
fn ctrl_c_ends_the_wait_and_leaves_the_file() {
    let (_dir, path) = file(4);
    let _holder = Holder::start(dax("hold", &path, &["--for", "1h"]));
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut command = dax("truncate", &path, &["0", "--timeout", "1h"]);
        let mut waiting = Holder(command.stderr(Stdio::piped()).spawn().unwrap());
        std::thread::sleep(Duration::from_millis(200));
        waiting.signal(signal);
        assert_eq!(waiting.wait().signal(), Some(signal));
        let mut text = String::new();
        waiting.0.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
        assert!(text.contains("interrupted") && text.contains("nothing was changed"), "{text}");
        assert_eq!(len(&path), 4 * 4096);
        // The cut is over: others are not kept out.
        ok(&mut dax("hold", &path, &["--timeout", "0", "--", "true"]));
    }
}

#[test]
fn the_commands_status_passes_through() {
    let (_dir, path) = file(4);
    let hold = |args: &[&str]| dax("hold", &path, args).output().unwrap();
    let out = hold(&["--", "sh", "-c", "echo output; exit 7"]);
    assert_eq!((out.status.code(), &*out.stdout, &*out.stderr), (Some(7), &b"output\n"[..], &b""[..]));
    assert_eq!(hold(&["--", "sh", "-c", "kill -9 $$"]).status.signal(), Some(9));
    for (program, code) in [("/nonexistent", 127), ("no-such-program", 127), ("/etc/passwd", 126)] {
        let (got, text) = refusal(&mut dax("hold", &path, &["--", program]));
        assert!(got == code && text.contains(program), "{got}: {text}");
    }
    let (code, text) = refusal(&mut dax("hold", &path, &["--for", "1s", "--", "true"]));
    assert!(code == 125 && text.contains("--for"), "{text}");
}

#[test]
fn it_holds_while_the_command_runs_and_no_longer() {
    let (_dir, path) = file(4);
    let mut command = dax("hold", &path, &["--", "sh", "-c", "echo runs; exec sleep 3600"]);
    let mut holder = Holder::start({
        command.process_group(0);
        command
    });
    let (code, text) = refusal(dax("truncate", &path, &["0", "--timeout", "0"]).stdin(Stdio::null()));
    assert!(code == 124 && text.contains(&format!("pid {}", holder.pid())), "{code}: {text}");
    // A signal for us alone goes to the command.
    holder.signal(libc::SIGTERM);
    assert_eq!(holder.wait().signal(), Some(libc::SIGTERM));
    ok(&mut dax("truncate", &path, &["0", "--timeout", "0"]));
}

#[test]
fn a_killed_holder_holds_nothing_and_takes_its_command_along() {
    let (_dir, path) = file(4);
    let mut holder = Holder::start(dax("hold", &path, &["--", "sh", "-c", "echo $$; exec sleep 3600"]));
    let child = fs::read_to_string(format!("/proc/{0}/task/{0}/children", holder.pid())).unwrap_or_default();
    let waiting = dax("truncate", &path, &["0", "--timeout", "1h"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(len(&path), 4 * 4096);
    holder.signal(libc::SIGKILL);
    holder.wait();
    let began = Instant::now();
    assert!(waiting.wait_with_output().unwrap().status.success());
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(len(&path), 0);
    let Ok(child) = child.trim().parse::<u32>() else {
        return skipped("/proc has no list of children: whether the command was killed is not seen");
    };
    let gone = || {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    while !gone() {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "the command {child} runs on, and nothing is held for it"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_long_hold_gives_up_when_asked() {
    let (_dir, path) = file(4);
    let mut command = dax("hold", &path, &["--long", "--for", "1h"]);
    command.stderr(Stdio::piped());
    let mut holder = Holder::start(command);
    assert!(ls(&[path.to_str().unwrap()]).contains("long-term pin of 0..16K"));
    ok(&mut dax("punch", &path, &["4K:4K", "--timeout", "5s"]));
    assert_eq!(holder.wait().code(), Some(1));
    let mut text = String::new();
    holder.0.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "farpage: another wants 4K..8K: given up\n");

    // A command works on what is held: first it ends.
    let script = "trap 'sleep 0.3; echo done >&2; exit 3' TERM; echo runs; while :; do sleep 0.05; done";
    let mut command = dax("hold", &path, &["--long", "--", "sh", "-c", script]);
    command.stderr(Stdio::piped());
    let mut holder = Holder::start(command);
    let began = Instant::now();
    ok(&mut dax("truncate", &path, &["0", "--timeout", "5s"]));
    assert!(began.elapsed() >= Duration::from_millis(300), "it was cut under the command");
    assert_eq!(holder.wait().code(), Some(3));
}

#[test]
fn ls_shows_who_holds_what() {
    let (dir, path) = file(512);
    let name = path.to_str().unwrap();
    assert_eq!(ls(&[name]), format!("{name}: 2M, page cache, not in use\n"));
    // By a relative name from another directory.
    let mut command = dax("hold", Path::new("file"), &["--range", "4K:64K", "--for", "1h"]);
    command.current_dir(&dir);
    let holder = Holder::start(command);
    let mapper = Holder::start(dax("map", &path, &["--range", "1M:1M", "--for", "1h"]));
    for text in [ls(&[]), ls(&[name])] {
        let expected = [
            format!("{name}: 2M, page cache\n"),
            format!("  {} farpage: pin of 4K..68K\n", holder.pid()),
            format!("  {} farpage: mapping of 1M..2M\n", mapper.pid()),
        ];
        for line in expected {
            assert!(text.contains(&line), "{line} is not in {text}");
        }
    }
    let json: serde_json::Value = serde_json::from_str(&ls(&["--json"])).unwrap();
    let files = json["files"].as_array().unwrap();
    let file = files.iter().find(|f| f["path"] == name).unwrap();
    let users = file["users"].as_array().unwrap();
    let user = users.iter().find(|u| u["pid"] == holder.pid()).unwrap();
    assert_eq!(user["holds"][0], serde_json::json!({ "kind": "pin", "start": 4096, "end": 69632 }));
    assert_eq!((&file["size"], &file["differences"]), (&serde_json::json!(2 << 20), &serde_json::json!([])));
    drop((holder, mapper));
    assert!(ls(&[]).lines().all(|line| !line.contains(name)), "a killed process uses nothing");
}

#[test]
fn another_users_file_gets_one_line() {
    let (dir, path) = file(4);
    if !root() {
        return skipped("needs root to be two users");
    }
    let mut hold = Command::new(public_copy(dir.path()));
    hold.args(["dax", "hold", "--page-cache"]).arg(&path).args(["--for", "1h"]);
    rustix::fs::chown(dir.path(), Some(rustix::fs::Uid::from_raw(65534)), None).unwrap();
    rustix::fs::chown(&path, Some(rustix::fs::Uid::from_raw(65534)), None).unwrap();
    hold.uid(65534);
    let holder = Holder::start(hold);
    // A third user sees that, and whose it is; root sees all.
    let mut other = Command::new(dir.path().join("farpage"));
    let out = other.args(["dax", "ls"]).uid(65533).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let line = "in use by user 65534: only that user and root can look";
    assert!(out.status.success() && text.lines().any(|l| l.contains(line)), "{text}");
    assert!(ls(&[]).contains(&format!("{} farpage: pin of 0..16K", holder.pid())));
    drop(holder);
    sweep(&dir.path().join("farpage"), 65534);
}

/// Whoever may read a file may use it, with a table of his own making. Root believes that only of the file's owner, who
/// can do as he likes with the file as it is.
#[test]
fn root_trusts_no_table_of_somebody_who_does_not_own_the_file() {
    let (dir, path) = file(4);
    if !root() {
        return skipped("needs root to be two users");
    }
    let nobody = Some(rustix::fs::Uid::from_raw(65534));
    let farpage = public_copy(dir.path());
    let hold = |path: &Path| {
        let mut hold = Command::new(&farpage);
        hold.args(["dax", "hold", "--page-cache"]).arg(path).args(["--for", "1h"]).uid(65534);
        Holder::start(hold)
    };
    let theirs = hold(&path);
    for what in ["truncate", "punch", "hold"] {
        let args: &[&str] = match what {
            "truncate" => &["0"],
            "punch" => &["0:4096"],
            _ => &[],
        };
        let (_, why) = refusal(&mut dax(what, &path, args));
        assert!(why.contains("user 65534 made it, who does not own the file"), "{why}");
        assert_eq!(len(&path), 4 * 4096);
    }
    // It can be seen all the same, whatever becomes of the table.
    let seen = format!("{} farpage: pin of 0..16K", theirs.pid());
    assert!(ls(&[]).contains(&seen));
    let line = "in use by user 65534, who does not own it";
    assert!(ls(&[path.to_str().unwrap()]).contains(line));
    let table = fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().path()).find(|table| {
        let name = path.to_str().unwrap().as_bytes();
        let mut bytes = [0; 1024];
        let _read = fs::File::open(table).and_then(|file| file.read_at(&mut bytes, 0));
        bytes.get(64..64 + name.len()) == Some(name)
    });
    let table = table.unwrap();
    let file = fs::File::options().write(true).open(&table).unwrap();
    let whole = file.metadata().unwrap().len();
    drop(theirs);
    for len in [1 << 16, 4096, 100, 0] {
        file.set_len(len).unwrap();
        assert!(!ls(&[]).contains(&seen));
    }
    file.set_len(whole).unwrap();
    drop(file);
    fs::remove_file(&table).unwrap();
    // The owner's is another matter.
    rustix::fs::chown(&path, nobody, None).unwrap();
    let theirs = hold(&path);
    let (_, why) = refusal(dax("punch", &path, &["--timeout", "100ms"]).arg("0:4096"));
    assert!(why.contains(&format!("pid {} (farpage) has a pin", theirs.pid())), "{why}");
    drop(theirs);
    sweep(&farpage, 65534);
}

#[test]
fn map_says_how() {
    let (_dir, path) = file(4);
    let (code, text) = refusal(Command::new(FARPAGE).args(["dax", "map"]).arg(&path));
    assert!(code == 125 && text.contains("dax=always") && text.ends_with("--page-cache\n"), "{text}");
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[1], 1 << 20).unwrap();
    let text = ok(&mut dax("map", &path, &[]));
    for part in [
        "length    1025K\n".replace("1025K", "1048577").as_str(),
        "page cache: its pages are in the page cache (no STATX_ATTR_DAX)",
        "in 2 parts",
        "of holes",
        "mapped    0..1028K at 0x",
        "2M pages  none",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let status = dax("map", &path, &["--range", "4K:4K", "--", "sh", "-c", "exit 5"]).status().unwrap();
    assert_eq!(status.code(), Some(5));
    let (code, text) = refusal(&mut dax("map", &path, &["--range", "1:4K"]));
    assert!(code == 125 && text.contains("does not begin with a page"), "{text}");
}

#[test]
fn a_mapping_gives_way_to_a_cut() {
    let (_dir, path) = file(8);
    let _mapper = Holder::start(dax("map", &path, &["--for", "1h"]));
    ok(&mut dax("punch", &path, &["0:8K", "--timeout", "5s"]));
    ok(&mut dax("truncate", &path, &["16K", "--timeout", "5s"]));
    assert!(ls(&[path.to_str().unwrap()]).contains("mapping of 0..16K\n"));
}

#[test]
fn bad_input_is_one_sentence() {
    let (dir, path) = file(1);
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["punch", "F", "4K"], "is not a part of a file"),
        (&["punch", "F", "0:0"], "has no bytes"),
        (&["punch", "F", "1:9223372036854775807"], "beyond what a file can be"),
        (&["punch", "F", "x:1"], "`x` is not a size"),
        (&["punch", "F"], "OFFSET:LENGTH"),
        (&["truncate", "F", "1X"], "`1X` is not a size"),
        (&["truncate", "F", "16777215T"], "cannot truncate"),
        (&["truncate", "F", "0", "--timeout", "soon"], "`soon` is not a time"),
        (&["truncate", "F", "0", "--timeout", "99999999999d"], "is too long"),
        (&["collapse", "F", "1:2"], "cannot take a part out of"),
        (&["hold", "F", "--range", "4K:4K"], "goes beyond the end of the file"),
        (&["hold", "F", "--range", "8388607T:1"], "goes beyond the end of the file"),
        (&["hold", "EMPTY"], "there is nothing to hold"),
        (&["map", "EMPTY"], "there is nothing to map"),
        (&["hold", "DIR"], "is not a regular file"),
        (&["hold", "/nonexistent"], "cannot open /nonexistent"),
        (&["hold", "/dev/null"], "is not a regular file"),
        (&["nonsense"], "unrecognized subcommand"),
    ];
    for (args, words) in cases {
        let mut command = Command::new(FARPAGE);
        command.arg("dax").args(args.iter().map(|arg| match *arg {
            "F" => path.as_os_str(),
            "EMPTY" => empty.as_os_str(),
            "DIR" => dir.path().as_os_str(),
            arg => arg.as_ref(),
        }));
        if args.len() > 1 {
            command.arg("--page-cache");
        }
        let (code, text) = refusal(&mut command);
        assert!(code == 125 && text.contains(words), "{args:?} {code}: {text}");
    }
    assert_eq!(fs::read(&path).unwrap(), [7; 4096]);
    let (code, text) = refusal(Command::new(FARPAGE).args(["dax", "ls", "/nonexistent"]));
    assert!(code == 125 && text.contains("cannot open /nonexistent"), "{text}");
}

#[test]
fn the_benchmark_measures_both_sides_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bench = |args: &[&str]| {
        let mut command = Command::new(FARPAGE);
        command.args(["bench", "dax", "--dir"]).arg(dir.path()).args(args).stdin(Stdio::null());
        command
    };
    let out = ok(&mut bench(&["--page-cache", "--json", "--rounds", "1"]));
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let rows = report["results"].as_array().unwrap();
    assert!(rows.len() > 10);
    for row in rows {
        let times = [&row["bare_us"], &row["farpage_us"], &row["costs"]].map(|x| x.as_f64().unwrap_or(0.0));
        let why = row["missing"].as_str().unwrap_or_default();
        let hidden = why.contains("page cache") || why.contains("mlock");
        assert!(times.iter().all(|time| *time > 0.0) || hidden, "{row}");
    }
    if report["machine"]["access"] == "page cache" {
        let (code, text) = refusal(&mut bench(&[]));
        assert!(code == 125 && text.contains("--page-cache"), "{text}");
    }
    let mut running = bench(&["--page-cache", "--rounds", "100000"]);
    let running = running.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut running = Holder(running);
    std::thread::sleep(Duration::from_millis(500));
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().code(), Some(125));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the file was not removed");
}
