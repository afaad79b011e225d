//! Many processes at once, for a while.

use farpage_tests::Verdict;

use super::{Case, PASSED, case};
use crate::peer::Peer;
use crate::place::Place;
use crate::storm::ALL;
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("cut-and-grow-against-readers", |place| race(place, &["cut", "read", "read", "map"])),
    case("truncate-against-map", |place| race(place, &["truncate", "map"])),
    case("two-who-cut", |place| race(place, &["truncate", "truncate"])),
    case("open-and-close-by-20", twenty),
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
