//! What the kernel itself takes for a page fault that a thread of the program resolves: userfaultfd, one page moved in by a
//! handler on the faulting thread's CPU, and nothing else. No device, no checksum, no reclaim: no handler thread can be faster.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farpage::PAGE_SIZE;
use farpage::sys::uffd::{self, MSG_BATCH, Msg, Uffd, features};

use super::data::Random;
use super::memory::Region;

/// Pages that are faulted in, in random order, 64 MiB.
const PAGES: usize = 16_384;

/// Microseconds a fault. An error: no permission, or a kernel without `UFFDIO_MOVE`.
pub fn fault() -> io::Result<f64> {
    let memory = Region::new((PAGES * PAGE_SIZE) as u64)?;
    let frames = Region::new((PAGES * PAGE_SIZE) as u64)?;
    (0..PAGES).for_each(|i| frames.page(i)[0].store(1, Ordering::Relaxed));
    let uffd = Uffd::open(features::MOVE)?;
    let at = |region: &Region, i: usize| region.page(i).as_ptr() as usize;
    uffd.register(at(&memory, 0), PAGES * PAGE_SIZE)?;
    let mut order: Vec<usize> = (0..PAGES).collect();
    let mut random = Random::new(1);
    (1..PAGES).rev().for_each(|i| order.swap(i, random.below(i + 1)));

    let allowed = rustix::thread::sched_getaffinity(None)?;
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|&c| allowed.is_set(c)).unwrap_or(0) as u32;
    let (done, failed) = (AtomicBool::new(false), AtomicBool::new(false));
    let time = std::thread::scope(|s| {
        s.spawn(|| {
            // As farpage's handlers do: such a thread makes way at once for the one that it wakes.
            farpage::sys::bind(0, cpu);
            farpage::sys::set_idle_policy(0, true);
            let mut messages = [Msg::Unknown(0); MSG_BATCH];
            while !done.load(Ordering::Relaxed) {
                let n = uffd::read(uffd.raw(), &mut messages).unwrap_or(0);
                if n == 0 {
                    uffd::wait(uffd.raw(), -1, Some(Duration::from_millis(20)));
                }
                for m in &messages[..n] {
                    let Msg::Fault { addr, .. } = *m else { continue };
                    let frame = at(&frames, (addr - at(&memory, 0)) / PAGE_SIZE);
                    if uffd.move_pages(addr, frame, PAGE_SIZE, false).1.is_some() {
                        failed.store(true, Ordering::Relaxed);
                        // It gets a page of zeros instead of waiting for ever.
                        let _waiting = uffd.unregister(at(&memory, 0), PAGES * PAGE_SIZE);
                    }
                    uffd::wake(uffd.raw(), addr, PAGE_SIZE);
                }
            }
        });
        let faulting = s.spawn(|| {
            farpage::sys::bind(0, cpu);
            let began = Instant::now();
            let sum: u64 = order.iter().map(|&i| memory.page(i)[0].load(Ordering::Relaxed)).sum();
            let time = began.elapsed();
            done.store(true, Ordering::Relaxed);
            if sum != PAGES as u64 {
                failed.store(true, Ordering::Relaxed);
            }
            time
        });
        faulting.join()
    });
    match time {
        Ok(time) if !failed.load(Ordering::Relaxed) => Ok(time.as_secs_f64() * 1e6 / PAGES as f64),
        _ => Err(io::Error::other("UFFDIO_MOVE does not work here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_fault_takes_some_time() {
        match fault() {
            Ok(us) => assert!(us > 0.5, "{us}"),
            Err(e) => eprintln!("SKIPPED: {e}"),
        }
    }
}
