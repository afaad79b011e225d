//! Leases: long-term pins that are given up when somebody asks, and programs that know nothing of farpage.

use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxError};
use farpage_tests::Verdict;

use super::{Case, PASSED, case, skipped};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long, soon};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("long-pins-are-revoked", revoke),
    case("others-wait-for-pins", others),
    case("farpage-processes-do-not", ours),
];

fn revoke(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let error = file.pin(0..PAGE, Pin::LongTerm).map(drop);
    ensure!(matches!(error, Err(DaxError::LongTerm { .. })), "{error:?}");
    let mut peer = Peer::new(place)?;
    peer.ask("lease file")?;
    peer.ask("long-pin 4 8")?;
    file.change(Change::PunchHole(pages::bytes(8..12)), &soon())?;
    ensure!(peer.ask("asked")? == "[]", "asked for what is not in the way");
    file.change(Change::PunchHole(pages::bytes(6..10)), &long())?;
    let asked = peer.ask("asked")?;
    ensure!(asked == format!("[{:?}]", 6 * PAGE..8 * PAGE), "asked for {asked}");
    // Once more, by another one's cut; and one who holds on is named.
    peer.ask("long-pin 0 4")?;
    let mut third = Peer::with_file(place)?;
    third.ask("truncate 2")?;
    peer.ask("pin 0 1")?;
    let text = third.ask("truncate 0 200").err().ok_or("the pin is in nobody's way")?.to_string();
    ensure!(text.contains(&format!("pid {} (", peer.pid())), "{text}");
    PASSED
}

/// Programs that open or truncate the file by its name wait while pages are pinned, where there are leases.
fn others(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    // Is there such a thing here?
    let probe = std::fs::File::create(place.path("probe"))?;
    // SAFETY: takes numbers only.
    let r = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&probe), libc::F_SETLEASE, libc::F_WRLCK) };
    if r != 0 {
        return skipped(format!("no leases here: {}", std::io::Error::last_os_error()));
    }
    for what in ["plain-open file", "plain-truncate file 4096"] {
        let mut other = Peer::new(place)?;
        let pin = file.pin(0..PAGE, Pin::Short)?;
        let second = file.pin(4 * PAGE..5 * PAGE, Pin::Short)?;
        other.tell(what)?;
        let early = other.reply_within(Duration::from_millis(400))?;
        ensure!(early.is_none(), "'{what}' did not wait");
        drop(pin);
        let early = other.reply_within(Duration::from_millis(200))?;
        ensure!(early.is_none(), "'{what}' did not wait for the second pin");
        ensure!(file.len()? == 16 * PAGE, "it is cut already");
        let began = Instant::now();
        drop(second);
        other.reply()?;
        ensure!(began.elapsed() < Duration::from_secs(15), "it went on after {:?} only", began.elapsed());
        // And nobody waits when nothing is pinned.
        other.ask("plain-open file")?;
    }
    ensure!(file.len()? == PAGE, "'plain-truncate' did nothing");
    PASSED
}

/// The lease is in no farpage process's way: those see the pins.
fn ours(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    for _ in 0..8 {
        let pin = file.pin(0..PAGE, Pin::Short)?;
        let mut peer = Peer::new(place)?;
        let began = Instant::now();
        peer.ask("open file")?;
        // The kernel would let it wait for 45 s.
        ensure!(began.elapsed() < Duration::from_secs(5), "it waited for {:?}", began.elapsed());
        ensure!(peer.ask("punch 0 1 100").is_err(), "it does not see the pin");
        drop(pin);
        peer.ask("punch 0 1")?;
        let pin = peer.ask("pin 0 1")?;
        let error = file.change(Change::Truncate(0), &soon());
        ensure!(error.is_err(), "its pin is not seen");
        peer.ask(&format!("drop {pin}"))?;
    }
    PASSED
}
