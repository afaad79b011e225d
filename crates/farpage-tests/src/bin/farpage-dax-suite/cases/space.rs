//! The file system under the file: full, or to be unmounted.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{DaxError, DaxFile};
use farpage_tests::Verdict;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::{Case, PASSED, case, skipped};
use crate::pages::{self, PAGE};
use crate::peer::Peer;
use crate::place::{Expect, Place};
use crate::{Outcome, ensure};

pub const CASES: &[Case] = &[case("no-space", no_space), case("unmount-while-pinned", unmount)];

/// A mount of the case's own.
struct Mounted(PathBuf);

impl Mounted {
    /// An empty tmpfs of 4 MiB.
    fn small(at: PathBuf) -> Outcome<Result<Self, Errno>> {
        std::fs::create_dir_all(&at)?;
        let mounted =
            rustix::mount::mount("farpage-suite", &at, "tmpfs", MountFlags::empty(), Some(c"size=4m"));
        Ok(mounted.map(|()| Self(at)))
    }

    /// A directory once more.
    fn bind(dir: &Path, at: PathBuf) -> Outcome<Result<Self, Errno>> {
        std::fs::create_dir_all(&at)?;
        std::fs::create_dir_all(dir)?;
        Ok(rustix::mount::mount_bind(dir, &at).map(|()| Self(at)))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It has been unmounted, if all went well.
        let _gone = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Takes all space that the file system has, by a file of its own.
fn use_up(dir: &Path) -> Outcome {
    let filler = std::fs::File::create(dir.join("filler"))?;
    let mut at = 0;
    let mut piece = 256 << 20;
    while piece >= PAGE {
        match rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at, piece) {
            Ok(()) => at += piece,
            Err(Errno::NOSPC) => piece /= 2,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    filler.sync_all()?;
    Ok(())
}

fn no_space(place: &Place) -> Outcome<Verdict> {
    let (dir, _mounted);
    if place.expect == Expect::Dax {
        let free = rustix::fs::statvfs(&place.dir)?;
        if free.f_bavail * free.f_frsize > 4 << 30 {
            return skipped("the file system is too large to be filled");
        }
        dir = place.dir.clone();
    } else {
        _mounted = match Mounted::small(place.path("small"))? {
            Ok(mounted) => mounted,
            Err(e) => return skipped(format!("a small tmpfs cannot be mounted: {e}")),
        };
        dir = place.path("small");
    }
    let file = place.options().create(dir.join("file"))?;
    pages::write(&file, 0..16, 1)?;
    file.flush(0..16 * PAGE)?;
    // A file with a hole, for which there is no space.
    let hole = place.options().create(dir.join("hole"))?;
    hole.truncate(2048 * PAGE)?;
    pages::write(&hole, 0..4, 1)?;
    hole.flush(0..4 * PAGE)?;
    use_up(&dir)?;
    full(&file, &hole)?;
    // Space comes back.
    std::fs::remove_file(dir.join("filler"))?;
    drop(hole);
    std::fs::remove_file(dir.join("hole"))?;
    let until = Instant::now() + Duration::from_secs(20);
    let len = file.len()?;
    while let Err(e) = file.append(&[3; 3 * 4096]) {
        // Some file systems take their time.
        ensure!(Instant::now() < until, "there is space again, but: {e}");
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(file.len()? == len + 3 * PAGE, "the file has {} bytes", file.len()?);
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    drop(file);
    std::fs::remove_file(dir.join("file"))?;
    PASSED
}

/// Everything says that there is no space, and nothing changes.
fn full(file: &DaxFile, hole: &DaxFile) -> Outcome {
    let no_space = |what: &str, result: Result<(), DaxError>| -> Outcome {
        match result {
            Err(DaxError::Sys { errno: Errno::NOSPC, .. }) => Ok(()),
            other => Err(format!("{what}: {other:?}").into()),
        }
    };
    let big = vec![7; 2 << 20];
    no_space("append", file.append(&big).map(drop))?;
    // What could still be appended: a file system keeps a little back, which goes as well.
    while file.append(&[9; 4096]).is_ok() {}
    let len = file.len()?;
    no_space("append", file.append(&[1; 4096]).map(drop))?;
    ensure!(file.len()? == len, "a failed append has left {} bytes", file.len()? - len);
    no_space("allocate", file.allocate(len..len + (8 << 20)))?;
    let mut at = len;
    let written = loop {
        match file.write_at(&big, at) {
            Ok(n) if n == big.len() => at += n as u64,
            Ok(n) => at += n as u64,
            Err(e) => break Err(e),
        }
        ensure!(at < len + (1 << 30), "there is no end of space");
    };
    no_space("write_at", written)?;
    file.truncate(len)?;
    // Again none: what write_at took went back.
    while file.append(&[9; 4096]).is_ok() {}
    // Through a mapping: an error, not SIGBUS.
    let map = hole.map(0..2048 * PAGE)?;
    let mut failed = None;
    for page in 4..2048 {
        if let Err(e) = map.write(page * 4096, &[5; 4096]) {
            failed = Some(e);
            break;
        }
    }
    no_space("write through a mapping", failed.map_or(Ok(()), Err))?;
    let mut byte = [1];
    map.read(2047 * 4096, &mut byte)?;
    ensure!(byte == [0], "the hole is not empty");
    let mut whole = vec![0; 4 * 4096];
    map.read(0, &mut whole)?;
    pages::verify(&whole, 0, 1)?;
    // What is there can still be used, pinned and cut.
    drop(map.pin(0..4096, Pin::Short)?);
    let mut page = vec![0; 16 * 4096];
    file.read_at(&mut page, 0)?;
    pages::verify(&page, 0, 1)?;
    Ok(())
}

/// A file system whose file is open, mapped, pinned is busy, and is not any more when all that has gone.
fn unmount(place: &Place) -> Outcome<Verdict> {
    let at = place.path("mount");
    let mounted = match Mounted::bind(&place.path("inside"), at.clone())? {
        Ok(mounted) => mounted,
        Err(e) => return skipped(format!("nothing can be mounted: {e}")),
    };
    let unmount = || rustix::mount::unmount(&at, UnmountFlags::empty());
    let busy = |what: &str| -> Outcome {
        match unmount() {
            Err(Errno::BUSY) => Ok(()),
            other => Err(format!("unmounting while {what}: {other:?}").into()),
        }
    };
    {
        let file = place.options().create(at.join("file"))?;
        pages::write(&file, 0..16, 1)?;
        let map = file.map(pages::bytes(0..16))?;
        let pin = map.pin(0..4096, Pin::Short)?;
        drop(file);
        busy("a page is pinned")?;
        drop(map);
        busy("a page is pinned through a mapping that was dropped")?;
        // SAFETY: pinned.
        pages::verify(&unsafe { pages::copy(pin.as_ptr().ok_or("no address")?, 4096) }, 0, 1)?;
        drop(pin);
    }
    let gone = |what: &str| -> Outcome {
        let until = Instant::now() + Duration::from_secs(10);
        while let Err(e) = unmount() {
            ensure!(e == Errno::BUSY && Instant::now() < until, "unmounting after {what}: {e}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    };
    gone("the last pin has gone")?;
    drop(mounted);
    // And when it was held by a process that was killed.
    let Ok(_mounted) = Mounted::bind(&place.path("inside"), at.clone())? else {
        return Err("no second mount".into());
    };
    let mut peer = Peer::new(place)?;
    peer.ask("open mount/file")?;
    peer.ask("map 0 16")?;
    peer.ask("pin 0 4")?;
    busy("another process has it pinned")?;
    peer.kill()?;
    gone("the holder was killed")?;
    // It is all there.
    pages::verify(&pages::of_path(&place.path("inside/file"))?, 0, 1)?;
    PASSED
}
