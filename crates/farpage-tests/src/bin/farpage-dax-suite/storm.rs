//! What helper processes do at random, for a while or until they are killed.

use std::time::{Duration, Instant};

use farpage::Pin;
use farpage::dax::{DaxError, DaxFile};
use farpage_tests::Rng;

use crate::pages::{self, Held, PAGE};
use crate::place::Place;
use crate::{Outcome, ensure};

/// Pages of the file that are there at all times.
pub const FIRM: u64 = 32;
/// Pages that come and go.
pub const ALL: u64 = 256;

/// Until it is killed.
pub fn run(place: &Place, kind: &str, seed: u64) -> Outcome<String> {
    let mut rng = Rng::new(seed);
    let open = || place.options().open(place.path("file"));
    let file = open()?;
    loop {
        let kind =
            if kind == "all" { ["open", "map", "pin", "cut", "append"][rng.below(5) as usize] } else { kind };
        match kind {
            "open" => {
                // The first handle keeps the table; so does it not, for a while.
                drop(open()?);
            }
            "reopen" => return reopen(place),
            "map" => drop(file.map(any(&mut rng))?),
            "pin" => {
                let _a = file.pin(any(&mut rng), Pin::Short)?;
                let _b = file.pin(any(&mut rng), Pin::Short)?;
            }
            "cut" => file.punch_hole(any(&mut rng))?,
            "append" => {
                file.append(&pages::fill(rng.draw() >> 40, 9))?;
                file.truncate(FIRM * PAGE)?;
            }
            "grow" => {
                let _at = file.append(&[7; 1 << 20])?;
            }
            kind => return Err(format!("no storm is called {kind}").into()),
        }
    }
}

/// Opens and closes, with nothing else open in between.
fn reopen(place: &Place) -> Outcome<String> {
    loop {
        drop(place.options().open(place.path("file"))?);
    }
}

/// Some of the pages that are always there.
fn any(rng: &mut Rng) -> std::ops::Range<u64> {
    let start = rng.below(FIRM);
    pages::bytes(start..start + 1 + rng.below(FIRM - start))
}

/// For `seconds`; says how often it did what it does.
pub fn race(place: &Place, kind: &str, seed: u64) -> Outcome<String> {
    let until = Instant::now() + Duration::from_secs(place.seconds);
    let file = place.options().open(place.path("file"))?;
    let mut rng = Rng::new(seed);
    let (mut done, mut pages) = (0u64, 0);
    while Instant::now() < until {
        match kind {
            "read" => pages += read(&file, &mut rng)?,
            "cut" => cut(&file, &mut rng)?,
            "map" => pages += map(&file, &mut rng)?,
            "touch" => pages += touch(&file, &mut rng)?,
            "punch" => {
                let start = rng.below(FIRM);
                let holes = start..start + 1 + rng.below(FIRM - start);
                file.punch_hole(pages::bytes(holes.clone()))?;
                pages::write(&file, holes, 1)?;
                // What is beyond comes and goes.
                file.truncate((FIRM + rng.below(8)) * PAGE)?;
            }
            "truncate" => {
                file.truncate(rng.below(ALL) * PAGE)?;
                file.truncate(ALL * PAGE)?;
            }
            "open" => drop(place.options().open(place.path("file"))?),
            kind => return Err(format!("no race is called {kind}").into()),
        }
        done += 1;
    }
    if matches!(kind, "read" | "map" | "touch") {
        ensure!(pages > 0, "in {done} rounds no page was seen");
    }
    Ok(format!("{done}"))
}

/// Pins some pages through a mapping, and looks at them twice: each is whole, or zeros, and stays what it is.
fn read(file: &DaxFile, rng: &mut Rng) -> Outcome<u64> {
    let start = rng.below(ALL - 1);
    let pages = start..start + 1 + rng.below(15);
    let map = match file.map(pages::bytes(pages.clone())) {
        Ok(map) => map,
        Err(DaxError::Range { .. }) => return Ok(0),
        Err(e) => return Err(e.into()),
    };
    let pin = match map.pin(0..map.len(), Pin::Short) {
        Ok(pin) => pin,
        Err(DaxError::Range { .. } | DaxError::Cut { .. }) => return Ok(0),
        Err(e) => return Err(e.into()),
    };
    let at = pin.as_ptr().ok_or("the pin has no address")?;
    // SAFETY: pinned.
    let first = unsafe { pages::copy(at, map.len()) };
    for (i, page) in first.chunks(PAGE as usize).enumerate() {
        match pages::look(page)? {
            Held::Zeros => {}
            Held::Page(number, _) => {
                ensure!(number == pages.start + i as u64, "page {number} lies at {}", pages.start + i as u64);
            }
        }
    }
    std::thread::sleep(Duration::from_micros(rng.below(800)));
    // SAFETY: pinned.
    let again = unsafe { pages::copy(at, map.len()) };
    ensure!(first == again, "pinned pages {pages:?} have changed");
    Ok(pages.end - pages.start)
}

/// Cuts the file short or punches a hole, and appends pages of a new generation where it ends now.
fn cut(file: &DaxFile, rng: &mut Rng) -> Outcome {
    let generation = 2 + (rng.draw() >> 34);
    if rng.below(3) == 0 {
        let start = rng.below(ALL / 2);
        return Ok(file.punch_hole(pages::bytes(start..start + 1 + rng.below(20)))?);
    }
    file.truncate(rng.below(ALL) * PAGE)?;
    loop {
        let len = file.len()?;
        ensure!(len % PAGE == 0, "the file has {len} bytes");
        if len >= ALL * PAGE {
            return Ok(());
        }
        file.append(&pages::fill(len / PAGE, generation))?;
    }
}

/// Plain loads and stores, without a pin, of pages that are always there, though they are cut and come back: none
/// raises SIGBUS, and none reaches another page.
fn touch(file: &DaxFile, rng: &mut Rng) -> Outcome<u64> {
    const TOUCHES: u64 = 2000;
    const SCRATCH: usize = PAGE as usize - 8;
    let map = file.map(0..FIRM * PAGE)?;
    for i in 0..TOUCHES {
        let page = rng.below(FIRM);
        // SAFETY: inside the mapping.
        let (mark, number) = unsafe {
            let at = map.as_ptr().add((page * PAGE) as usize);
            if i % 4 == 0 {
                at.add(SCRATCH).cast::<u64>().write_volatile(i);
            }
            (at.cast::<u64>().read_volatile(), at.cast::<u64>().add(1).read_volatile())
        };
        // A system call that writes meanwhile may copy byte by byte: what is seen is old or new for each byte only.
        let whole =
            mark.to_ne_bytes().into_iter().zip(pages::MARK.to_ne_bytes()).all(|(b, m)| b == 0 || b == m);
        ensure!(whole, "page {page} begins with {mark:#x}");
        ensure!(number == 0 || number == page, "page {number} lies at {page}");
    }
    Ok(TOUCHES)
}

/// Maps what is there, and reads it through the mapping: never SIGBUS, never another page's bytes.
fn map(file: &DaxFile, rng: &mut Rng) -> Outcome<u64> {
    let start = rng.below(ALL - 1);
    let map = match file.map(pages::bytes(start..start + 1 + rng.below(15))) {
        Ok(map) => map,
        Err(DaxError::Range { .. }) => return Ok(0),
        Err(e) => return Err(e.into()),
    };
    let mut seen = 0;
    let mut page = vec![0; PAGE as usize];
    for i in 0..map.len() / PAGE as usize {
        match map.read(i * PAGE as usize, &mut page) {
            Ok(()) => seen += 1,
            Err(DaxError::Cut { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        if let Held::Page(number, _) = pages::look(&page)? {
            ensure!(number == start + i as u64, "page {number} lies at {}", start + i as u64);
        }
        page.fill(0);
    }
    Ok(seen)
}
