//! Many processes at once, for a while.

use std::time::{Duration, Instant};

use farpage::dax::{Change, DaxError};
use farpage_tests::Verdict;

use super::{Case, PASSED, case};
use crate::peer::Peer;
use crate::place::{Place, soon};
use crate::storm::ALL;
use crate::{Outcome, ensure, pages};

pub const CASES: &[Case] = &[
    case("cut-and-grow-against-readers", |place| race(place, &["cut", "read", "read", "map"])),
    case("truncate-against-map", |place| race(place, &["truncate", "map"])),
    case("punch-against-touch", |place| race(place, &["punch", "touch", "touch"])),
    case("two-who-cut", |place| race(place, &["truncate", "truncate"])),
    case("open-and-close-by-20", twenty),
    case("open-at-once", at_once),
];

/// Each does its own thing for as long as the others.
fn race(place: &Place, kinds: &[&str]) -> Outcome<Verdict> {
    let file = place.file(ALL)?;
    let mut peers = Vec::new();
    for (seed, kind) in kinds.iter().enumerate() {
        let mut peer = Peer::new(place)?;
        peer.tell(&format!("race {kind} {}", seed + 1))?;
        peers.push(peer);
    }
    for (peer, kind) in peers.iter().zip(kinds) {
        let rounds: u64 = peer.reply().map_err(|e| format!("{kind}: {e}"))?.parse()?;
        ensure!(rounds > 1, "{kind} came to {rounds} rounds only");
    }
    drop(peers);
    let users = file.users();
    ensure!(users.len() == 1 && users[0].holds.is_empty(), "still there: {users:?}");
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}

fn twenty(place: &Place) -> Outcome<Verdict> {
    race(place, &["open"; 20])
}

/// Processes that open the file at the same moment, when nobody has it open, have one table.
fn at_once(place: &Place) -> Outcome<Verdict> {
    const PEERS: u64 = 5;
    drop(place.file(PEERS)?);
    let mut peers = Vec::new();
    for _ in 0..PEERS {
        peers.push(Peer::new(place)?);
    }
    let until = Instant::now() + Duration::from_secs(place.seconds);
    let mut rounds = 0;
    while Instant::now() < until {
        for (i, peer) in peers.iter_mut().enumerate() {
            peer.tell("open file")?;
            peer.tell(&format!("pin {i} {}", i + 1))?;
        }
        let file = place.options().open(place.path("file"))?;
        for peer in &peers {
            peer.reply()?;
            peer.reply()?;
        }
        ensure!(file.users().len() == peers.len() + 1, "round {rounds}: {:?}", file.users());
        for (i, peer) in peers.iter().enumerate() {
            let hole = Change::PunchHole(pages::bytes(i as u64..i as u64 + 1));
            let mut wait = soon();
            wait.timeout = Duration::from_millis(2);
            match file.change(hole, &wait) {
                Err(DaxError::Held { users, .. }) if users.len() == 1 && users[0].pid == peer.pid() => {}
                other => return Err(format!("round {rounds}, {}: {other:?}", peer.pid()).into()),
            }
        }
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
        // Who goes last is not the one who came last, and sometimes it is.
        if rounds % 2 == 0 {
            drop(file);
        }
        for peer in &mut peers {
            peer.tell("close")?;
        }
        for peer in &peers {
            peer.reply()?;
        }
        rounds += 1;
    }
    ensure!(rounds > 1, "{rounds} rounds");
    PASSED
}
