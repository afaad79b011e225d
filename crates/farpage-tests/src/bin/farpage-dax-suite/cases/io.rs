//! Input and output from and to a mapping that is in flight when somebody cuts: with a pin it comes to its end first.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Change, DaxFile};
use farpage_tests::{Rng, Verdict};
use io_uring::{IoUring, opcode, types};

use super::{Case, PASSED, case, skipped};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("io-uring-into-pinned", into_pinned),
    case("io-uring-from-pinned", from_pinned),
    case("io-uring-into-unpinned", into_unpinned),
    case("read-call-into-pinned", call_into_pinned),
    case("o-direct-against-cuts", direct),
];

/// What waits in the kernel for its completion.
struct Flying {
    ring: IoUring,
}

impl Flying {
    /// A ring, or why there is none.
    fn new() -> Result<Self, String> {
        let ring = IoUring::new(16).map_err(|e| format!("io_uring cannot be had: {e}"))?;
        Ok(Self { ring })
    }

    /// # Safety
    /// The memory that the entry names stays valid until it is complete.
    unsafe fn submit(&mut self, entry: &io_uring::squeue::Entry) -> Outcome {
        // SAFETY: the caller's promise.
        unsafe { self.ring.submission().push(entry)? };
        self.ring.submit()?;
        Ok(())
    }

    /// What became of one; `None`: not complete for so long.
    fn complete(&mut self, within: Duration) -> Outcome<Option<i32>> {
        let until = Instant::now() + within;
        loop {
            if let Some(entry) = self.ring.completion().next() {
                return Ok(Some(entry.result()));
            }
            if Instant::now() > until {
                return Ok(None);
            }
            // Has the kernel deliver what is to be done in this thread.
            self.ring.submit()?;
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

fn pipe() -> Outcome<(OwnedFd, File)> {
    let (from, to) = rustix::pipe::pipe()?;
    Ok((from, File::from(to)))
}

/// The other process cuts what the transfer works on; it must not come to its end before the transfer and the pin.
fn cut_waits(place: &Place, what: &str, mut transfer: impl FnMut() -> Outcome) -> Outcome<Peer> {
    let mut peer = Peer::with_file(place)?;
    peer.tell(what)?;
    let early = peer.reply_within(Duration::from_millis(200))?;
    ensure!(early.is_none(), "'{what}' did not wait for the transfer");
    transfer()?;
    let early = peer.reply_within(Duration::from_millis(50))?;
    ensure!(early.is_none(), "'{what}' did not wait for the pin");
    Ok(peer)
}

/// A read from a pipe into the mapping, by io_uring: it is in flight until somebody writes.
fn into_pinned(place: &Place) -> Outcome<Verdict> {
    let mut flying = match Flying::new() {
        Ok(flying) => flying,
        Err(why) => return skipped(why),
    };
    for cut in ["truncate 0", "punch 0 16", "truncate 4"] {
        let file = place.file(16)?;
        let map = file.map(pages::bytes(0..16))?;
        let pin = map.pin(4 * 4096..8 * 4096, Pin::Short)?;
        let at = pin.as_ptr().ok_or("no address")?;
        let (from, mut to) = pipe()?;
        let read = opcode::Read::new(types::Fd(from.as_raw_fd()), at, 4 * 4096).build();
        // SAFETY: pinned until it is complete.
        unsafe { flying.submit(&read)? };
        ensure!(flying.complete(Duration::from_millis(20))?.is_none(), "it is complete already");
        let data: Vec<u8> = (100..104).flat_map(|n| pages::fill(n, 3)).collect();
        let peer = cut_waits(place, cut, || {
            to.write_all(&data)?;
            let n = flying.complete(Duration::from_secs(20))?.ok_or("the read does not end")?;
            ensure!(n == 4 * 4096, "the read came to {n}");
            // SAFETY: pinned.
            pages::verify(&unsafe { pages::copy(at, 4 * 4096) }, 100, 3)?;
            // By way of the file as well: it was the file's own page.
            let mut seen = vec![0; 4 * 4096];
            file.read_at(&mut seen, 4 * PAGE)?;
            pages::verify(&seen, 100, 3)
        })?;
        drop(pin);
        peer.reply()?;
        done(&file, peer)?;
    }
    PASSED
}

/// A write from the mapping into a pipe that is full: in flight until somebody reads.
fn from_pinned(place: &Place) -> Outcome<Verdict> {
    let mut flying = match Flying::new() {
        Ok(flying) => flying,
        Err(why) => return skipped(why),
    };
    let file = place.file(16)?;
    let map = file.map(pages::bytes(0..16))?;
    let pin = map.pin(4 * 4096..8 * 4096, Pin::Short)?;
    let (from, to) = pipe()?;
    let size = rustix::pipe::fcntl_setpipe_size(&to, 4096)?;
    (&to).write_all(&vec![1; size])?;
    let at = pin.as_ptr().ok_or("no address")?;
    let write = opcode::Write::new(types::Fd(to.as_raw_fd()), at, 4096).build();
    // SAFETY: pinned until it is complete.
    unsafe { flying.submit(&write)? };
    ensure!(flying.complete(Duration::from_millis(20))?.is_none(), "it is complete already");
    let mut from = File::from(from);
    let peer = cut_waits(place, "punch 0 16", || {
        let mut read = vec![0; size];
        std::io::Read::read_exact(&mut from, &mut read)?;
        let n = flying.complete(Duration::from_secs(20))?.ok_or("the write does not end")?;
        ensure!(n == 4096, "the write came to {n}");
        let mut page = vec![0; 4096];
        std::io::Read::read_exact(&mut from, &mut page)?;
        pages::verify(&page, 4, 1)
    })?;
    drop(pin);
    peer.reply()?;
    done(&file, peer)?;
    PASSED
}

/// Without a pin the cut does not wait, and the transfer fails: never does it land in a block that is another's.
fn into_unpinned(place: &Place) -> Outcome<Verdict> {
    let mut flying = match Flying::new() {
        Ok(flying) => flying,
        Err(why) => return skipped(why),
    };
    let file = place.file(16)?;
    let map = file.map(pages::bytes(0..16))?;
    let (from, mut to) = pipe()?;
    let read = opcode::Read::new(types::Fd(from.as_raw_fd()), map.as_ptr(), 4096).build();
    // SAFETY: the mapping's addresses stay its own; what is there may raise SIGBUS, which is an error to the kernel.
    unsafe { flying.submit(&read)? };
    ensure!(flying.complete(Duration::from_millis(20))?.is_none(), "it is complete already");
    let mut peer = Peer::with_file(place)?;
    peer.ask("truncate 0")?;
    to.write_all(&[0xee; 4096])?;
    let n = flying.complete(Duration::from_secs(20))?.ok_or("the read does not end")?;
    ensure!(n == -libc::EFAULT, "the read came to {n}");
    ensure!(file.len()? == 0, "the file has grown");
    peer.ask("fill 0 16 2")?;
    pages::verify(&pages::of_path(file.path())?, 0, 2)?;
    drop(map);
    done(&file, peer)?;
    PASSED
}

/// The same by a plain system call, in which a thread waits.
fn call_into_pinned(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let map = file.map(pages::bytes(0..16))?;
    let pin = map.pin(0..8 * 4096, Pin::Short)?;
    let (from, mut to) = pipe()?;
    let at = pin.as_ptr().ok_or("no address")? as usize;
    let data: Vec<u8> = (50..58).flat_map(|n| pages::fill(n, 4)).collect();
    std::thread::scope(|scope| -> Outcome {
        let reading = scope.spawn(move || {
            // SAFETY: pinned; nobody else uses it.
            let buffer = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, 8 * 4096) };
            std::io::Read::read_exact(&mut File::from(from), buffer)
        });
        let mut reading = Some(reading);
        let peer = cut_waits(place, "truncate 0", || {
            to.write_all(&data)?;
            reading.take().ok_or("once")?.join().map_err(|_| "a panic")??;
            // SAFETY: pinned.
            pages::verify(&unsafe { pages::copy(at as *const u8, 8 * 4096) }, 50, 4)
        })?;
        drop(pin);
        peer.reply()?;
        done(&file, peer)
    })?;
    PASSED
}

/// The cut went through, and all counts are right.
fn done(file: &DaxFile, peer: Peer) -> Outcome {
    drop(peer);
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    file.change(Change::Truncate(0), &long())?;
    Ok(())
}

/// O_DIRECT transfers from and to pinned parts of a mapping, many in flight, while another process cuts and grows the
/// file without end: each has the right bytes, and none fails.
fn direct(place: &Place) -> Outcome<Verdict> {
    const PAGES: u64 = 16;
    const AT_ONCE: u64 = 8;
    let mut flying = match Flying::new() {
        Ok(flying) => flying,
        Err(why) => return skipped(why),
    };
    let all: Vec<u8> = (0..PAGES * AT_ONCE).flat_map(|n| pages::fill(n, 6)).collect();
    std::fs::write(place.path("source"), &all)?;
    std::fs::write(place.path("target"), &all)?;
    let open =
        |name| OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(place.path(name));
    let (source, target) = match (open("source"), open("target")) {
        (Ok(source), Ok(target)) => (source, target),
        (Err(e), _) | (_, Err(e)) => return skipped(format!("no O_DIRECT here: {e}")),
    };
    let file = place.file(crate::storm::ALL)?;
    let mut cutter = Peer::new(place)?;
    cutter.tell("race truncate 5")?;
    let mut rng = Rng::new(11);
    let mut rounds = 0;
    let until = Instant::now() + Duration::from_secs(place.seconds);
    while Instant::now() < until {
        let start = rng.below(crate::storm::ALL - PAGES * AT_ONCE);
        // What has just been cut off is no place to work on.
        let Ok(map) = file.map(pages::bytes(start..start + PAGES * AT_ONCE)) else { continue };
        let Ok(pin) = map.pin(0..map.len(), Pin::Short) else { continue };
        let at = pin.as_ptr().ok_or("no address")?;
        for read in [true, false] {
            for i in 0..AT_ONCE {
                let (offset, len) = (i * PAGES * PAGE, (PAGES * PAGE) as u32);
                // SAFETY: inside the pinned part.
                let buffer = unsafe { at.add(offset as usize) };
                let entry = if read {
                    opcode::Read::new(types::Fd(source.as_raw_fd()), buffer, len).offset(offset).build()
                } else {
                    opcode::Write::new(types::Fd(target.as_raw_fd()), buffer, len).offset(offset).build()
                };
                // SAFETY: pinned until all are complete.
                unsafe { flying.submit(&entry)? };
            }
            for _ in 0..AT_ONCE {
                let n = flying.complete(Duration::from_secs(30))?.ok_or("a transfer does not end")?;
                ensure!(n == (PAGES * PAGE) as i32, "a transfer came to {n}, in round {rounds}");
            }
        }
        // SAFETY: pinned.
        pages::verify(&unsafe { pages::copy(at, map.len()) }, 0, 6)?;
        if rounds % 8 == 0 {
            pages::verify(&std::fs::read(place.path("target"))?, 0, 6)?;
        }
        rounds += 1;
    }
    let cuts: u64 = cutter.reply()?.parse()?;
    ensure!(rounds > 0 && cuts > 1, "{rounds} rounds, {cuts} cuts");
    done(&file, cutter)?;
    PASSED
}
