//! DAX files in one process, on the page cache: what a file needs of the kernel to be DAX is tried in a virtual machine
//! (docs/dax-vm.md), by the same suite (`farpage-dax-suite`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{Access, Change, DaxError, DaxFile, DaxOptions, Wait};

const PAGE: u64 = 4096;

fn soon() -> Wait<'static> {
    Wait { timeout: Duration::from_millis(60), stop: None }
}

fn file(pages: u64) -> (tempfile::TempDir, DaxFile) {
    let dir = tempfile::tempdir().unwrap();
    let options = DaxOptions::new().page_cache(true).tables(dir.path()).wait(Duration::from_secs(5));
    let file = options.create(dir.path().join("file")).unwrap();
    let bytes: Vec<u8> = (0..pages * PAGE).map(|i| ((i / PAGE) as u8).wrapping_add(1)).collect();
    assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
    (dir, file)
}

/// The tables that are there; those of files that were just closed go in a moment (their agents may be at something).
fn tables(dir: &tempfile::TempDir) -> usize {
    let count = || {
        let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with("farpage-dax-")).count()
    };
    let until = Instant::now() + Duration::from_secs(2);
    while count() > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    count()
}

#[test]
fn an_ordinary_file_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let options = DaxOptions::new().tables(dir.path());
    let error = options.create(dir.path().join("file")).unwrap_err().to_string();
    assert!(error.contains("STATX_ATTR_DAX") && error.contains("dax=always"), "{error}");
    assert_eq!(tables(&dir), 0, "nothing stays behind");
    let error = options.open(dir.path()).unwrap_err();
    assert!(matches!(error, DaxError::NotAFile { .. }), "{error}");
    let error = options.open(dir.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("cannot open") && error.contains("No such file"), "{error}");
}

#[test]
fn mappings_read_and_write_the_file() {
    let (dir, file) = file(8);
    assert_eq!((file.access(), file.len().unwrap()), (Access::PageCache, 8 * PAGE));
    let map = file.map(PAGE..4 * PAGE).unwrap();
    assert_eq!((map.len(), map.range()), (3 * 4096, PAGE..4 * PAGE));
    // SAFETY: inside the mapping.
    assert_eq!(unsafe { (*map.as_ptr(), *map.as_ptr().add(2 * 4096)) }, (2, 4));
    map.write(4095, &[77, 78]).unwrap();
    let mut two = [0; 2];
    map.read(4095, &mut two).unwrap();
    assert_eq!(two, [77, 78]);
    file.read_at(&mut two, 2 * PAGE - 1).unwrap();
    assert_eq!(two, [77, 78]);
    map.flush(0..map.len()).unwrap();
    map.flush(100..200).unwrap();
    file.flush(0..8 * PAGE).unwrap();
    assert_eq!(file.append(b"end").unwrap(), 8 * PAGE);
    assert_eq!(file.len().unwrap(), 8 * PAGE + 3);
    assert_eq!(file.map(8 * PAGE..8 * PAGE + 3).unwrap().len(), 4096);
    let users = file.users();
    assert_eq!(users.len(), 1);
    assert_eq!((users[0].pid, users[0].holds.len()), (std::process::id(), 1));
    assert_eq!(users[0].to_string().split(" has ").nth(1), Some("a mapping of 0x1000..0x4000"));
    assert!(file.audit().is_empty());
    for wrong in [1..PAGE, PAGE..PAGE, PAGE..10 * PAGE] {
        assert!(matches!(file.map(wrong), Err(DaxError::Range { .. })));
    }
    assert!(matches!(map.read(3 * 4096 - 1, &mut two), Err(DaxError::Range { .. })));
    drop(map);
    assert!(file.users()[0].holds.is_empty());
    drop(file);
    assert_eq!(tables(&dir), 0, "the last user takes the table along");
}

#[test]
fn a_pin_holds_off_what_cuts_its_pages_and_nothing_else() {
    let (_dir, file) = file(16);
    let pin = file.pin(4 * PAGE + 7..6 * PAGE, Pin::Short).unwrap();
    assert_eq!(pin.range(), 4 * PAGE..6 * PAGE);
    for change in [
        Change::Truncate(0),
        Change::Truncate(6 * PAGE - 5000),
        Change::PunchHole(0..5 * PAGE),
        Change::PunchHole(5 * PAGE..8 * PAGE),
        Change::ZeroRange(4 * PAGE..5 * PAGE),
        Change::CollapseRange(0..PAGE),
    ] {
        let error = file.change(change.clone(), &soon()).unwrap_err();
        let DaxError::Held { users, .. } = &error else { panic!("{change:?}: {error}") };
        assert_eq!(users[0].pid, std::process::id());
        assert!(error.to_string().contains("a pin of 0x"), "{error}");
        assert_eq!(file.len().unwrap(), 16 * PAGE);
    }
    // What is outside goes on.
    file.change(Change::PunchHole(0..4 * PAGE), &soon()).unwrap();
    file.change(Change::PunchHole(6 * PAGE..7 * PAGE), &soon()).unwrap();
    file.change(Change::Truncate(6 * PAGE), &soon()).unwrap();
    let mut bytes = [9; 2 * 4096];
    file.read_at(&mut bytes, 3 * PAGE).unwrap();
    assert_eq!((bytes[0], bytes[4096]), (0, 5));
    drop(pin);
    file.change(Change::Truncate(0), &soon()).unwrap();
    assert!(file.audit().is_empty());
}

/// A file system may free the block of the last page when all that the file has of it goes, though the range ends inside
/// that page: ext4 does.
#[test]
fn the_last_page_goes_with_all_that_the_file_has_of_it() {
    // Where blocks are freed, if there is such a place.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = DaxOptions::new().page_cache(true).tables(dir.path());
    let file = options.create(dir.path().join("file")).unwrap();
    file.write_at(&[1; 5000], 0).unwrap();
    file.flush(0..5000).unwrap();
    let blocks = || rustix::fs::fstat(file.as_fd()).unwrap().st_blocks;
    let before = blocks();
    let pin = file.pin(PAGE..5000, Pin::Short).unwrap();
    for end in [5000, 5001, 8000, 8192] {
        for change in [Change::PunchHole(PAGE..end), Change::ZeroRange(PAGE..end)] {
            let error = file.change(change.clone(), &soon()).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.contains("a pin of 0x")), "{change:?}: {error:?}");
            assert_eq!(blocks(), before);
        }
    }
    // Some of it stays: then the page does, too.
    file.change(Change::PunchHole(PAGE..4999), &soon()).unwrap();
    assert_eq!(blocks(), before);
    let mut bytes = [9; 5000];
    file.read_at(&mut bytes, 0).unwrap();
    assert_eq!((bytes[4095], bytes[4096], bytes[4998], bytes[4999]), (1, 0, 0, 1));
    drop(pin);
    file.change(Change::PunchHole(PAGE..5000), &soon()).unwrap();
    assert_eq!(file.len().unwrap(), 5000);
}

#[test]
fn who_waits_goes_on_when_the_pin_goes() {
    let (_dir, file) = file(4);
    let pin = file.pin(0..PAGE, Pin::Short).unwrap();
    let other = file.clone();
    let cutting = std::thread::spawn(move || other.truncate(0));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(file.len().unwrap(), 4 * PAGE);
    // New references wait for the cut, and find that there is nothing any more.
    let other = file.clone();
    let late = std::thread::spawn(move || other.pin(0..PAGE, Pin::Short).map(drop));
    std::thread::sleep(Duration::from_millis(20));
    let began = Instant::now();
    drop(pin);
    cutting.join().unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
    let late = late.join().unwrap();
    assert!(matches!(late, Ok(()) | Err(DaxError::Range { .. })), "{late:?}");
    assert_eq!(file.len().unwrap(), 0);
    assert!(file.audit().is_empty());
}

#[test]
fn a_wait_can_be_interrupted() {
    let (_dir, file) = file(4);
    let _pin = file.pin(0..PAGE, Pin::Short).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let wait = Wait { timeout: Duration::from_secs(60), stop: Some(&stop) };
        let file = &file;
        let cutting = scope.spawn(move || file.change(Change::Truncate(0), &wait));
        std::thread::sleep(Duration::from_millis(30));
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(cutting.join().unwrap(), Err(DaxError::Interrupted { .. })));
    });
    assert_eq!(file.len().unwrap(), 4 * PAGE);
    file.pin(0..4 * PAGE, Pin::Short).unwrap();
}

#[test]
fn mappings_lose_what_is_cut_and_get_it_back() {
    let (_dir, file) = file(64);
    let map = file.map(0..64 * PAGE).unwrap();
    // SAFETY: inside the mapping.
    let at = |page: usize| unsafe { map.as_ptr().add(page * 4096).read_volatile() };
    file.punch_hole(10 * PAGE..20 * PAGE).unwrap();
    assert_eq!((at(9), at(10), at(19), at(20)), (10, 0, 0, 21), "the hole is mapped again, as zeros");
    for page in 30..60 {
        file.punch_hole(page * PAGE..(page + 1) * PAGE).unwrap();
    }
    assert_eq!((at(29), at(30), at(59), at(60)), (30, 0, 0, 61));
    file.truncate(5 * PAGE).unwrap();
    assert_eq!(at(4), 5);
    let mut byte = [0];
    assert!(matches!(map.read(5 * 4096, &mut byte), Err(DaxError::Cut { .. })));
    assert!(matches!(map.write(5 * 4096, &byte), Err(DaxError::Cut { .. })));
    assert!(matches!(map.pin(5 * 4096..6 * 4096, Pin::Short), Err(DaxError::Cut { .. })));
    assert!(matches!(map.flush(5 * 4096..6 * 4096), Err(DaxError::Cut { .. })));
    assert_eq!(file.len().unwrap(), 5 * PAGE, "a write to what is gone does not bring it back");
    // It grows again.
    file.truncate(64 * PAGE).unwrap();
    assert_eq!((at(4), at(5), at(63)), (5, 0, 0));
    map.write(63 * 4096, &[3]).unwrap();
    assert_eq!(at(63), 3);
    let until = Instant::now() + Duration::from_secs(2);
    while file.users()[0].holds[0].range != (0..64 * PAGE) && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(file.users()[0].holds.len(), 1);
    assert!(file.audit().is_empty());
}

/// What was cut off and came back without farpage is written back like all else, not the nothing that lay there.
#[test]
fn a_flush_is_of_the_file() {
    let (dir, file) = file(8);
    let map = file.map(0..8 * PAGE).unwrap();
    let lies_there = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let at = map.as_ptr() as usize + 5 * 4096;
        let line = maps.lines().find(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |s| usize::from_str_radix(s, 16).unwrap();
            (number(start)..number(end)).contains(&at)
        });
        line.unwrap().to_owned()
    };
    file.truncate(5 * PAGE).unwrap();
    assert!(lies_there().contains("nothing"), "{}", lies_there());
    std::fs::File::options().write(true).open(file.path()).unwrap().set_len(8 * PAGE).unwrap();
    map.write(5 * 4096, &[3; 4096]).unwrap();
    map.flush(5 * 4096..6 * 4096).unwrap();
    assert!(lies_there().contains(dir.path().to_str().unwrap()), "{}", lies_there());
    // SAFETY: inside the mapping.
    assert_eq!(unsafe { map.as_ptr().add(5 * 4096).read_volatile() }, 3);
    drop(map);
    assert!(file.audit().is_empty() && file.users()[0].holds.is_empty());
}

/// Opening a file ends leases of it, also those of the process that opens.
#[test]
fn a_file_of_which_pages_are_pinned_is_opened_again() {
    let (dir, file) = file(8);
    let options = DaxOptions::new().page_cache(true).tables(dir.path());
    for _ in 0..3 {
        let _pin = file.pin(0..PAGE, Pin::Short).unwrap();
        let began = Instant::now();
        let again = options.open(file.path()).unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
        let error = again.change(Change::Truncate(0), &soon()).unwrap_err();
        assert!(error.to_string().contains("a pin of 0x0..0x1000"), "{error}");
    }
    // Pins come and go meanwhile, and each is one for which a lease may be taken.
    let done = AtomicBool::new(false);
    let longest = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                drop(file.pin(0..PAGE, Pin::Short).unwrap());
            }
        });
        let longest = (0..100).map(|_| {
            let began = Instant::now();
            drop(options.open(file.path()).unwrap());
            began.elapsed()
        });
        let longest = longest.max();
        done.store(true, Ordering::Relaxed);
        longest.unwrap()
    });
    assert!(longest < Duration::from_secs(5), "it took {longest:?}");
}

#[test]
fn a_pinned_address_stays_and_its_mapping_with_it() {
    let (_dir, file) = file(8);
    let map = file.map(0..8 * PAGE).unwrap();
    let pin = map.pin(4096 + 5..2 * 4096, Pin::Short).unwrap();
    let at = pin.as_ptr().unwrap();
    assert_eq!(at as usize, map.as_ptr() as usize + 4096 + 5);
    drop(map);
    assert!(file.change(Change::PunchHole(0..8 * PAGE), &soon()).is_err());
    // SAFETY: pinned.
    assert_eq!(unsafe { at.read() }, 2);
    drop(pin);
    file.punch_hole(0..8 * PAGE).unwrap();
    assert!(file.users()[0].holds.is_empty());
}

#[test]
fn long_pins_need_somebody_who_gives_them_up() {
    let (dir, file) = file(8);
    let error = file.pin(0..PAGE, Pin::LongTerm).unwrap_err();
    assert!(matches!(error, DaxError::LongTerm { .. }));
    assert!(error.to_string().contains("on_revoke"), "{error}");

    let held = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let (give_up, note) = (held.clone(), asked.clone());
    let options = DaxOptions::new().page_cache(true).tables(dir.path()).on_revoke(move |range| {
        note.lock().unwrap().push(range);
        give_up.lock().unwrap().clear();
    });
    let leased = options.open(dir.path().join("file")).unwrap();
    held.lock().unwrap().push(leased.pin(PAGE..3 * PAGE, Pin::LongTerm).unwrap());
    file.change(Change::PunchHole(4 * PAGE..5 * PAGE), &soon()).unwrap();
    assert!(asked.lock().unwrap().is_empty(), "not in the way");
    file.truncate(2 * PAGE).unwrap();
    assert_eq!(*asked.lock().unwrap(), vec![2 * PAGE..3 * PAGE; 1]);
}

/// Each of two who want pages at once has their owner asked once.
#[test]
fn who_is_asked_to_give_up_is_asked_once_for_each_change() {
    let (dir, file) = file(8);
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let note = asked.clone();
    let options = DaxOptions::new()
        .page_cache(true)
        .tables(dir.path())
        .on_revoke(move |range| note.lock().unwrap().push(range));
    let asker = options.open(file.path()).unwrap();
    let _pin = asker.pin(0..4 * PAGE, Pin::LongTerm).unwrap();
    let wait = Wait { timeout: Duration::from_millis(600), stop: None };
    std::thread::scope(|scope| {
        for page in [1, 3] {
            let (file, wait) = (&file, &wait);
            scope.spawn(move || {
                let cut = Change::PunchHole(page * PAGE..(page + 1) * PAGE);
                assert!(matches!(file.change(cut, wait), Err(DaxError::Held { .. })));
            });
        }
        // The agent looks at every change of anything.
        for _ in 0..20 {
            drop(file.map(6 * PAGE..7 * PAGE).unwrap());
            file.punch_hole(5 * PAGE..6 * PAGE).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut asked = asked.lock().unwrap();
    asked.sort_by_key(|range| range.start);
    assert_eq!(*asked, [PAGE..2 * PAGE, 3 * PAGE..4 * PAGE]);
}

/// There are counts for 8 TiB: also of a file of more than half of that.
#[test]
fn a_large_file_is_opened() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let options = DaxOptions::new().page_cache(true).tables(dir.path());
    let path = dir.path().join("file");
    let sparse = std::fs::File::create_new(&path).unwrap();
    sparse.set_len(5 << 40).unwrap();
    let file = options.open(&path).unwrap();
    let end = 5 << 40;
    let map = file.map(end - 3 * PAGE..end).unwrap();
    map.write(4096, &[7]).unwrap();
    assert!(matches!(file.change(Change::Truncate(0), &soon()), Ok(())));
    drop((map, file));
    sparse.set_len((8 << 40) + 1).unwrap();
    let error = options.open(&path).unwrap_err();
    assert!(matches!(error, DaxError::TooLarge { .. }), "{error}");
}

#[test]
fn closing_waits_for_what_was_made_through_the_handle() {
    let (_dir, file) = file(8);
    let map = file.map(0..PAGE).unwrap();
    let error = file.close(&soon()).unwrap_err();
    assert!(error.to_string().contains("a mapping of 0x0..0x1000"), "{error}");
    let file = error.file;
    file.map(0..PAGE).unwrap();
    let clone = file.clone();
    let closing =
        std::thread::spawn(move || file.close(&Wait { timeout: Duration::from_secs(5), stop: None }).is_ok());
    std::thread::sleep(Duration::from_millis(30));
    assert!(matches!(clone.map(0..PAGE), Err(DaxError::Closed { .. })));
    drop(map);
    assert!(closing.join().unwrap());
}

#[test]
fn handles_of_one_process_share_one_table() {
    let (dir, file) = file(8);
    let again = DaxOptions::new().page_cache(true).tables(dir.path()).open(dir.path().join("file")).unwrap();
    let names = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("farpage-dax-")).count(), 1);
    let _pin = again.pin(0..PAGE, Pin::Short).unwrap();
    assert!(file.change(Change::Truncate(0), &soon()).is_err());
    assert_eq!(file.users().len(), 1);
}

/// Whole huge pages have one count, their pages have others: whoever holds either is in the way of who cuts either.
#[test]
fn huge_pages_and_their_pages() {
    let (_dir, file) = file(2100);
    let held = |file: &DaxFile| -> Vec<(u64, u64)> {
        file.users()[0].holds.iter().map(|h| (h.range.start / PAGE, h.range.end / PAGE)).collect()
    };
    let map = file.map(10 * PAGE..2090 * PAGE).unwrap();
    assert_eq!(held(&file), [(10, 2090)], "however many counts it takes");
    // SAFETY: inside the mapping.
    let at = |page: usize| unsafe { map.as_ptr().add((page - 10) * 4096).read_volatile() };

    let huge = file.pin(512 * PAGE..1024 * PAGE, Pin::Short).unwrap();
    for cut in [512..513, 600..700, 1023..1024, 0..2100] {
        let error = file.change(Change::PunchHole(cut.start * PAGE..cut.end * PAGE), &soon()).unwrap_err();
        assert!(error.to_string().contains("a pin of 0x"), "{error}");
    }
    file.change(Change::PunchHole(511 * PAGE..512 * PAGE), &soon()).unwrap();
    file.change(Change::PunchHole(1024 * PAGE..1025 * PAGE), &soon()).unwrap();
    drop(huge);
    let small = file.pin(700 * PAGE..701 * PAGE, Pin::Short).unwrap();
    assert!(file.change(Change::PunchHole(512 * PAGE..1024 * PAGE), &soon()).is_err());
    file.change(Change::PunchHole(600 * PAGE..700 * PAGE), &soon()).unwrap();
    drop(small);

    file.change(Change::Truncate(1500 * PAGE), &soon()).unwrap();
    assert_eq!((at(599), at(600), at(699), at(700)), (600u32 as u8, 0, 0, 701u32 as u8));
    assert_eq!(held(&file), [(10, 1500)]);
    file.change(Change::Truncate(2100 * PAGE), &soon()).unwrap();
    assert_eq!((at(1499), at(1500)), (1500u32 as u8, 0));
    drop(map);
    assert!(held(&file).is_empty() && file.audit().is_empty());
}

/// Threads that touch, pin, map, cut and grow for a while; what a page holds is its number or zeros.
#[test]
fn everything_at_once() {
    for (pages, longest) in [(64, 16), (1400, 1200)] {
        at_once(pages, longest);
    }
}

fn at_once(pages: u64, longest: u64) {
    let (_dir, file) = file(2 * pages + longest);
    let until = Instant::now() + Duration::from_secs(2);
    let going = || Instant::now() < until;
    std::thread::scope(|scope| {
        for seed in 0..2u64 {
            let file = &file;
            scope.spawn(move || {
                let mut n = seed + 1;
                while going() {
                    n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (page, len) = ((n >> 33) % pages, 1 + (n >> 50) % longest);
                    let Ok(map) = file.map(page * PAGE..(page + len) * PAGE) else { continue };
                    let Ok(pin) = map.pin(0..map.len(), Pin::Short) else { continue };
                    for i in 0..len {
                        // SAFETY: pinned.
                        let byte =
                            unsafe { pin.as_ptr().unwrap().add((i * PAGE) as usize + 100).read_volatile() };
                        assert!(
                            byte == 0 || byte == ((page + i) as u8).wrapping_add(1),
                            "page {} holds {byte}",
                            page + i
                        );
                    }
                }
            });
        }
        let file = &file;
        scope.spawn(move || {
            let map = file.map(0..pages * PAGE).unwrap();
            let mut n = 1u64;
            while going() {
                n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let page = (n >> 33) % pages;
                // SAFETY: the first pages are punched and filled, but always there.
                let byte = unsafe { map.as_ptr().add((page * PAGE) as usize + 100).read_volatile() };
                assert!(byte == 0 || byte == (page as u8).wrapping_add(1), "page {page} holds {byte}");
            }
        });
        let mut n = 7u64;
        while going() {
            n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (page, len) = ((n >> 33) % pages, 1 + (n >> 50) % (longest / 2));
            if n >> 60 < 2 {
                file.truncate((pages + page) * PAGE).unwrap();
            } else {
                file.punch_hole(page * PAGE..(page + len) * PAGE).unwrap();
                let bytes: Vec<u8> =
                    (page..page + len).flat_map(|p| [(p as u8).wrapping_add(1); 4096]).collect();
                file.write_at(&bytes, page * PAGE).unwrap();
            }
        }
    });
    assert!(file.audit().is_empty());
    assert!(file.users()[0].holds.is_empty());
}
