//! Processes that are killed at random moments: nothing that they held or were at stays.

use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxFile};
use farpage_tests::{Rng, Verdict};
use rustix::process::Signal;

use super::{Case, PASSED, case, skipped};
use crate::pages::{Held, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long};
use crate::storm::FIRM;
use crate::{Outcome, ensure, pages};

pub const CASES: &[Case] = &[
    case("killed-holder", holder),
    case("killed-inside-a-punch", inside_a_punch),
    case("killed-opening", |place| storm(place, "open")),
    case("killed-reopening", |place| storm(place, "reopen")),
    case("killed-mapping", |place| storm(place, "map")),
    case("killed-pinning", |place| storm(place, "pin")),
    case("killed-cutting", |place| storm(place, "cut")),
    case("killed-appending", |place| storm(place, "append")),
    case("killed-anything", |place| storm(place, "all")),
];

/// A cut that waits for a process goes on when that is killed.
fn holder(place: &Place) -> Outcome<Verdict> {
    let file = place.file(FIRM)?;
    for hold in ["pin 0 8", "map 0 8"] {
        let mut peer = Peer::with_file(place)?;
        peer.ask(hold)?;
        std::thread::scope(|scope| -> Outcome {
            if hold.starts_with("map") {
                peer.stop()?;
            }
            let cutting = scope.spawn(|| file.change(Change::PunchHole(pages::bytes(0..8)), &long()));
            std::thread::sleep(Duration::from_millis(60));
            ensure!(!cutting.is_finished(), "the cut did not wait");
            peer.kill()?;
            cutting.join().map_err(|_| "a panic")??;
            Ok(())
        })?;
        ensure!(file.users().len() == 1, "still there: {:?}", file.users());
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
    }
    PASSED
}

/// Two at a time, each killed at some moment of its life.
fn storm(place: &Place, kind: &str) -> Outcome<Verdict> {
    let mut rng = Rng::new(u64::from(std::process::id()));
    let until = Instant::now() + Duration::from_secs(place.seconds);
    let mut killed = 0;
    drop(place.file(FIRM)?);
    while Instant::now() < until {
        // Sometimes nobody else has it open when they come, and when they go.
        let early = if rng.below(2) == 0 { Some(place.options().open(place.path("file"))?) } else { None };
        let mut peers = [Peer::new(place)?, Peer::new(place)?];
        for peer in &mut peers {
            peer.tell(&format!("storm {kind} {}", rng.draw() >> 1))?;
        }
        for peer in peers {
            // It has begun.
            peer.reply()?;
            // The moment is random on purpose.
            std::thread::sleep(Duration::from_micros(rng.below(15_000)));
            if let Some(said) = peer.reply_within(Duration::ZERO)? {
                return Err(said.into());
            }
            peer.kill()?;
            killed += 1;
        }
        let file = match early {
            Some(file) => file,
            None => place.options().open(place.path("file"))?,
        };
        let before = Instant::now();
        file.change(Change::PunchHole(pages::bytes(0..FIRM)), &long())
            .map_err(|e| format!("after {killed} were killed: {e}"))?;
        ensure!(
            before.elapsed() < Duration::from_secs(20),
            "the dead were in the way for {:?}",
            before.elapsed()
        );
        let users = file.users();
        ensure!(users.len() == 1 && users[0].holds.is_empty(), "after {killed} were killed: {users:?}");
        let audit = file.audit();
        ensure!(audit.is_empty(), "after {killed} were killed: {audit:?}");
        file.change(Change::Truncate(0), &long())?;
        pages::write(&file, 0..FIRM, 1)?;
    }
    ensure!(killed > 2, "only {killed} were killed");
    PASSED
}

/// Pages of a file that takes the kernel a while to change: 1 GiB.
const BIG: u64 = 1 << 18;

fn blocks(file: &DaxFile) -> Outcome<i64> {
    Ok(rustix::fs::fstat(file.as_fd())?.st_blocks)
}

fn page(file: &DaxFile, number: u64) -> Outcome<Held> {
    let mut page = [0; PAGE as usize];
    file.read_at(&mut page, number * PAGE)?;
    pages::look(&page)
}

/// A system call that changes the file goes on although its process was killed. Nobody gets the pages before it is over.
fn inside_a_punch(place: &Place) -> Outcome<Verdict> {
    let free = rustix::fs::statvfs(&place.dir)?;
    let (free, needed) = (free.f_bavail * free.f_frsize, 2 * BIG * PAGE);
    if free < needed {
        return skipped(format!("{needed} bytes of space are needed, there are {free}"));
    }
    let file = place.file(1)?;
    file.allocate(pages::bytes(0..BIG))?;
    pages::write(&file, BIG - 1..BIG, 1)?;
    let mut peer = Peer::with_file(place)?;
    let before = blocks(&file)?;
    peer.tell(&format!("punch 0 {BIG}"))?;
    while blocks(&file)? == before {
        if peer.reply_within(Duration::ZERO)?.is_some() {
            return skipped("this file system makes holes too fast");
        }
    }
    peer.signal(Signal::KILL)?;
    let pin = file.pin(pages::bytes(BIG - 1..BIG), Pin::Short)?;
    let pinned = page(&file, BIG - 1)?;
    peer.kill()?;
    let now = page(&file, BIG - 1)?;
    ensure!(now == pinned, "a pinned page was {pinned:?}, and is {now:?} since the cutter's call is over");
    drop(pin);
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}
