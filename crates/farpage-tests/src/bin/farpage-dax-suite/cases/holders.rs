//! Cuts against those who hold pages: this process, another one, one that is stopped.

use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxError, DaxFile};
use farpage_tests::Verdict;
use rustix::io::Errno;
use rustix::process::Signal;

use super::{Case, PASSED, case};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long, soon};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("cut-against-own-pin", own),
    case("cut-against-other-pin", other),
    case("cut-against-other-mapping", mapping),
    case("cut-against-stopped", stopped),
    case("cut-collapse-moves-the-rest", collapse),
    case("touch-of-cut-page", touch),
    case("touch-during-cut", touch_during),
    case("new-pins-wait-for-cut", late),
];

/// Changes all of which take pages 4 and 5 out.
fn changes() -> [Change; 4] {
    [
        Change::Truncate(5 * PAGE),
        Change::PunchHole(pages::bytes(3..6)),
        Change::ZeroRange(pages::bytes(4..6)),
        Change::CollapseRange(pages::bytes(5..8)),
    ]
}

/// A change that nobody is in the way of; true if the file system can do it.
fn goes(file: &DaxFile, change: &Change) -> Outcome<bool> {
    match file.change(change.clone(), &long()) {
        Ok(()) => Ok(true),
        // tmpfs can neither zero nor collapse.
        Err(DaxError::Sys { errno: Errno::OPNOTSUPP, .. }) if !matches!(change, Change::Truncate(_)) => {
            Ok(false)
        }
        Err(e) => Err(format!("{change:?}: {e}").into()),
    }
}

/// The change waits, and its error names who is in the way.
fn refused(file: &DaxFile, change: &Change, pid: u32, what: &str) -> Outcome {
    let began = Instant::now();
    let error = match file.change(change.clone(), &soon()) {
        Ok(()) => return Err(format!("{change:?} went through").into()),
        Err(e) => e,
    };
    let text = error.to_string();
    let DaxError::Held { users, .. } = error else { return Err(format!("{change:?}: {text}").into()) };
    ensure!(began.elapsed() >= soon().timeout, "it did not wait");
    ensure!(users.iter().any(|user| user.pid == pid), "{change:?} does not name {pid}: {text}");
    ensure!(text.contains(&format!("pid {pid} (")) && text.contains(what), "{change:?}: {text}");
    Ok(())
}

fn own(place: &Place) -> Outcome<Verdict> {
    for change in changes() {
        let file = place.file(16)?;
        let map = file.map(pages::bytes(0..16))?;
        let pin = map.pin(4 * 4096 + 7..6 * 4096, Pin::Short)?;
        refused(&file, &change, std::process::id(), "a pin of 0x")?;
        // Nothing has happened, and what is elsewhere goes on.
        // SAFETY: the mapping lives.
        pages::verify(&unsafe { pages::copy(map.as_ptr(), map.len()) }, 0, 1)?;
        file.change(Change::PunchHole(pages::bytes(0..4)), &long())?;
        file.change(Change::Truncate(6 * PAGE), &long())?;
        pages::write(&file, 6..16, 1)?;
        drop(pin);
        goes(&file, &change)?;
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
        drop((map, file));
        std::fs::remove_file(place.path("file"))?;
    }
    PASSED
}

fn other(place: &Place) -> Outcome<Verdict> {
    for change in changes() {
        let file = place.file(16)?;
        let mut peer = Peer::with_file(place)?;
        let pin = peer.ask("pin 4 6")?;
        refused(&file, &change, peer.pid(), "a pin of 0x")?;
        pages::verify(&pages::of_path(file.path())?, 0, 1)?;
        file.change(Change::PunchHole(pages::bytes(0..4)), &long())?;
        // Who waits goes on when the pin goes, and not before.
        std::thread::scope(|scope| -> Outcome {
            let cutting = scope.spawn(|| goes(&file, &change).map_err(|e| e.to_string()));
            std::thread::sleep(Duration::from_millis(100));
            ensure!(!cutting.is_finished(), "{change:?} went through");
            peer.ask(&format!("drop {pin}"))?;
            cutting.join().map_err(|_| "a panic")??;
            Ok(())
        })?;
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
        drop((file, peer));
        std::fs::remove_file(place.path("file"))?;
    }
    PASSED
}

/// A mapping alone holds nobody off: it is taken away, and comes back with what is there then.
fn mapping(place: &Place) -> Outcome<Verdict> {
    let file = place.file(600)?;
    let mut peer = Peer::with_file(place)?;
    let map = peer.ask("map 0 600")?;
    peer.ask(&format!("verify {map} 0 1"))?;
    file.change(Change::PunchHole(pages::bytes(10..20)), &long())?;
    ensure!(peer.ask(&format!("touch {map} {}", 10 * PAGE))? == "0", "the hole is not empty");
    ensure!(peer.ask(&format!("touch {map} {}", 20 * PAGE))? != "0", "what is behind the hole is gone");
    pages::write(&file, 10..20, 1)?;
    peer.ask(&format!("verify {map} 0 1"))?;
    file.change(Change::Truncate(100 * PAGE), &long())?;
    pages::write(&file, 100..600, 1)?;
    peer.ask(&format!("verify {map} 0 1"))?;
    // Its references are all there again.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let users = file.users();
        let his = users.iter().find(|user| user.pid == peer.pid()).ok_or("he is gone")?;
        if his.holds.len() == 1 && his.holds[0].range == pages::bytes(0..600) {
            break;
        }
        ensure!(Instant::now() < until, "he holds {his}");
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}

fn stopped(place: &Place) -> Outcome<Verdict> {
    for hold in ["map 0 16", "pin 4 6"] {
        let file = place.file(16)?;
        let mut peer = Peer::with_file(place)?;
        let held = peer.ask(hold)?;
        peer.stop()?;
        let what = if hold.starts_with("map") { "a mapping of" } else { "a pin of" };
        refused(&file, &Change::PunchHole(pages::bytes(4..6)), peer.pid(), what)?;
        refused(&file, &Change::Truncate(0), peer.pid(), what)?;
        peer.signal(Signal::CONT)?;
        if hold.starts_with("pin") {
            peer.ask(&format!("drop {held}"))?;
        }
        file.change(Change::Truncate(0), &long())?;
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
    }
    PASSED
}

fn collapse(place: &Place) -> Outcome<Verdict> {
    let file = place.file(64)?;
    let mut peer = Peer::with_file(place)?;
    let theirs = peer.ask("map 0 32")?;
    let map = file.map(pages::bytes(0..64))?;
    if !goes(&file, &Change::CollapseRange(pages::bytes(8..16)))? {
        return super::skipped("this file system cannot take a part out of a file");
    }
    ensure!(file.len()? == 56 * PAGE, "the file has {} bytes", file.len()?);
    // SAFETY: the mapping lives, and the file has 56 pages.
    let memory = unsafe { pages::copy(map.as_ptr(), 56 * 4096) };
    pages::verify(&memory[..8 * 4096], 0, 1)?;
    pages::verify(&memory[8 * 4096..], 16, 1)?;
    let first = peer.ask(&format!("touch {theirs} {}", 8 * PAGE + 8))?;
    ensure!(first == "16", "the other process sees page {first}");
    ensure!(matches!(map.read(56 * 4096, &mut [0]), Err(DaxError::Cut { .. })), "the end is still there");
    PASSED
}

/// A touch of a page that has been cut off is SIGBUS, as the kernel has it.
fn touch(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let mut peer = Peer::with_file(place)?;
    let map = peer.ask("map 0 16")?;
    file.change(Change::Truncate(8 * PAGE), &long())?;
    peer.ask(&format!("touch {map} {}", 7 * PAGE))?;
    peer.tell(&format!("touch {map} {}", 8 * PAGE))?;
    let signal = peer.ended_by()?;
    ensure!(signal == Some(libc::SIGBUS), "it ended by {signal:?}");
    file.change(Change::Truncate(0), &long())?;
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}

/// A touch during a cut waits. A process that is stopped keeps the cut from its end.
fn touch_during(place: &Place) -> Outcome<Verdict> {
    for change in [Change::PunchHole(pages::bytes(4..8)), Change::Truncate(4 * PAGE)] {
        let file = place.file(16)?;
        let (mut slow, mut quick) = (Peer::with_file(place)?, Peer::with_file(place)?);
        slow.ask("map 0 16")?;
        let map = quick.ask("map 0 16")?;
        let touch = format!("touch {map} {}", 5 * PAGE);
        slow.stop()?;
        // The cut gives up: what was touched meanwhile is what it was.
        std::thread::scope(|scope| -> Outcome {
            let pid = slow.pid();
            let (file, change) = (&file, &change);
            let cutting =
                scope.spawn(move || refused(file, change, pid, "a mapping of").map_err(|e| e.to_string()));
            std::thread::sleep(soon().timeout / 2);
            let first = quick.ask(&touch)?;
            ensure!(first == "33", "it reads {first}");
            cutting.join().map_err(|_| "a panic")??;
            Ok(())
        })?;
        std::thread::scope(|scope| -> Outcome {
            let cutting = scope.spawn(|| file.change(change.clone(), &long()));
            std::thread::sleep(Duration::from_millis(150));
            quick.tell(&touch)?;
            let early = quick.reply_within(Duration::from_millis(200))?;
            ensure!(early.is_none() && !cutting.is_finished(), "it did not wait: {early:?}");
            slow.signal(Signal::CONT)?;
            cutting.join().map_err(|_| "a panic")??;
            Ok(())
        })?;
        match change {
            Change::Truncate(_) => {
                let signal = quick.ended_by()?;
                ensure!(signal == Some(libc::SIGBUS), "it ended by {signal:?}");
            }
            _ => ensure!(quick.reply()? == "0", "the hole is not empty"),
        }
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
        drop((file, slow));
        std::fs::remove_file(place.path("file"))?;
    }
    PASSED
}

/// Pins and mappings that come during a cut wait for its end; a cut waits for a cut.
fn late(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let mut holder = Peer::with_file(place)?;
    let pin = holder.ask("pin 4 5")?;
    let mut peers = Vec::new();
    for _ in 0..4 {
        peers.push(Peer::with_file(place)?);
    }
    std::thread::scope(|scope| -> Outcome {
        let cutting = scope.spawn(|| file.change(Change::PunchHole(pages::bytes(4..8)), &long()));
        std::thread::sleep(Duration::from_millis(100));
        let late = ["pin 5 6", "map 0 16", "punch 7 9", "fill 0 4 1"];
        for (peer, what) in peers.iter_mut().zip(late) {
            peer.tell(what)?;
        }
        let [pinning, mapping, punching, filling] = &peers[..] else { return Err("four".into()) };
        filling.reply()?;
        for (peer, what) in [pinning, mapping, punching].into_iter().zip(late) {
            let early = peer.reply_within(Duration::from_millis(50))?;
            ensure!(early.is_none(), "'{what}' did not wait");
        }
        ensure!(!cutting.is_finished(), "the cut did not wait");
        holder.ask(&format!("drop {pin}"))?;
        cutting.join().map_err(|_| "a panic")??;
        for peer in &peers[..3] {
            peer.reply()?;
        }
        Ok(())
    })?;
    PASSED
}
