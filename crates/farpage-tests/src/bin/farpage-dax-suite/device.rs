//! A device-dax device, or a file in its place; what helper processes do with it.

use std::collections::BTreeMap;
use std::path::Path;

use farpage::Pin;
use farpage::dax::{DaxDevice, DeviceMapping, DevicePin};
use farpage_tests::Rng;

use crate::place::Place;
use crate::{Outcome, ensure, pages};

/// Bytes of a file in the place of a device.
const FILE: u64 = 32 << 20;

/// The device of the case.
pub fn open(place: &Place) -> Outcome<DaxDevice> {
    match &place.device {
        Some(path) => Ok(DaxDevice::open(path)?),
        None => Ok(DaxDevice::open_file(place.path("device"), FILE, &place.tables)?),
    }
}

/// How many pieces of the least size that can be mapped it has, of which as many are used as take no long time.
pub fn units(device: &DaxDevice) -> u64 {
    (device.size() / device.align()).min(64)
}

/// How far apart bytes are that are looked at: not every page of a gigabyte.
fn step(len: usize) -> usize {
    (len / 64).next_multiple_of(4096)
}

/// Writes a mark all over a mapping.
pub fn mark(map: &DeviceMapping, mark: u64) {
    for at in (0..map.len()).step_by(step(map.len())) {
        // SAFETY: inside the mapping.
        unsafe { map.as_ptr().add(at).cast::<u64>().write_volatile(mark ^ at as u64) };
    }
}

/// Looks for the mark; 0 with `zeros`: as it is when it was just allocated.
pub fn verify(map: &DeviceMapping, mark: u64, zeros: bool) -> Outcome {
    for at in (0..map.len()).step_by(step(map.len())) {
        // SAFETY: inside the mapping.
        let found = unsafe { map.as_ptr().add(at).cast::<u64>().read_volatile() };
        let wanted = if zeros { 0 } else { mark ^ at as u64 };
        ensure!(found == wanted, "{found:#x} lies at {at:#x} of {:#x?}, not {wanted:#x}", map.range());
    }
    Ok(())
}

enum Thing {
    Map(DeviceMapping),
    Pin(#[allow(dead_code, reason = "it is held")] DevicePin),
}

/// What a helper process has of the device.
#[derive(Default)]
pub struct Things {
    device: Option<DaxDevice>,
    things: BTreeMap<u64, Thing>,
    next: u64,
}

impl Things {
    fn keep(&mut self, thing: Thing) -> String {
        self.next += 1;
        self.things.insert(self.next, thing);
        self.next.to_string()
    }

    fn map(&self, id: u64) -> Outcome<&DeviceMapping> {
        match self.things.get(&id) {
            Some(Thing::Map(map)) => Ok(map),
            _ => Err(format!("{id} is no mapping").into()),
        }
    }

    /// One line; places are in units of the device's alignment.
    pub fn act(&mut self, place: &Place, words: &[&str]) -> Outcome<String> {
        let n = |i: usize| -> Outcome<u64> { Ok(words.get(i).ok_or("a number is missing")?.parse()?) };
        if self.device.is_none() {
            self.device = Some(open(place)?);
        }
        let device = self.device.as_ref().ok_or("no device")?;
        let unit = device.align();
        match words[0] {
            "dev-open" => Ok(String::new()),
            "dev-map" => {
                let map = device.map(n(1)? * unit..n(2)? * unit)?;
                Ok(self.keep(Thing::Map(map)))
            }
            // Says where it is as well.
            "dev-allocate" => {
                let map = device.allocate(n(1)? * unit, unit)?;
                let start = map.range().start / unit;
                Ok(format!("{} {start}", self.keep(Thing::Map(map))))
            }
            "dev-pin" => {
                let pin = device.pin(n(1)? * unit..n(2)? * unit, Pin::LongTerm)?;
                Ok(self.keep(Thing::Pin(pin)))
            }
            "dev-mark" => {
                mark(self.map(n(1)?)?, n(2)?);
                Ok(String::new())
            }
            "dev-verify" => {
                verify(self.map(n(1)?)?, n(2)?, false)?;
                Ok(String::new())
            }
            "dev-drop" => {
                self.things.remove(&n(1)?).ok_or("no such thing")?;
                Ok(String::new())
            }
            "dev-race" => race(device, place, n(1)?),
            word => Err(format!("{word}?").into()),
        }
    }
}

/// Until it is killed: allocates, maps what it has once more, pins it, in any order.
pub fn storm(place: &Place, kind: &str, seed: u64) -> Outcome<String> {
    let device = open(place)?;
    let mut rng = Rng::new(seed);
    let (unit, units) = (device.align(), units(&device));
    loop {
        if kind == "dev-map" {
            let start = rng.below(units);
            drop(device.map(start * unit..(start + 1 + rng.below(units - start)) * unit)?);
            continue;
        }
        // The other one may have it all.
        let Ok(map) = device.allocate(unit, unit) else { continue };
        let again = device.map(map.range())?;
        let pin = device.pin(map.range(), Pin::Short)?;
        if rng.below(2) == 0 {
            drop(map);
        }
        drop((again, pin));
    }
}

/// Allocates, and looks for a while whether what it has is nobody else's.
fn race(device: &DaxDevice, place: &Place, seed: u64) -> Outcome<String> {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(place.seconds);
    let mut rng = Rng::new(seed);
    let (unit, most) = (device.align(), units(device).div_ceil(8));
    let (mut rounds, mut held) = (0, Vec::new());
    while std::time::Instant::now() < until {
        if held.len() > 2 || (!held.is_empty() && rng.below(2) == 0) {
            let (map, tag): (DeviceMapping, u64) = held.swap_remove(rng.below(held.len() as u64) as usize);
            verify(&map, tag, false)?;
            rounds += 1;
            continue;
        }
        let Ok(map) = device.allocate((1 + rng.below(most)) * unit, unit) else { continue };
        verify(&map, 0, true)?;
        let tag = rng.draw();
        mark(&map, tag);
        held.push((map, tag));
    }
    for (map, tag) in &held {
        verify(map, *tag, false)?;
        rounds += 1;
    }
    Ok(format!("{rounds}"))
}

/// What the device's node says of itself in sysfs: size and alignment.
pub fn in_sysfs(path: &Path) -> Outcome<(u64, u64)> {
    let name = path.file_name().ok_or("no name")?;
    let read = |what: &str| -> Outcome<u64> {
        let path = Path::new("/sys/bus/dax/devices").join(name).join(what);
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    };
    Ok((read("size")?, read("align")?))
}

/// The page size with which the kernel maps what is at an address, in bytes.
pub fn page_size_at(at: usize) -> Outcome<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let begins = format!("{at:x}-");
    let of_it = text.lines().skip_while(|line| !line.starts_with(&begins));
    let line = of_it.into_iter().find_map(|line| line.strip_prefix("KernelPageSize:"));
    let kib: u64 = line.ok_or("nothing is mapped there")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// A part of it in units.
pub fn part(device: &DaxDevice, start: u64, end: u64) -> std::ops::Range<u64> {
    debug_assert!(pages::PAGE <= device.align());
    start * device.align()..end * device.align()
}
