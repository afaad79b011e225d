//! Processes that are killed in the middle of migrations and compactions, at random moments: afterwards the launcher finds
//! every reference of theirs, and what others have is what it was.

mod managed;

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use farpage::PAGE_SIZE;
use farpage::migrate::Target;
use managed::{Managed, Memory};

const MIB: usize = 1 << 20;
/// Pages that a process migrates.
const PAGES: usize = 768;
/// Processes killed in each test.
const KILLS: u64 = 60;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    /// A range of pages.
    fn part(&mut self, m: &Memory) -> std::ops::Range<usize> {
        let (a, b) = (self.below(m.pages()), self.below(m.pages()));
        m.part(a.min(b), a.max(b) + 1)
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: two descriptors for us, nobody else's from here on.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Forks a process that does `step` again and again, and kills it at some moment after it has begun.
fn kill_one(managed: &Managed, random: &mut Random, seed: u64, step: impl Fn(&Memory, &mut Random, u64)) {
    let (begun, begins) = pipe();
    let child = managed.fork(|| {
        let m = managed.map(PAGES * PAGE_SIZE);
        let mut random = Random(seed * 2 + 1);
        (0..PAGES).for_each(|i| m.write(i, i as u64));
        step(&m, &mut random, 0);
        // SAFETY: the pipe's end is open in this process.
        assert_eq!(unsafe { libc::write(begins.as_raw_fd(), b"!".as_ptr().cast(), 1) }, 1);
        for round in 1.. {
            step(&m, &mut random, round);
        }
    });
    drop(begins);
    let mut word = [0];
    std::fs::File::from(begun).read_exact(&mut word).expect("the process does its work until it is killed");
    std::thread::sleep(Duration::from_micros(random.below(6000) as u64));
    let mut status = 0;
    // SAFETY: our child, not waited for yet.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
    }
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
        "it ended by itself: {status:#x}"
    );
}

/// Kills processes that have all of their pages for themselves: nothing is in use afterwards.
fn kill_those_alone(test: &str, devices: &[&str], step: impl Fn(&Managed, &Memory, &mut Random, u64)) {
    if !managed::alone(test) {
        return;
    }
    let managed = Managed::new(16 * MIB, devices);
    let mut random = Random(0x5eed);
    let mut held = 0;
    for seed in 0..KILLS {
        kill_one(&managed, &mut random, seed, |m, random, round| step(&managed, m, random, round));
        held += usize::from(managed.space.domain.pagemaps.iter().any(|map| map.frames.used() != 0));
        managed.assert_all_free();
        managed.assert_audit();
    }
    assert!(held > KILLS as usize / 2, "only {held} had pages on a device when they were killed");
}

/// Kills processes that share their parent's pages: the parent has what it had, and its counts are its own again.
fn kill_those_that_share(test: &str, devices: &[&str], step: impl Fn(&Managed, &Memory, &mut Random, u64)) {
    if !managed::alone(test) {
        return;
    }
    let managed = Managed::new(16 * MIB, devices);
    let mut random = Random(0xf0);
    let m = managed.map(PAGES * PAGE_SIZE);
    (0..PAGES).for_each(|i| m.write(i, 7_000 + i as u64));
    for seed in 0..KILLS {
        // A third each in DRAM and on the devices, differently each time.
        for to in [Target::System, Target::Device(0), Target::Device(1)] {
            managed.space.migrate(random.part(&m), to).unwrap();
        }
        let used: Vec<usize> = (0..devices.len()).map(|dev| managed.used(dev as u8)).collect();
        kill_one(&managed, &mut random, seed, |_, random, round| step(&managed, &m, random, round));
        for _ in 0..100 {
            if managed.reap() != 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        managed.assert_audit();
        let now: Vec<usize> = (0..devices.len()).map(|dev| managed.used(dev as u8)).collect();
        assert_eq!(now, used, "frames of the parent's");
        let counts = managed.space.on_devices(m.addr, m.addr + m.len);
        assert!(counts.iter().all(|page| page.count == 1), "{counts:?}");
        assert_eq!(counts.len(), used.iter().sum::<usize>());
    }
    assert!((0..PAGES).all(|i| m.is(i, 7_000 + i as u64)));
    drop(m);
    managed.assert_all_free();
}

fn out_and_back(managed: &Managed, m: &Memory, random: &mut Random, round: u64) {
    let to = if round.is_multiple_of(2) { Target::Device(0) } else { Target::System };
    managed.space.migrate(random.part(m), to).unwrap();
    let i = random.below(PAGES);
    m.write(i, round);
}

fn between_devices(managed: &Managed, m: &Memory, random: &mut Random, round: u64) {
    managed.space.migrate(random.part(m), Target::Device((round % 2) as u8)).unwrap();
}

fn compaction(managed: &Managed, m: &Memory, random: &mut Random, round: u64) {
    // Holes between the frames, which compaction then closes; what is pushed out has no copy, or has one.
    let dev = (round % 2) as u8;
    managed.space.migrate(m.range(), Target::Device(dev)).unwrap();
    for _ in 0..4 {
        managed.space.migrate(random.part(m), Target::System).unwrap();
    }
    let used = managed.used(dev) as u32;
    managed.space.shrink(dev, used.max(1)).unwrap();
    managed.space.compact(dev).unwrap();
    managed.space.shrink(dev, u32::MAX).unwrap();
}

const IN_MEMORY: &[&str] = &["mem:8M", "ram:8M"];

#[test]
fn to_a_device_and_back() {
    kill_those_alone("to_a_device_and_back", IN_MEMORY, out_and_back);
}

#[test]
fn to_a_compressing_device_and_back() {
    kill_those_alone("to_a_compressing_device_and_back", &["ram:8M"], out_and_back);
}

#[test]
fn between_two_devices() {
    kill_those_alone("between_two_devices", IN_MEMORY, between_devices);
}

#[test]
fn in_a_compaction() {
    kill_those_alone("in_a_compaction", IN_MEMORY, compaction);
}

#[test]
fn with_reclaim_at_work() {
    kill_those_alone("with_reclaim_at_work", &["mem:2M", "ram:8M"], |managed, m, random, round| {
        managed.space.page_out(m.addr, m.addr + m.len, true);
        out_and_back(managed, m, random, round);
        let _exclusive = managed.space.exclusive(random.part(m));
    });
}

#[test]
fn of_pages_that_the_parent_has_too() {
    kill_those_that_share("of_pages_that_the_parent_has_too", IN_MEMORY, |managed, m, random, round| {
        out_and_back(managed, m, random, round);
        between_devices(managed, m, random, round);
    });
}

#[test]
fn in_a_compaction_of_pages_that_the_parent_has_too() {
    kill_those_that_share("in_a_compaction_of_pages_that_the_parent_has_too", IN_MEMORY, compaction);
}
