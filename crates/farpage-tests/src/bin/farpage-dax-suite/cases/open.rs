//! Opening: what is DAX is opened, what is not is refused with the reason and the remedy.

use farpage::dax::{Access, DaxError, DaxFile, DaxOptions};
use farpage_tests::Verdict;

use super::{Case, PASSED, case};
use crate::place::{Expect, Place};
use crate::{Outcome, ensure, pages};

pub const CASES: &[Case] = &[case("open", open), case("open-not-a-file", not_a_file)];
/// For files in the page cache addresses are up to their file system.
pub const DAX: &[Case] = &[case("open-huge", huge)];
pub const REFUSED: &[Case] = &[case("refused", refused), case("refused-page-cache", accepted)];

fn open(place: &Place) -> Outcome<Verdict> {
    if place.expect == Expect::PageCache {
        refused(place)?;
        return accepted(place);
    }
    let file = place.options().create(place.path("file"))?;
    ensure!(file.access() == Access::Direct { map_sync: true }, "it is reached by {:?}", file.access());
    let again = DaxOptions::new().tables(&place.tables).page_cache(true).open(place.path("file"))?;
    ensure!(again.access() == file.access(), "accepting the page cache makes it {:?}", again.access());
    ensure!(file.users().len() == 1, "one process is {} users", file.users().len());
    // With nothing but defaults.
    let plain = DaxFile::create(place.path("plain"))?;
    plain.append(b"plain")?;
    ensure!(DaxFile::open(place.path("plain"))?.len()? == 5, "it is another file");
    PASSED
}

fn refused(place: &Place) -> Outcome<Verdict> {
    let error = match DaxOptions::new().tables(&place.tables).create(place.path("refused")) {
        Ok(file) => return Err(format!("it is opened, with {:?}", file.access()).into()),
        Err(e) => e,
    };
    let text = error.to_string();
    let remedy = match error {
        DaxError::NotDax { .. } => "-o dax=always",
        DaxError::BlockSize { block, .. } => {
            ensure!(block < 4096, "the blocks have {block} bytes");
            "mkfs.ext4 -b 4096"
        }
        _ => return Err(text.into()),
    };
    ensure!(text.contains(remedy), "it does not tell how: {text}");
    let left = std::fs::read_dir(&place.tables)?.count();
    ensure!(left == 0, "a table stays behind");
    PASSED
}

fn accepted(place: &Place) -> Outcome<Verdict> {
    let file = DaxOptions::new().tables(&place.tables).page_cache(true).create(place.path("accepted"))?;
    ensure!(file.access() == Access::PageCache, "it is reached by {:?}", file.access());
    pages::write(&file, 0..8, 1)?;
    let map = file.map(pages::bytes(2..8))?;
    // SAFETY: the mapping lives.
    pages::verify(&unsafe { pages::copy(map.as_ptr(), map.len()) }, 2, 1)?;
    PASSED
}

fn not_a_file(place: &Place) -> Outcome<Verdict> {
    for path in [place.dir.as_path(), std::path::Path::new("/dev/null")] {
        match place.options().open(path) {
            Err(DaxError::NotAFile { .. }) => {}
            other => return Err(format!("{}: {other:?}", path.display()).into()),
        }
    }
    match place.options().open(place.path("none")) {
        Err(DaxError::Sys { what: "open", .. }) => PASSED,
        other => Err(format!("a file that is not there: {other:?}").into()),
    }
}

/// A mapping lies as the file does, so that huge pages can be used; under DAX the kernel says whether it does.
fn huge(place: &Place) -> Outcome<Verdict> {
    const HUGE: u64 = 2 << 20;
    let file = place.options().create(place.path("file"))?;
    file.allocate(0..4 * HUGE)?;
    for start in [0, HUGE, HUGE / 2] {
        let map = file.map(start..start + 2 * HUGE)?;
        let at = map.as_ptr() as u64;
        ensure!(at % HUGE == start % HUGE, "{start:#x} is mapped at {at:#x}");
    }
    PASSED
}
