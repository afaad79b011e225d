//! A FUSE file system whose file is a DAX file: what is done through the mount waits for pins of the file behind it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farpage::Pin;
use farpage_tests::Verdict;
use fuser::BackgroundSession;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Case, PASSED, case, skipped};
use crate::fuse::{Gate, serve};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Place, long};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[
    case("fuse-read-write", |place| with_mount(place, long().timeout, read_write)),
    case("fuse-changes-wait-for-pins", |place| with_mount(place, long().timeout, waits)),
    case("fuse-held-too-long", |place| with_mount(place, Duration::from_millis(300), too_long)),
    case("fuse-direct-io-in-flight", |place| with_mount(place, long().timeout, in_flight)),
];

/// What a case works on.
struct Served<'p> {
    place: &'p Place,
    /// The file behind the mount, of another handle than the server's.
    file: farpage::dax::DaxFile,
    mount: PathBuf,
    gate: Arc<Gate>,
}

impl Served<'_> {
    fn open(&self, name: &str) -> Outcome<File> {
        Ok(OpenOptions::new().read(true).write(true).open(self.mount.join(name))?)
    }
}

/// Mounts, runs the case, and unmounts. The server waits for `timeout` for pins.
fn with_mount(place: &Place, timeout: Duration, case: fn(&Served<'_>) -> Outcome) -> Outcome<Verdict> {
    let mount = place.mount.clone().unwrap_or_else(|| place.path("mount"));
    std::fs::create_dir_all(&mount)?;
    let file = place.file(64)?;
    let behind = place.options().wait(timeout).open(place.path("file"))?;
    let gate = Arc::new(Gate::default());
    let session: BackgroundSession = match serve(behind, gate.clone(), &mount) {
        Ok(session) => session,
        Err(e) => return skipped(format!("FUSE cannot be mounted here: {e}")),
    };
    let served = Served { place, file, mount, gate };
    let result = case(&served);
    ensure!(served.file.audit().is_empty(), "{:?}", served.file.audit());
    session.umount_and_join().map_err(|e| format!("unmounting: {e}"))?;
    result?;
    PASSED
}

fn read_write(served: &Served<'_>) -> Outcome {
    let data = served.open("data")?;
    ensure!(data.metadata()?.len() == 64 * PAGE, "it has {} bytes", data.metadata()?.len());
    let mut all = vec![0; 64 * 4096];
    data.read_exact_at(&mut all, 0)?;
    pages::verify(&all, 0, 1)?;
    // What comes in through the mount is at once in every mapping of the file behind it, and the other way round.
    let mut peer = Peer::with_file(served.place)?;
    let map = peer.ask("map 0 64")?;
    let second: Vec<u8> = (0..64).flat_map(|n| pages::fill(n, 2)).collect();
    data.write_all_at(&second, 0)?;
    peer.ask(&format!("verify {map} 0 2"))?;
    peer.ask("fill 0 64 3")?;
    data.read_exact_at(&mut all, 0)?;
    pages::verify(&all, 0, 3)?;
    data.sync_all()?;
    // It grows and shrinks.
    data.write_all_at(&pages::fill(64, 3), 64 * PAGE)?;
    ensure!(served.file.len()? == 65 * PAGE, "it has {} bytes", served.file.len()?);
    data.set_len(32 * PAGE)?;
    ensure!(served.file.len()? == 32 * PAGE, "it has {} bytes", served.file.len()?);
    Ok(())
}

/// Truncates and hole punches through the mount wait for a pin that another process holds of the file behind; reads
/// go on.
fn waits(served: &Served<'_>) -> Outcome {
    type Act = fn(&File) -> Result<(), Errno>;
    let acts: [(&str, Act); 4] = [
        ("ftruncate", |file| rustix::fs::ftruncate(file, 5 * PAGE)),
        ("ftruncate to 0", |file| rustix::fs::ftruncate(file, 0)),
        ("a hole punch", |file| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, 2 * PAGE, 8 * PAGE)
        }),
        ("zeroing", |file| rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, 2 * PAGE, 8 * PAGE)),
    ];
    for (name, act) in acts {
        pages::write(&served.file, 0..64, 1)?;
        let mut peer = Peer::with_file(served.place)?;
        let map = peer.ask("map 0 64")?;
        let pin = peer.ask("pin 5 6")?;
        let data = served.open("data")?;
        std::thread::scope(|scope| -> Outcome {
            let acting = scope.spawn(|| act(&data));
            std::thread::sleep(Duration::from_millis(250));
            if !acting.is_finished() {
                peer.ask(&format!("verify {map} 0 1")).map_err(|e| format!("{name} did not wait: {e}"))?;
                let mut page = vec![0; 4096];
                served.open("data")?.read_exact_at(&mut page, 5 * PAGE)?;
                pages::verify(&page, 5, 1)?;
                peer.ask(&format!("drop {pin}"))?;
                return match acting.join().map_err(|_| "a panic")? {
                    // The file system behind has no such call, which it says when nobody is in the way any more.
                    Err(Errno::OPNOTSUPP) if name == "zeroing" => Ok(()),
                    other => other.map_err(|e| format!("{name}: {e}").into()),
                };
            }
            match acting.join().map_err(|_| "a panic")? {
                // This kernel's FUSE has no such call.
                Err(Errno::OPNOTSUPP) if name == "zeroing" => Ok(()),
                other => Err(format!("{name} did not wait: {other:?}").into()),
            }
        })?;
        let (len, mut page) = (served.file.len()?, vec![1; 4096]);
        served.file.read_at(&mut page, 5 * PAGE)?;
        let there = pages::look(&page);
        ensure!(
            len < 64 * PAGE || matches!(there, Ok(pages::Held::Zeros)) || name == "zeroing",
            "{name} did nothing"
        );
        peer.ask("close")?;
    }
    Ok(())
}

/// Who holds on for longer than the server waits keeps the file as it is; the caller is told.
fn too_long(served: &Served<'_>) -> Outcome {
    let mut peer = Peer::with_file(served.place)?;
    let pin = peer.ask("pin 5 6")?;
    let data = served.open("data")?;
    let result = rustix::fs::ftruncate(&data, 0);
    ensure!(result == Err(Errno::BUSY), "truncating a held file: {result:?}");
    ensure!(data.metadata()?.len() == 64 * PAGE, "it has {} bytes", data.metadata()?.len());
    // Elsewhere in the file nobody waits.
    rustix::fs::ftruncate(&data, 6 * PAGE)?;
    peer.ask(&format!("drop {pin}"))?;
    rustix::fs::ftruncate(&data, 0)?;
    Ok(())
}

/// A transfer from a slow device straight into a mapping, and from one: the kernel itself works on the pages while the
/// device takes its time. With a pin nobody cuts them meanwhile.
fn in_flight(served: &Served<'_>) -> Outcome {
    let gate = served.open("gate")?;
    for write in [false, true] {
        pages::write(&served.file, 0..64, 1)?;
        let map = served.file.map(pages::bytes(0..64))?;
        let pin = map.pin(8 * 4096..12 * 4096, Pin::Short)?;
        let at = pin.as_ptr().ok_or("no address")? as usize;
        let (gate, state) = (&gate, &served.gate);
        state.set(false, 0xa5);
        let mut peer = Peer::with_file(served.place)?;
        std::thread::scope(|scope| -> Outcome {
            let moving = scope.spawn(move || {
                // SAFETY: pinned; nobody else uses it meanwhile.
                let buffer = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, 4 * 4096) };
                if write { gate.write_all_at(buffer, 0) } else { gate.read_exact_at(buffer, 0) }
            });
            ensure!(state.is_used(), "the transfer does not begin");
            peer.tell("truncate 0")?;
            let early = peer.reply_within(Duration::from_millis(250))?;
            ensure!(early.is_none() && !moving.is_finished(), "the cut did not wait for the transfer");
            state.set(true, 0xa5);
            moving.join().map_err(|_| "a panic")??;
            let early = peer.reply_within(Duration::from_millis(50))?;
            ensure!(early.is_none(), "the cut did not wait for the pin");
            Ok(())
        })
        .inspect_err(|_| state.set(true, 0))?;
        // SAFETY: pinned.
        let memory = unsafe { pages::copy(at as *const u8, 4 * 4096) };
        if write {
            pages::verify(&served.gate.written(), 8, 1)?;
            pages::verify(&memory, 8, 1)?;
        } else {
            ensure!(memory.iter().all(|b| *b == 0xa5), "what was read is not there");
        }
        drop(pin);
        peer.reply()?;
        ensure!(served.file.len()? == 0, "it was not cut");
    }
    Ok(())
}
