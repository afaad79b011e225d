//! Regions in a running space: larger than DRAM, in threads, growing, in several domains, with a device that fails.

mod audited;

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};

use farpage::device::{Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use farpage::frame::{Owner, Pfn};
use farpage::{Builder, Domain, Page, Pin, Running};

const MIB: usize = 1 << 20;

fn domain() -> Builder {
    Domain::builder().dram("8M").device("ram:64M")
}

/// A space whose domain is audited when the test is done with it.
struct Audited(Running);

impl Deref for Audited {
    type Target = Running;
    fn deref(&self) -> &Running {
        &self.0
    }
}

impl Drop for Audited {
    fn drop(&mut self) {
        // (In a forked child the space is the parent's.)
        if !std::thread::panicking() && self.is_mine() {
            audited::assert_audit(&self.domain);
        }
    }
}

fn start(builder: Builder, inline: bool) -> Audited {
    let domain = builder.build().unwrap();
    Audited(if inline { domain.start_inline() } else { domain.start() }.unwrap())
}

/// Both ways of resolving faults, in turn.
fn spaces(builder: fn() -> Builder) -> impl Iterator<Item = Audited> {
    [false, true].into_iter().map(move |inline| start(builder(), inline))
}

fn mix(i: usize) -> u64 {
    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

fn fill(region: &mut [u64]) {
    region.iter_mut().enumerate().for_each(|(i, x)| *x = mix(i));
}

fn check(region: &[u64]) {
    let wrong = region.iter().enumerate().find(|(i, x)| **x != mix(*i));
    assert_eq!(wrong, None);
}

#[test]
fn more_than_dram_holds_what_was_written() {
    for space in spaces(domain) {
        let mut region = space.region::<u64>(4 * MIB).unwrap();
        assert!(region.iter().step_by(512).all(|&x| x == 0));
        fill(&mut region);
        check(&region);
        let stats = space.domain.stats();
        assert!(stats.pages_out > 4000 && stats.pages_in > 4000, "{stats:?}");
        assert!(stats.dram_peak <= stats.dram_budget, "{stats:?}");
        drop(region);
        let stats = space.domain.stats();
        assert_eq!((stats.leaked_frames, stats.poisoned), (0, 0), "{stats:?}");
    }
}

#[test]
fn threads_share_a_region() {
    for space in spaces(domain) {
        let mut region = space.region::<u64>(3 * MIB).unwrap();
        std::thread::scope(|s| {
            for (t, part) in region.chunks_mut(MIB).enumerate() {
                s.spawn(move || {
                    for round in 1..4u64 {
                        part.iter_mut().enumerate().for_each(|(i, x)| *x += mix(i) * round + t as u64);
                    }
                });
            }
        });
        for (t, part) in region.chunks(MIB).enumerate() {
            let want = |i: usize| (1..4u64).map(|r| mix(i) * r + t as u64).sum::<u64>();
            assert!(part.iter().enumerate().all(|(i, x)| *x == want(i)));
        }
    }
}

#[test]
fn a_region_grows_and_shrinks() {
    for space in spaces(domain) {
        let mut region = space.region::<u64>(1000).unwrap();
        fill(&mut region);
        // Something behind it, so that it has to move.
        let _wall = space.region::<u8>(1).unwrap();
        region.resize(4 * MIB).unwrap();
        check(&region[..1000]);
        assert!(region[1000..].iter().all(|&x| x == 0));
        fill(&mut region);
        region.resize(1001).unwrap();
        check(&region);
        region.resize(5000).unwrap();
        check(&region[..1001]);
        assert!(region[1001..].iter().all(|&x| x == 0), "what was cut off has come back");
        assert!(region.resize(usize::MAX / 4).is_err());
        check(&region[..1001]);
    }
}

#[test]
fn several_domains_live_side_by_side_and_end() {
    for _ in 0..8 {
        let spaces: Vec<Audited> = spaces(domain).chain(spaces(domain)).collect();
        let mut regions: Vec<_> = spaces.iter().map(|s| s.region::<u64>(2 * MIB).unwrap()).collect();
        regions.iter_mut().for_each(|r| fill(r));
        drop(spaces);
        regions.iter().for_each(|r| check(r));
    }
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 24, "{threads} threads: those of spaces that have ended are still there");
}

#[test]
fn a_forked_child_goes_on_without() {
    for space in spaces(domain) {
        let mut region = space.region::<u64>(2 * MIB).unwrap();
        fill(&mut region);
        // A program with libraries forks and starts others.
        let out = std::process::Command::new("true").status().unwrap();
        assert!(out.success());
        // SAFETY: the child drops what it has and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(region);
            drop(space);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(status, 0);
        check(&region);
    }
}

/// A device of the program's own: pages as they are, in a vector.
struct Shelf {
    pages: Vec<std::sync::Mutex<Option<(Page, Sum)>>>,
    loads: AtomicU32,
}

impl Device for Shelf {
    fn name(&self) -> &str {
        "shelf"
    }
    fn frames(&self) -> u32 {
        self.pages.len() as u32
    }
    fn store(&self, ops: &mut [StoreOp<'_>], _: Owner) {
        for op in ops {
            *self.pages[op.pfn as usize].lock().unwrap() = Some((op.page.clone(), op.sum));
            op.result = Ok(());
        }
    }
    fn load(&self, ops: &mut [LoadOp<'_>]) {
        for op in ops {
            self.loads.fetch_add(1, Ordering::Relaxed);
            op.result = match &*self.pages[op.pfn as usize].lock().unwrap() {
                Some((page, sum)) => {
                    *op.page = page.clone();
                    Ok(*sum)
                }
                None => Err(DeviceError::Corrupt),
            };
        }
    }
    fn sum(&self, pfn: Pfn) -> Sum {
        self.pages[pfn as usize].lock().unwrap().as_ref().map_or_else(Sum::default, |p| p.1)
    }
    fn free(&self, pfns: &[Pfn], _: Owner) {
        pfns.iter().for_each(|&pfn| *self.pages[pfn as usize].lock().unwrap() = None);
    }
    fn usage(&self) -> Usage {
        Usage::default()
    }
}

#[test]
fn a_device_of_ones_own() {
    let shelf = || Shelf {
        pages: (0..16 * 1024).map(|_| std::sync::Mutex::new(None)).collect(),
        loads: AtomicU32::new(0),
    };
    for inline in [false, true] {
        let space = start(Domain::builder().dram("8M").own_device(shelf()), inline);
        let mut region = space.region::<u64>(4 * MIB).unwrap();
        fill(&mut region);
        check(&region);
        assert!(space.domain.stats().pages_in > 4000);
    }
}

/// A page that cannot be read back raises SIGBUS in who touches it, and only that page.
#[test]
fn a_page_that_is_lost_raises_sigbus() {
    for inline in [false, true] {
        // SAFETY: the child makes a space of its own and ends; this process has other threads, which hold no lock that it
        // needs but the allocator's, which the C library hands over.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let domain = Domain::builder().dram("8M").device("inject:corrupt-store=1+:ram:64M").build();
            let domain = domain.unwrap_or_else(|e| panic!("{e}"));
            let space = if inline { domain.start_inline() } else { domain.start() }.unwrap();
            let mut region = space.region::<u64>(4 * MIB).unwrap();
            fill(&mut region);
            check(&region);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{status:#x}");
    }
}

/// Faults by SIGBUS need no privilege at all.
#[test]
fn an_unprivileged_process_has_inline_regions() {
    use std::os::unix::process::CommandExt;
    const MARK: &str = "FARPAGE_TEST_UNPRIVILEGED";
    if std::env::var_os(MARK).is_some() {
        let space = start(domain(), true);
        let mut region = space.region::<u64>(4 * MIB).unwrap();
        fill(&mut region);
        check(&region);
        assert!(space.domain.stats().pages_in > 4000);
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return; // then all other tests have shown it
    }
    const NOBODY: u32 = 65534;
    // What nobody may execute.
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("region");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for path in [dir.path(), &program] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let status = std::process::Command::new(&program)
        .args(["--exact", "an_unprivileged_process_has_inline_regions"])
        .env(MARK, "1")
        .current_dir("/")
        .gid(NOBODY)
        .uid(NOBODY)
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

/// What is pinned can be given to system calls, whatever else wants the DRAM meanwhile: never touched, away, or there.
#[test]
fn what_is_pinned_can_be_given_to_system_calls() {
    use std::io::{Read, Seek, Write};
    for space in spaces(domain) {
        let mut buffer = space.region::<u64>(MIB / 8).unwrap();
        let mut other = space.region::<u64>(4 * MIB).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        for round in 0..3u64 {
            fill(&mut other);
            let pages = buffer.pages(..);
            let pin = space.pin(pages.clone(), Pin::Short, true).unwrap();
            assert_eq!(space.pinned(), (pages.len() / 4096) as u64);
            // Pushes everything out that may go.
            check(&other);
            file.rewind().unwrap();
            let words: Vec<u8> = (0..MIB as u64 / 8).flat_map(|i| (i * 7 + round).to_ne_bytes()).collect();
            file.write_all(&words).unwrap();
            file.rewind().unwrap();
            // SAFETY: pinned and ours; nobody looks at the slice meanwhile.
            let into = unsafe { std::slice::from_raw_parts_mut(pin.addr() as *mut u8, pin.len()) };
            file.read_exact(into).unwrap();
            drop(pin);
            assert!(buffer.iter().zip(0..).all(|(x, i)| *x == i * 7 + round));
            if round == 1 {
                let device = farpage::Target::Device(0);
                assert!(space.migrate(buffer.pages(..), device).unwrap().moved() > 0);
            }
            buffer[0] = buffer[0].wrapping_add(0);
        }
        assert_eq!(space.pinned(), 0);
        let all = space.pin(other.pages(..), Pin::Short, false);
        assert!(matches!(all, Err(farpage::PinError::Limit { .. })), "more than half of the budget");
    }
}

/// Without a pin, a system call of an inline space is told EFAULT: never other bytes.
#[test]
fn an_inline_page_that_is_away_is_efault_for_a_system_call() {
    let space = start(domain(), true);
    let mut region = space.region::<u8>(MIB).unwrap();
    region.fill(7);
    assert!(space.migrate(region.pages(..), farpage::Target::Device(0)).unwrap().moved() > 0);
    let file = tempfile::tempfile().unwrap();
    let written = rustix::io::write(&file, &region[..4096]);
    assert_eq!(written, Err(rustix::io::Errno::FAULT));
    assert_eq!(region[0], 7);
    assert_eq!(rustix::io::write(&file, &region[..4096]), Ok(4096));
}

/// Memory of another library: what was in it stays in it, while it is managed and afterwards.
#[test]
fn memory_of_others_is_adopted_and_given_back() {
    for space in spaces(domain) {
        let mut buffer = vec![0u64; 4 * MIB];
        fill(&mut buffer);
        let bytes = buffer.as_ptr() as usize..buffer.as_ptr() as usize + 32 * MIB;
        let pages = bytes.start.next_multiple_of(4096)..bytes.end / 4096 * 4096;
        for round in 0..3 {
            // SAFETY: the buffer stays as it is until the end of the round.
            let adopted = unsafe { space.adopt(pages.clone()) }.unwrap();
            // SAFETY: refused.
            assert!(unsafe { space.adopt(pages.clone()) }.is_err(), "twice");
            check(&buffer);
            buffer.iter_mut().for_each(|x| *x ^= round);
            buffer.iter_mut().for_each(|x| *x ^= round);
            assert!(space.domain.stats().pages_in > 4000);
            drop(adopted);
            check(&buffer);
            let stats = space.domain.stats();
            assert_eq!((stats.leaked_frames, stats.poisoned), (0, 0));
            // What is charged is the stock of free frames at most, not the buffer.
            assert!(stats.dram_used <= stats.dram_budget, "{stats:?}");
        }
        // SAFETY: refused: code is no such memory.
        assert!(unsafe { space.adopt(fill as fn(&mut [u64]) as usize / 4096 * 4096..0) }.is_err());
    }
}
