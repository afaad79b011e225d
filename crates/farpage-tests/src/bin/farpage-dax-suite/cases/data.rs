//! Bytes: written and read in every way, by two processes, and never by way of the page cache where the file is DAX.

use farpage::Pin;
use farpage::dax::{Change, DaxError, DaxFile};
use farpage_tests::Verdict;
use rustix::mm::{MapFlags, ProtFlags};

use super::{Case, PASSED, case};
use crate::pages::{self, Held, PAGE};
use crate::peer::Peer;
use crate::place::{Expect, Place, long, soon};
use crate::{Outcome, ensure};

pub const CASES: &[Case] =
    &[case("read-write-flush", read_write), case("read-only", read_only), case("page-cache-bypass", bypass)];

fn read_write(place: &Place) -> Outcome<Verdict> {
    let file = place.file(64)?;
    let mut peer = Peer::with_file(place)?;
    let map = file.map(pages::bytes(0..64))?;
    let other = peer.ask("map 0 64")?;
    peer.ask(&format!("verify {other} 0 1"))?;
    // Through the mapping's address, through the mapping's calls, through the file's.
    for page in 0..64 {
        let (bytes, at) = (pages::fill(page, 2), (page * PAGE) as usize);
        match page % 3 {
            // SAFETY: inside the mapping, which nobody cuts.
            0 => unsafe { map.as_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) },
            1 => map.write(at, &bytes)?,
            _ => drop(file.write_at(&bytes, page * PAGE)?),
        }
    }
    peer.ask(&format!("verify {other} 0 2"))?;
    map.flush(0..map.len())?;
    map.flush(100..5000)?;
    file.flush(pages::bytes(0..64))?;
    // By way of no farpage at all.
    pages::verify(&pages::of_path(file.path())?, 0, 2)?;
    let at = file.append(&pages::fill(64, 2))?;
    ensure!(at == 64 * PAGE && file.len()? == 65 * PAGE, "appended at {at}");
    let tail = peer.ask("map 60 65")?;
    peer.ask(&format!("verify {tail} 60 2"))?;
    peer.ask("fill 65 80 2")?;
    let mut page = [0; PAGE as usize];
    ensure!(file.read_at(&mut page, 79 * PAGE)? == page.len(), "it is not there");
    pages::verify(&page, 79, 2)?;
    ensure!(file.read_at(&mut page, 80 * PAGE)? == 0, "more is read than there is");
    ensure!(file.audit().is_empty(), "{:?}", file.audit());
    PASSED
}

/// A handle that may not write counts, sees and waits as any other; what it has mapped is mapped again after a cut, to read.
fn read_only(place: &Place) -> Outcome<Verdict> {
    let file = place.file(16)?;
    let only = place.options().read_only(true).open(file.path())?;
    ensure!(only.access() == file.access(), "{:?} to read, {:?} to write", only.access(), file.access());
    let map = only.map(pages::bytes(0..16))?;
    let protection = || -> Outcome<String> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let at = format!("{:x}-", map.as_ptr() as usize);
        let line = maps.lines().find(|line| line.starts_with(&at)).ok_or("it is not mapped")?;
        Ok(line.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    ensure!(protection()? == "r--s", "mapped as {}", protection()?);
    let pin = map.pin(0..PAGE as usize, Pin::Short)?;
    let cut = file.change(Change::PunchHole(pages::bytes(0..1)), &soon());
    ensure!(matches!(cut, Err(DaxError::Held { .. })), "cut under a pin: {cut:?}");
    drop(pin);
    file.change(Change::PunchHole(pages::bytes(0..1)), &long())?;
    // SAFETY: inside the mapping; of what is there again only the kernel is asked for longer than it takes.
    let page = unsafe { pages::copy(map.as_ptr(), PAGE as usize) };
    ensure!(pages::look(&page)? == Held::Zeros, "the hole is not seen");
    ensure!(protection()? == "r--s", "mapped again as {}", protection()?);
    let refused = [
        only.write_at(&[1], 0).err(),
        only.append(&[1]).err(),
        only.allocate(0..PAGE).err(),
        only.truncate(0).err(),
        map.write(0, &[1]).err(),
    ];
    for error in refused {
        ensure!(matches!(error, Some(DaxError::ReadOnly { .. })), "{error:?}");
    }
    map.flush(0..map.len())?;
    only.flush(0..PAGE)?;
    ensure!(file.len()? == 16 * PAGE && file.audit().is_empty(), "{} {:?}", file.len()?, file.audit());
    PASSED
}

/// How many pages of a fresh mapping of the file are in memory before anybody touches them: those of the page cache.
fn resident(file: &DaxFile, len: usize) -> Outcome<usize> {
    // SAFETY: a mapping of its own, of which only the kernel is asked.
    unsafe {
        let at =
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file.as_fd(), 0)?;
        let mut pages = vec![0u8; len / PAGE as usize];
        let r = libc::mincore(at, len, pages.as_mut_ptr());
        rustix::mm::munmap(at, len)?;
        ensure!(r == 0, "mincore: {}", std::io::Error::last_os_error());
        Ok(pages.iter().filter(|page| **page & 1 != 0).count())
    }
}

/// `Cached` of /proc/meminfo, in bytes.
fn cached() -> Outcome<i64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("Cached:")).ok_or("no Cached in meminfo")?;
    let kib: i64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// The physical page at a mapped address; 0 where the kernel does not tell.
fn frame_at(at: usize) -> Outcome<u64> {
    use std::os::unix::fs::FileExt;
    let mut entry = [0; 8];
    std::fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at as u64 / PAGE * 8)?;
    let entry = u64::from_le_bytes(entry);
    ensure!(entry >> 63 == 1, "the page is not mapped");
    Ok(entry & ((1 << 55) - 1))
}

/// What /proc/iomem calls the memory of this physical page: the innermost range that holds it.
fn memory_of(frame: u64) -> Outcome<String> {
    let text = std::fs::read_to_string("/proc/iomem")?;
    let mut found = "nothing".to_owned();
    for line in text.lines() {
        let Some((range, name)) = line.trim().split_once(" : ") else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        if (start..=end).contains(&(frame * PAGE)) {
            name.clone_into(&mut found);
            if name == "Persistent Memory" || name == "System RAM" {
                break;
            }
        }
    }
    Ok(found)
}

/// 64 MiB are written and read in every way. Under DAX none of it is in the page cache; elsewhere all of it is, so that
/// this can be seen.
fn bypass(place: &Place) -> Outcome<Verdict> {
    const PAGES: u64 = (64 << 20) / PAGE;
    let len = (PAGES * PAGE) as usize;
    let direct = place.expect == Expect::Dax;
    // A file by name of its own: the one that is counted has no pages in memory yet.
    let before = cached()?;
    let file = place.file(PAGES)?;
    let map = file.map(pages::bytes(0..PAGES))?;
    // SAFETY: the mapping lives.
    pages::verify(&unsafe { pages::copy(map.as_ptr(), len) }, 0, 1)?;
    for page in (0..PAGES).step_by(2) {
        map.write((page * PAGE) as usize, &pages::fill(page, 1))?;
    }
    map.flush(0..len)?;
    let mut page = vec![0; 1 << 20];
    for at in (0..len).step_by(page.len()) {
        file.read_at(&mut page, at as u64)?;
        pages::verify(&page, at as u64 / PAGE, 1)?;
    }
    let after = cached()?;
    let resident = resident(&file, len)? as u64;
    let frame = frame_at(map.as_ptr() as usize)?;
    if direct {
        ensure!(resident == 0, "{resident} of {PAGES} pages are in the page cache");
        ensure!(after - before < 16 << 20, "Cached has grown from {before} to {after} bytes");
    } else {
        ensure!(resident == PAGES, "only {resident} of {PAGES} pages are in the page cache");
    }
    if frame != 0 {
        let memory = memory_of(frame)?;
        let wanted = if direct { "Persistent Memory" } else { "System RAM" };
        ensure!(memory == wanted, "the pages are in {memory}, not in {wanted}");
    }
    PASSED
}
