//! A huge page that moves as one, and that is split when a part of it is touched.

mod managed;

use farpage::PAGE_SIZE;
use farpage::migrate::Target;
use managed::{Managed, Memory};

const MIB: usize = 1 << 20;
const PAGES: usize = 512;

/// Bytes of huge pages in the mappings of `[start, end)`, by the kernel's own account.
fn huge_bytes(start: usize, end: usize) -> usize {
    let (mut within, mut sum) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        if let Some((s, e)) = first.split_once('-') {
            let at = |hex| usize::from_str_radix(hex, 16);
            within = at(s).is_ok_and(|s| s < end) && at(e).is_ok_and(|e| e > start);
        } else if within && first == "AnonHugePages:" {
            sum += second.parse::<usize>().unwrap() << 10;
        }
    }
    sum
}

fn in_program(m: &Memory) -> usize {
    huge_bytes(m.addr, m.addr + m.len)
}

fn in_staging(managed: &Managed) -> usize {
    let (start, len) = managed.space.slots.area();
    huge_bytes(start, start + len)
}

/// Whether the kernel frees page tables that have become empty: over one it moves no huge page.
fn frees_page_tables() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    cfg!(target_arch = "x86_64") && version >= (6, 14)
}

/// 2 MiB in one huge page; `None`, and why is said: the kernel makes none here, or moves none.
fn huge(managed: &Managed) -> Option<Memory> {
    if !frees_page_tables() {
        eprintln!("skipped: before Linux 6.14 a huge page is split where small pages have been before");
        return None;
    }
    let m = managed.map(2 * MIB);
    // SAFETY: our mapping.
    unsafe { libc::madvise(m.addr as *mut _, m.len, libc::MADV_HUGEPAGE) };
    (0..PAGES).for_each(|i| m.write(i, i as u64));
    if in_program(&m) == 0 {
        managed.space.collapse(m.range()).unwrap();
    }
    if in_program(&m) == m.len {
        return Some(m);
    }
    eprintln!(
        "skipped: the kernel makes no huge page here (is transparent_hugepage off, or memory scattered?)"
    );
    None
}

#[test]
fn a_huge_page_leaves_the_program_as_one_and_comes_back_as_one() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let Some(m) = huge(&managed) else { return };
    assert_eq!(in_staging(&managed), 0);
    let device = managed.space.exclusive(m.range()).unwrap();
    assert_eq!((device.pages(), m.resident_count()), (PAGES, 0));
    assert_eq!((in_program(&m), in_staging(&managed)), (0, 2 * MIB), "moved, not split");
    assert_eq!(managed.space.migrate(m.range(), Target::System).unwrap().moved(), PAGES);
    assert_eq!((device.pages(), m.resident_count()), (0, PAGES));
    assert_eq!((in_program(&m), in_staging(&managed)), (2 * MIB, 0), "and back, not split");
    drop(device);
    // To the device itself: what was the program's huge page is a free one now.
    assert_eq!(managed.space.migrate(m.range(), Target::Device(0)).unwrap().moved(), PAGES);
    assert_eq!((managed.used(0), in_program(&m), m.resident_count()), (PAGES, 0, 0));
    assert!((0..PAGES).all(|i| m.is(i, i as u64)));
    drop(m);
    managed.assert_all_free();
}

#[test]
fn a_touch_of_a_part_splits_it() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let Some(m) = huge(&managed) else { return };
    let device = managed.space.exclusive(m.range()).unwrap();
    assert_eq!((in_program(&m), in_staging(&managed)), (0, 2 * MIB));
    assert!(m.is(300, 300));
    assert!(device.pages() < PAGES && device.pages() > 0, "{}", device.pages());
    assert_eq!((in_program(&m), in_staging(&managed)), (0, 0), "split");
    assert!((0..PAGES).all(|i| m.is(i, i as u64)));
    assert_eq!((m.resident_count(), in_program(&m)), (PAGES, 0));
    drop(device);
    drop(m);
    managed.assert_all_free();
}

#[test]
fn a_part_that_migrates_splits_it() {
    let managed = Managed::new(64 * MIB, &["mem:32M"]);
    let Some(m) = huge(&managed) else { return };
    assert_eq!(managed.space.migrate(m.part(100, 101), Target::Device(0)).unwrap().moved(), 1);
    assert_eq!((in_program(&m), in_staging(&managed), m.resident_count()), (0, 0, PAGES - 1));
    assert_eq!(managed.used(0), 1);
    assert!((0..PAGES).all(|i| m.is(i, i as u64)));
    // SAFETY: our mapping; `PAGE_SIZE` of it is only read.
    assert_eq!(unsafe { *(m.at(100) as *const u8) }, m.bytes(100)[0]);
    assert_eq!(m.bytes(0).len(), PAGE_SIZE);
    drop(m);
    managed.assert_all_free();
}
