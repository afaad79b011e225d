//! Who appends, and who is in the way of that or has it in his way.

use std::sync::atomic::AtomicBool;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxError, DaxFile, Wait};
use farpage_tests::Verdict;
use rustix::process::Signal;

use super::{Case, PASSED, case, skipped};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long, soon};
use crate::storm::FIRM;
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[case("append-stopped", stopped), case("append-half-done", half_done)];

/// Time enough for what has a limit of [`soon`].
const LIMIT: Duration = Duration::from_secs(10);

/// A process that is stopped while it appends holds up those who move the file's end, for as long as they like to wait, and
/// nobody else.
fn stopped(place: &Place) -> Outcome<Verdict> {
    for _ in 0..50 {
        let file = place.file(2 * FIRM)?;
        let mut peer = Peer::new(place)?;
        peer.tell("storm grow 0")?;
        peer.reply()?;
        // Anywhere in what it does over and over.
        std::thread::sleep(Duration::from_millis(5));
        peer.stop()?;
        let was_in_it = in_the_way(place, &file, &peer)?;
        peer.kill()?;
        file.change(Change::Truncate(0), &long())?;
        ensure!(file.append(&[1; 100])? == 0, "not at the beginning");
        ensure!(file.audit().is_empty(), "{:?}", file.audit());
        if was_in_it {
            return PASSED;
        }
    }
    skipped("it was never stopped in the midst of appending")
}

/// False: it is not.
fn in_the_way(place: &Place, file: &DaxFile, peer: &Peer) -> Outcome<bool> {
    let map = file.map(0..2 * FIRM * PAGE)?;
    let names_it =
        |e: &DaxError| matches!(e, DaxError::Held { users, .. } if users.iter().any(|u| u.pid == peer.pid()));
    let stop = AtomicBool::new(true);
    std::thread::scope(|scope| -> Outcome<bool> {
        let truncate = || file.change(Change::Truncate(FIRM * PAGE), &soon());
        match in_time("a truncation", scope.spawn(truncate), peer)? {
            Err(e) if names_it(&e) => {}
            Ok(()) => return Ok(false),
            other => return Err(format!("a truncation: {other:?}").into()),
        }
        // What it would cut is still used meanwhile.
        let cutting = scope.spawn(truncate);
        let at = map.as_ptr() as usize + (FIRM * PAGE) as usize;
        let touching = scope.spawn(move || {
            let mut touches = 0u64;
            while !cutting.is_finished() {
                // SAFETY: inside the mapping.
                unsafe { (at as *const u8).read_volatile() };
                touches += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            touches
        });
        let touches = in_time("a touch", touching, peer)?;
        ensure!(touches > 20, "only {touches} touches while a truncation waits");
        let wait = Wait { stop: Some(&stop), ..long() };
        // The second one has no pages to wait for.
        for len in [FIRM * PAGE, u64::MAX >> 1] {
            let cutting = scope.spawn(move || file.change(Change::Truncate(len), &wait));
            let error = in_time("a truncation that was told to stop", cutting, peer)?;
            ensure!(matches!(error, Err(DaxError::Interrupted { .. })), "{error:?}");
        }
        let hasty = place.options().wait(soon().timeout).open(place.path("file"))?;
        let appending = scope.spawn(move || hasty.append(&[1; 100]));
        match in_time("another one who appends", appending, peer)? {
            Err(e) if names_it(&e) => {}
            other => return Err(format!("another one who appends: {other:?}").into()),
        }
        ensure!(file.len()? > 2 * FIRM * PAGE, "the file is cut");
        // All others go on.
        let (punch, pin) = (Change::PunchHole(pages::bytes(0..1)), FIRM * PAGE..2 * FIRM * PAGE);
        file.change(punch, &soon())?;
        drop(file.pin(pin, Pin::Short)?);
        Ok(true)
    })
}

fn in_time<T>(who: &str, thread: ScopedJoinHandle<'_, T>, stopped: &Peer) -> Outcome<T> {
    let until = Instant::now() + LIMIT;
    while !thread.is_finished() {
        if Instant::now() > until {
            // So that it comes to an end, which cannot be had without.
            stopped.signal(Signal::KILL)?;
            return Err(format!("{who} waits without limit").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().map_err(|_| format!("{who} panics").into())
}

/// Pages that fit, of twice as many.
const HALF: u64 = 8192;

/// What an append that fails has written is taken back, unless somebody holds pages of it by then, or has written behind.
fn half_done(place: &Place) -> Outcome<Verdict> {
    let mut held = 0;
    for round in 0..40 {
        let file = place.file(1)?;
        let mut peer = Peer::with_file(place)?;
        peer.tell(&format!("append-half {HALF}"))?;
        if round % 4 == 0 {
            let said = peer.reply()?;
            ensure!(said.contains("File too large") && !said.contains("stay"), "{said}");
            ensure!(file.len()? == PAGE, "{} bytes are left, of which nothing is said", file.len()?);
            continue;
        }
        let mut said = None;
        while file.len()? < 3 * PAGE && said.is_none() {
            said = peer.reply_within(Duration::ZERO)?;
        }
        if round % 2 == 0 {
            let Ok(pin) = file.pin(PAGE..2 * PAGE, Pin::Short) else { continue };
            let said = said.map_or_else(|| peer.reply(), Ok)?;
            ensure!(file.len()? == HALF * PAGE, "{} bytes are left while a page is pinned", file.len()?);
            ensure!(said.contains("0x1000..0x2000000 of it stay"), "{said}");
            drop(pin);
            held += 1;
        } else {
            let far = 2 * HALF;
            pages::write(&file, far..far + 1, 1)?;
            let said = said.map_or_else(|| peer.reply(), Ok)?;
            ensure!(file.len()? == (far + 1) * PAGE, "what was written behind is gone: {said}");
        }
        file.change(Change::Truncate(0), &long())?;
    }
    if held == 0 {
        return skipped("no page was pinned in time");
    }
    PASSED
}
