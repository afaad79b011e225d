//! What the kernel itself takes for a page fault that the program resolves: userfaultfd, one page moved in, and nothing else.
//! No device, no checksum, no reclaim: neither a handler thread on the faulting thread's CPU nor the faulting thread in a
//! SIGBUS handler can be faster.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farpage::PAGE_SIZE;
use farpage::sys::uffd::{self, MSG_BATCH, Msg, Uffd, features};

use super::data::Random;
use super::memory::Region;

/// Pages that are faulted in, in random order, 64 MiB.
const PAGES: usize = 16_384;
const BYTES: usize = PAGES * PAGE_SIZE;

/// Memory whose pages are absent, and pages to move there.
struct Stage {
    memory: Region,
    frames: Region,
    uffd: Uffd,
    order: Vec<usize>,
    failed: AtomicBool,
}

impl Stage {
    fn new(uffd: Uffd) -> io::Result<Self> {
        let memory = Region::new(BYTES as u64)?;
        let frames = Region::new(BYTES as u64)?;
        (0..PAGES).for_each(|i| frames.page(i)[0].store(1, Ordering::Relaxed));
        let mut order: Vec<usize> = (0..PAGES).collect();
        let mut random = Random::new(1);
        (1..PAGES).rev().for_each(|i| order.swap(i, random.below(i + 1)));
        uffd.register(memory.page(0).as_ptr() as usize, BYTES)?;
        Ok(Self { memory, frames, uffd, order, failed: AtomicBool::new(false) })
    }

    /// Moves the page for `addr` in.
    fn resolve(&self, addr: usize) {
        let start = self.memory.page(0).as_ptr() as usize;
        let frame = self.frames.page((addr - start) / PAGE_SIZE).as_ptr() as usize;
        if self.uffd.move_pages(addr, frame, PAGE_SIZE, false).1.is_some() {
            self.failed.store(true, Ordering::Relaxed);
            // The thread gets a page of zeros instead of waiting for ever.
            let _waiting = self.uffd.unregister(start, BYTES);
        }
    }

    /// Touches every page; microseconds a fault.
    fn touch(&self) -> f64 {
        let began = Instant::now();
        let sum: u64 = self.order.iter().map(|&i| self.memory.page(i)[0].load(Ordering::Relaxed)).sum();
        let time = began.elapsed();
        if sum != PAGES as u64 {
            self.failed.store(true, Ordering::Relaxed);
        }
        time.as_secs_f64() * 1e6 / PAGES as f64
    }

    fn result(&self, us: Option<f64>) -> io::Result<f64> {
        let us = us.filter(|_| !self.failed.load(Ordering::Relaxed));
        us.ok_or_else(|| io::Error::other("UFFDIO_MOVE does not work here"))
    }
}

/// Microseconds a fault that a thread on the same CPU resolves. An error: no permission, or a kernel without `UFFDIO_MOVE`.
pub fn by_a_thread() -> io::Result<f64> {
    let stage = Stage::new(Uffd::open(features::MOVE)?)?;
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|&c| allowed.is_set(c)).unwrap_or(0) as u32;
    let done = AtomicBool::new(false);
    let time = std::thread::scope(|s| {
        s.spawn(|| {
            // As farpage's handlers do: such a thread makes way at once for the one that it wakes.
            farpage::sys::bind(0, cpu);
            farpage::sys::set_idle_policy(0, true);
            let mut messages = [Msg::Unknown(0); MSG_BATCH];
            while !done.load(Ordering::Relaxed) {
                let n = uffd::read(stage.uffd.raw(), &mut messages).unwrap_or(0);
                if n == 0 {
                    uffd::wait(stage.uffd.raw(), -1, Some(Duration::from_millis(20)));
                }
                for m in &messages[..n] {
                    let Msg::Fault { addr, .. } = *m else { continue };
                    stage.resolve(addr);
                    uffd::wake(stage.uffd.raw(), addr, PAGE_SIZE);
                }
            }
        });
        let faulting = s.spawn(|| {
            farpage::sys::bind(0, cpu);
            let time = stage.touch();
            done.store(true, Ordering::Relaxed);
            time
        });
        faulting.join()
    });
    stage.result(time.ok())
}

/// The stage that SIGBUS handlers play on, while there is one.
static STAGE: AtomicUsize = AtomicUsize::new(0);
/// One measurement at a time.
static MEASURING: Mutex<()> = Mutex::new(());

/// Microseconds a fault that the faulting thread resolves in a SIGBUS handler. An error: a kernel without `UFFDIO_MOVE`.
pub fn inline() -> io::Result<f64> {
    let _alone: MutexGuard<'_, ()> = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = Stage::new(Uffd::open_for_sigbus(features::MOVE)?)?;
    STAGE.store(std::ptr::from_ref(&stage) as usize, Ordering::Release);
    farpage::sys::on_sigbus(resolve)?;
    let time = stage.touch();
    STAGE.store(0, Ordering::Release);
    stage.result(Some(time))
}

#[allow(unsafe_code)] // a signal handler has no arguments of ours
fn resolve(addr: usize) -> bool {
    // SAFETY: who put the address there keeps the stage alive until he has taken it away, and all faults of the stage are
    // his own.
    let Some(stage) = (unsafe { (STAGE.load(Ordering::Acquire) as *const Stage).as_ref() }) else {
        return false;
    };
    let start = stage.memory.page(0).as_ptr() as usize;
    let ours = addr.wrapping_sub(start) < BYTES;
    if ours {
        stage.resolve(addr / PAGE_SIZE * PAGE_SIZE);
    }
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_fault_takes_some_time() {
        for fault in [by_a_thread, inline] {
            match fault() {
                Ok(us) => assert!(us > 0.5, "{us}"),
                Err(e) => eprintln!("SKIPPED: {e}"),
            }
        }
    }
}
