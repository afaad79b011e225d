//! A managed address space for a test: its own domain, its own threads.
#![allow(dead_code)] // each test binary uses some of it

#[path = "../audited/mod.rs"]
mod audited;

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use farpage::PAGE_SIZE;
use farpage::domain::{Config, Domain, Launcher};
use farpage::space::Space;

/// One at a time; and tests that fork run [`alone`].
static ONE: Mutex<()> = Mutex::new(());

/// A domain, its launcher, and this process's space in it.
pub struct Managed {
    pub space: &'static Space,
    launcher: Mutex<Launcher>,
    _one: MutexGuard<'static, ()>,
}

fn start_threads(space: &'static Space) {
    std::thread::spawn(move || farpage::reclaim::worker::run(space));
    std::thread::spawn(move || farpage::fault::handler::run(space, 0));
    space.set_running(|_| false);
    // Both have to be past what a new thread does with the C library's locks, or a fork that comes now waits for ever.
    let page = Memory::map(space, PAGE_SIZE);
    // SAFETY: our own page.
    unsafe { (page.addr as *mut u8).write_volatile(0) };
    space.page_out(page.addr, page.addr + PAGE_SIZE, true);
    assert_eq!(page.bytes(0), [0; PAGE_SIZE]);
}

impl Managed {
    /// With `dram` bytes and these devices.
    pub fn new(dram: usize, devices: &[&str]) -> Self {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let config = Config {
            dram: dram as u64,
            min_size: 0,
            strict: false,
            verbose: false,
            recycle: true,
            max_pinned: None,
            devices: devices.iter().map(|d| d.parse().unwrap()).collect(),
        };
        let launcher = Launcher::create(&config).unwrap();
        let domain = Domain::attach(&launcher.env_value()).unwrap();
        let space: &'static Space = Box::leak(Box::new(Space::new(domain).unwrap()));
        start_threads(space);
        Self { space, launcher: Mutex::new(launcher), _one }
    }

    /// Managed memory.
    pub fn map(&self, len: usize) -> Memory {
        Memory::map(self.space, len)
    }

    /// Frames in use on a device.
    pub fn used(&self, dev: u8) -> usize {
        self.space.domain.pagemap(dev).frames.used()
    }

    /// Gives back what processes held that have ended.
    pub fn reap(&self) -> usize {
        self.launcher.lock().unwrap().reap()
    }

    /// See [`audited::assert_audit`].
    pub fn assert_audit(&self) {
        self.reap();
        audited::assert_audit(&self.space.domain);
    }

    /// Every frame of every device is free, once the processes that have ended are seen to.
    pub fn assert_all_free(&self) {
        for _ in 0..100 {
            self.launcher.lock().unwrap().reap();
            if self.space.domain.pagemaps.iter().all(|map| map.frames.used() == 0) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for map in &self.space.domain.pagemaps {
            let counts: Vec<(u32, u32)> = (0..map.frames.len() as u32)
                .map(|pfn| (pfn, map.frames.count(pfn)))
                .filter(|&(_, n)| n != 0)
                .take(8)
                .collect();
            assert_eq!(map.frames.used(), 0, "frames of device {} still in use: {counts:?}", map.id);
        }
    }

    /// Forks as an injected library does; the child runs `f` and ends, with status 0 if that returns. Its number.
    pub fn fork(&self, f: impl FnOnce()) -> libc::pid_t {
        self.fork_and(|| (), f)
    }

    /// The same; the child runs `first` before it is managed.
    pub fn fork_and(&self, first: impl FnOnce(), f: impl FnOnce()) -> libc::pid_t {
        let forking = self.space.before_fork().unwrap();
        // SAFETY: the child runs `f` with its own manager's threads; malloc is usable after a fork with glibc.
        match unsafe { libc::fork() } {
            0 => {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    first();
                    let life = self.space.after_fork_in_child(forking).unwrap();
                    start_threads(self.space);
                    drop(life);
                    f();
                }));
                // SAFETY: ends the child without the test harness's exit code.
                unsafe { libc::_exit(i32::from(outcome.is_err())) }
            }
            pid => {
                self.space.after_fork_in_parent(forking);
                assert!(pid > 0);
                pid
            }
        }
    }
}

/// Every test ends with an audit of its domain.
impl Drop for Managed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.assert_audit();
        }
    }
}

/// Whether this process runs this test and no other; if not, runs it in one that does. The kernel tells every userfaultfd of a
/// fork, and `fork` holds the locks of the C library's allocator until all have heard of it: the handlers of other tests'
/// spaces, which live on, would wait for those locks and never get to hear.
pub fn alone(test: &str) -> bool {
    if std::env::var_os("FARPAGE_TEST_ALONE").is_some() {
        return true;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("FARPAGE_TEST_ALONE", "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

/// Waits for a child: whether it ended well.
pub fn ended_well(pid: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: our child, waited for once.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

/// A managed mapping; unmapped when dropped.
pub struct Memory {
    pub space: &'static Space,
    pub addr: usize,
    pub len: usize,
}

impl Memory {
    pub fn map(space: &'static Space, len: usize) -> Self {
        // Room to begin at a multiple of 2 MiB, so that huge pages and windows are where the test expects them.
        let huge = 2 << 20;
        // SAFETY: the kernel chooses the address; what is over goes back.
        let addr = unsafe {
            let raw = libc::mmap(
                std::ptr::null_mut(),
                len + huge,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            assert_ne!(raw, libc::MAP_FAILED);
            let addr = (raw as usize).next_multiple_of(huge);
            if addr > raw as usize {
                libc::munmap(raw, addr - raw as usize);
            }
            libc::munmap((addr + len) as *mut _, raw as usize + huge - addr);
            addr
        };
        space.change(|world| space.add(world, addr, addr + len)).unwrap();
        Self { space, addr, len }
    }

    pub fn range(&self) -> Range<usize> {
        self.addr..self.addr + self.len
    }

    pub fn pages(&self) -> usize {
        self.len / PAGE_SIZE
    }

    /// Address of page `i`.
    pub fn at(&self, i: usize) -> usize {
        self.addr + i * PAGE_SIZE
    }

    /// The range of pages `[first, end)`.
    pub fn part(&self, first: usize, end: usize) -> Range<usize> {
        self.at(first)..self.at(end)
    }

    /// Writes page `i`: every word depends on `seed`, and they differ.
    pub fn write(&self, i: usize, seed: u64) {
        write_page(self.at(i), seed);
    }

    /// Whether page `i` is what `write` made it.
    pub fn is(&self, i: usize, seed: u64) -> bool {
        is_page(self.at(i), seed)
    }

    /// The bytes of page `i`.
    pub fn bytes(&self, i: usize) -> [u8; PAGE_SIZE] {
        // SAFETY: mapped while we live; the test does not write it meanwhile.
        unsafe { *(self.at(i) as *const [u8; PAGE_SIZE]) }
    }

    /// Which pages are in the process, by the kernel's own account.
    pub fn resident(&self) -> Vec<bool> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut words = vec![0u8; self.pages() * 8];
        file.read_exact_at(&mut words, (self.addr / PAGE_SIZE * 8) as u64).unwrap();
        words.chunks_exact(8).map(|w| w[7] & 0x80 != 0).collect()
    }

    pub fn resident_count(&self) -> usize {
        self.resident().iter().filter(|r| **r).count()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (start, end) = (self.addr, self.addr + self.len);
        self.space
            .change(|world| {
                self.space.unmap(world, start, end, || {
                    // SAFETY: our own mapping, used no more.
                    match unsafe { libc::munmap(start as *mut _, end - start) } {
                        0 => Ok(()),
                        _ => Err(rustix::io::Errno::INVAL),
                    }
                })
            })
            .unwrap();
    }
}

fn word(seed: u64, i: usize) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 29;
    x.wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Fills the page at `addr`.
pub fn write_page(addr: usize, seed: u64) {
    for i in 0..PAGE_SIZE / 8 {
        // SAFETY: the caller's mapped page; one word at a time, each atomic as the CPU does it.
        unsafe { ((addr + i * 8) as *mut u64).write_volatile(if i % 8 < 4 { word(seed, i) } else { seed }) };
    }
}

/// Whether the page at `addr` is what [`write_page`] made it.
pub fn is_page(addr: usize, seed: u64) -> bool {
    (0..PAGE_SIZE / 8).all(|i| {
        // SAFETY: as in `write_page`.
        let seen = unsafe { ((addr + i * 8) as *const u64).read_volatile() };
        seen == if i % 8 < 4 { word(seed, i) } else { seed }
    })
}
