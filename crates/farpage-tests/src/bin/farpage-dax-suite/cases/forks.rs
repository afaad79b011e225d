//! fork and exec: a child has nothing of its parent's, and can open the file itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxError, DaxFile, DaxMapping};
use farpage_tests::{Rng, Verdict};

use super::{Case, PASSED, case};
use crate::peer::Peer;
use crate::place::{LONG, Place, long, soon};
use crate::storm::FIRM;
use crate::{Outcome, ensure, pages};

pub const CASES: &[Case] = &[case("fork", fork), case("fork-at-any-moment", fork_storm), case("exec", exec)];

/// Runs `body` in a forked child; its error is told, and a child that hangs is killed.
fn in_child(body: impl FnOnce() -> Outcome) -> Outcome {
    // SAFETY: the child runs on the C library's own fork, which keeps malloc usable; it ends by _exit.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let status = match body() {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("in the child: {e}");
                1
            }
        };
        // SAFETY: ends the process.
        unsafe { libc::_exit(status) }
    }
    let until = Instant::now() + LONG;
    let mut status = 0;
    loop {
        // SAFETY: our own child.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } {
            0 if Instant::now() < until => std::thread::sleep(Duration::from_micros(300)),
            0 => {
                // SAFETY: our own child, not yet waited for.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                // SAFETY: as above.
                unsafe { libc::waitpid(pid, &raw mut status, 0) };
                return Err("the child hangs".into());
            }
            _ => break,
        }
    }
    ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
    Ok(())
}

/// Whether something is mapped there.
fn is_mapped(at: usize) -> Outcome<bool> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().any(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        range.is_some_and(|(start, end)| {
            let parse = |n| usize::from_str_radix(n, 16).unwrap_or(0);
            (parse(start)..parse(end)).contains(&at)
        })
    }))
}

/// What a child may not do with what it has inherited.
fn inherits_nothing(file: &DaxFile, map: &DaxMapping) -> Outcome {
    let closed = |what: &str, result: Result<(), DaxError>| match result {
        Err(DaxError::Closed { .. }) => Ok(()),
        other => Err(format!("{what} with an inherited handle: {other:?}")),
    };
    closed("map", file.map(0..4096).map(drop))?;
    closed("pin", file.pin(0..4096, Pin::Short).map(drop))?;
    closed("pin a mapping", map.pin(0..4096, Pin::Short).map(drop))?;
    closed("read a mapping", map.read(0, &mut [0; 8]))?;
    closed("truncate", file.change(Change::Truncate(0), &soon()))?;
    closed("append", file.append(b"no").map(drop))?;
    ensure!(!is_mapped(map.as_ptr() as usize)?, "the mapping is inherited");
    Ok(())
}

fn fork(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let map = file.map(pages::bytes(0..16))?;
    let pin = map.pin(0..2 * 4096, Pin::Short)?;
    ensure!(is_mapped(map.as_ptr() as usize)?, "/proc/self/maps is not understood");
    in_child(|| {
        inherits_nothing(&file, &map)?;
        let own = place.options().open(place.path("file"))?;
        ensure!(own.users().len() == 2, "{:?}", own.users());
        let seen = own.map(pages::bytes(0..16))?;
        // SAFETY: the mapping lives.
        pages::verify(&unsafe { pages::copy(seen.as_ptr(), seen.len()) }, 0, 1)?;
        // The parent's pin is in the way; elsewhere it is not.
        let error = own.change(Change::PunchHole(0..4096), &soon());
        ensure!(matches!(error, Err(DaxError::Held { .. })), "{error:?}");
        own.change(Change::PunchHole(pages::bytes(4..6)), &long())?;
        // What is inherited is dropped: none of the parent's references goes.
        drop((pin, map, seen));
        ensure!(
            own.change(Change::PunchHole(0..4096), &soon()).is_err(),
            "a child has given up its parent's pin"
        );
        ensure!(own.audit().is_empty(), "{:?}", own.audit());
        Ok(())
    })?;
    // (The closure took the parent's pin and mapping along, which are still held: they live until its end.)
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    file.change(Change::Truncate(0), &long())?;
    PASSED
}

/// fork while other threads open, map, pin, cut: the child can open the file at once.
fn fork_storm(place: &Place) -> Outcome<Verdict> {
    let file = place.file(FIRM)?;
    let map = file.map(pages::bytes(0..FIRM))?;
    let (file, map) = (&file, &map);
    let done = AtomicBool::new(false);
    let going = || !done.load(Ordering::Relaxed);
    let until = Instant::now() + Duration::from_secs(place.seconds);
    let mut forks = 0;
    let result = std::thread::scope(|scope| -> Outcome {
        let mut threads = Vec::new();
        for seed in 0..4 {
            threads.push(scope.spawn(move || -> Result<(), String> {
                let mut rng = Rng::new(seed);
                while going() {
                    let start = rng.below(FIRM - 4);
                    let range = pages::bytes(start..start + 4);
                    let fail = |e: DaxError| e.to_string();
                    match seed {
                        0 => drop(place.options().open(place.path("file")).map_err(fail)?),
                        1 => drop(file.map(range).map_err(fail)?),
                        2 => drop(file.pin(range, Pin::Short).map_err(fail)?),
                        _ => file.punch_hole(range).map_err(fail)?,
                    }
                }
                Ok(())
            }));
        }
        let mut result = Ok(());
        while Instant::now() < until && result.is_ok() {
            result = in_child(|| {
                inherits_nothing(file, map)?;
                let own = place.options().open(place.path("file"))?;
                let own_map = own.map(pages::bytes(0..FIRM))?;
                let _pin = own_map.pin(0..4096, Pin::Short)?;
                Ok(())
            });
            forks += 1;
        }
        done.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| "a panic")??;
        }
        result.map_err(|e| format!("fork {forks}: {e}").into())
    });
    result?;
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    file.change(Change::Truncate(0), &long())?;
    PASSED
}

/// A process that becomes another program is like one that has ended.
fn exec(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let mut peer = Peer::with_file(place)?;
    peer.ask("map 0 16")?;
    peer.ask("pin 2 4")?;
    ensure!(file.users().len() == 2, "{:?}", file.users());
    ensure!(file.change(Change::Truncate(0), &soon()).is_err(), "the pin is in nobody's way");
    let up = peer.ask("exec")?;
    ensure!(up == "up", "it says {up}");
    file.change(Change::Truncate(0), &long())?;
    ensure!(file.users().len() == 1, "{:?}", file.users());
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}
