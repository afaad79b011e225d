//! Device-dax: parts of it mapped and handed out, counted across processes.

use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{DaxDevice, DaxError};
use farpage_tests::{Rng, Verdict};

use super::{Case, PASSED, case};
use crate::device::{in_sysfs, mark, open, page_size_at, part, units, verify};
use crate::peer::Peer;
use crate::place::{Place, long, soon};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("device-open", opens),
    case("device-map", map),
    case("device-allocate", allocate),
    case("device-run-of-two-processes", shared),
    case("device-wait-idle", wait_idle),
    case("device-killed-allocating", |place| killed(place, "dev-allocate")),
    case("device-killed-mapping", |place| killed(place, "dev-map")),
    case("device-race", race),
];

/// Nobody has anything of it, and all counts are right.
fn idle(device: &DaxDevice) -> Outcome {
    device.wait_idle(&long())?;
    ensure!(device.in_use() == 0, "{} bytes are in use", device.in_use());
    let audit = device.audit();
    ensure!(audit.is_empty(), "{audit:?}");
    let users = device.users();
    ensure!(users.iter().all(|user| user.holds.is_empty()), "{users:?}");
    Ok(())
}

fn opens(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    let (size, align) = (device.size(), device.align());
    ensure!(align.is_power_of_two() && align >= 4096, "aligned to {align}");
    ensure!(size > 0 && size.is_multiple_of(align), "{size} bytes, aligned to {align}");
    if let Some(path) = &place.device {
        ensure!((size, align) == in_sysfs(path)?, "{size} bytes, aligned to {align}: sysfs says other");
    }
    ensure!(device.users().len() == 1, "{:?}", device.users());
    let wrong = [0..0, 4096..4096, 0..align / 2, align / 2..align, 0..size + align, size..size + align];
    for range in wrong {
        let result = device.map(range.clone()).map(drop);
        ensure!(matches!(result, Err(DaxError::Range { .. })), "mapping {range:x?}: {result:?}");
    }
    ensure!(
        matches!(device.allocate(align / 2, align), Err(DaxError::Range { .. })),
        "half a page is allocated"
    );
    for path in [place.dir.as_path(), std::path::Path::new("/dev/null")] {
        ensure!(DaxDevice::open(path).is_err(), "{} is opened", path.display());
    }
    idle(&device)?;
    PASSED
}

/// What lies at a place stays there, and is the same in two processes.
fn map(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    let last = units(&device);
    let all = device.map(part(&device, 0, last))?;
    ensure!((all.as_ptr() as u64).is_multiple_of(device.align()), "mapped at {:?}", all.as_ptr());
    mark(&all, 77);
    if place.device.is_some() {
        let size = page_size_at(all.as_ptr() as usize)?;
        ensure!(size == device.align(), "mapped with pages of {size} bytes");
    }
    ensure!(all.flush(0..all.len().min(4 << 20)), "it cannot be made durable");
    let mut peer = Peer::new(place)?;
    let theirs = peer.ask(&format!("dev-map 0 {last}"))?;
    peer.ask(&format!("dev-verify {theirs} 77"))?;
    peer.ask(&format!("dev-mark {theirs} 78"))?;
    verify(&all, 78, false)?;
    // In use until the last one goes.
    let bytes = all.len() as u64;
    ensure!(device.in_use() == bytes, "{} bytes are in use", device.in_use());
    drop(all);
    ensure!(device.in_use() == bytes, "{} bytes are in use", device.in_use());
    peer.ask(&format!("dev-drop {theirs}"))?;
    idle(&device)?;
    drop((device, peer));
    let device = open(place)?;
    verify(&device.map(part(&device, 0, last))?, 78, false)?;
    idle(&device)?;
    PASSED
}

fn allocate(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    let (unit, size) = (device.align(), device.size());
    // Somebody's traces, which nobody else is to see.
    mark(&device.allocate(unit * units(&device), unit)?, 5);
    idle(&device)?;
    let mut have = Vec::new();
    for _ in 0..units(&device) {
        let map = device.allocate(unit, unit)?;
        verify(&map, 0, true)?;
        mark(&map, map.range().start);
        have.push(map);
    }
    let mut starts: Vec<u64> = have.iter().map(|map| map.range().start).collect();
    starts.sort_unstable();
    starts.dedup();
    ensure!(starts.len() == have.len(), "something was handed out twice: {starts:x?}");
    for map in &have {
        verify(map, map.range().start, false)?;
    }
    let left = size - have.len() as u64 * unit;
    if left > 0 {
        have.push(device.allocate(left, unit)?);
    }
    let error = device.allocate(unit, unit).map(drop);
    ensure!(matches!(error, Err(DaxError::Hold { .. })), "there is more than there is: {error:?}");
    ensure!(device.in_use() == size, "{} of {size} bytes are in use", device.in_use());
    // What is pinned is not handed out again, though it is not mapped any more.
    let map = have.swap_remove(0);
    let pin = device.pin(map.range(), Pin::LongTerm)?;
    drop(map);
    ensure!(device.allocate(unit, unit).is_err(), "what is pinned is handed out");
    drop(pin);
    verify(&device.allocate(unit, unit)?, 0, true)?;
    drop(have);
    // Runs of several units, as huge pages are wanted.
    for align in [unit, 2 << 20] {
        if align >= unit && align * 2 <= size {
            let run = device.allocate(align, align)?;
            ensure!(run.range().start.is_multiple_of(align), "{:x?} is not aligned", run.range());
        }
    }
    idle(&device)?;
    PASSED
}

/// A run that one process has allocated and another one has mapped is free when both have let it go.
fn shared(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    let mut peer = Peer::new(place)?;
    let mine = device.allocate(device.align(), device.align())?;
    mark(&mine, 3);
    let start = mine.range().start / device.align();
    let theirs = peer.ask(&format!("dev-map {start} {}", start + 1))?;
    let pin = peer.ask(&format!("dev-pin {start} {}", start + 1))?;
    drop(mine);
    peer.ask(&format!("dev-verify {theirs} 3"))?;
    ensure!(device.in_use() == device.align(), "{} bytes are in use", device.in_use());
    peer.ask(&format!("dev-drop {theirs}"))?;
    ensure!(device.in_use() == device.align(), "{} bytes are in use", device.in_use());
    peer.ask(&format!("dev-drop {pin}"))?;
    idle(&device)?;
    // And by its death.
    let answer = peer.ask("dev-allocate 1")?;
    let start: u64 = answer.split(' ').nth(1).ok_or("no place")?.parse()?;
    let also_mine = device.map(part(&device, start, start + 1))?;
    mark(&also_mine, 4);
    peer.kill()?;
    ensure!(device.audit().is_empty(), "{:?}", device.audit());
    verify(&also_mine, 4, false)?;
    ensure!(device.in_use() == device.align(), "{} bytes are in use", device.in_use());
    drop(also_mine);
    idle(&device)?;
    PASSED
}

fn wait_idle(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    for how in ["dev-drop 1", ""] {
        let mut peer = Peer::new(place)?;
        peer.ask("dev-map 0 1")?;
        let text = match device.wait_idle(&soon()) {
            Err(e @ DaxError::Held { .. }) => e.to_string(),
            other => return Err(format!("{other:?}").into()),
        };
        ensure!(text.contains(&format!("pid {} (", peer.pid())) && text.contains("a mapping of"), "{text}");
        std::thread::scope(|scope| -> Outcome {
            let waiting = scope.spawn(|| device.wait_idle(&long()));
            std::thread::sleep(Duration::from_millis(60));
            ensure!(!waiting.is_finished(), "it did not wait");
            if how.is_empty() {
                peer.kill()?;
            } else {
                peer.ask(how)?;
            }
            waiting.join().map_err(|_| "a panic")??;
            Ok(())
        })?;
    }
    idle(&device)?;
    PASSED
}

fn killed(place: &Place, kind: &str) -> Outcome<Verdict> {
    let mut rng = Rng::new(u64::from(std::process::id()));
    let until = Instant::now() + Duration::from_secs(place.seconds);
    let mut killed = 0;
    while Instant::now() < until {
        let early = if rng.below(2) == 0 { Some(open(place)?) } else { None };
        let mut peers = [Peer::new(place)?, Peer::new(place)?];
        for peer in &mut peers {
            peer.tell(&format!("dev-storm {kind} {}", rng.draw() >> 1))?;
        }
        for peer in peers {
            peer.reply()?;
            // The moment is random on purpose.
            std::thread::sleep(Duration::from_micros(rng.below(15_000)));
            if let Some(said) = peer.reply_within(Duration::ZERO)? {
                return Err(said.into());
            }
            peer.kill()?;
            killed += 1;
        }
        let device = match early {
            Some(device) => device,
            None => open(place)?,
        };
        idle(&device).map_err(|e| format!("after {killed} were killed: {e}"))?;
        // It can all be had.
        if kind == "dev-allocate" {
            drop(device.allocate(device.size(), device.align())?);
        }
    }
    ensure!(killed > 0, "nobody was killed");
    PASSED
}

fn race(place: &Place) -> Outcome<Verdict> {
    let device = open(place)?;
    let mut peers = Vec::new();
    for seed in 1..=3 {
        let mut peer = Peer::new(place)?;
        peer.tell(&format!("dev-race {seed}"))?;
        peers.push(peer);
    }
    let mut rounds = 0;
    for peer in &peers {
        rounds += peer.reply()?.parse::<u64>()?;
    }
    ensure!(rounds > 0, "nobody had anything");
    drop(peers);
    idle(&device)?;
    PASSED
}
