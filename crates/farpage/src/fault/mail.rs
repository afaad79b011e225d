//! Faults that one handler has read and another should resolve: the one on the CPU of the thread that waits.
//!
//! All handlers read from one queue, so one may get the fault of a thread whose own handler is just about to run. If it
//! resolved that it would wake the thread on another CPU, by an interrupt, and the thread's own handler would find
//! nothing to do and go to sleep: each of the two costs more than a fault.
//!
//! A box holds one fault. It is put there only while its owner is awake, and an owner looks into it once more when he has
//! said that he goes to sleep; so no fault is left behind. A handler that has nothing to do takes others' mail, too: its
//! owner may be waiting for a device, or for a CPU.

use crate::sys::point::{AtomicBool, AtomicU64, Ordering};

use super::follow::HANDLERS;
use crate::PAGE_SIZE;

/// How often a handler looks into its box before it goes to sleep: a microsecond or two.
const LOOKS: u32 = 60;
/// Bits of a thread's number (Linux: at most 2^22 threads).
const TID_BITS: u32 = 22;

struct Box {
    /// The page's number and the thread's; 0 = empty.
    fault: AtomicU64,
    /// False: its owner sleeps, or is about to.
    awake: AtomicBool,
}

/// The boxes of all handlers.
pub(crate) struct Mail([Box; HANDLERS]);

impl Mail {
    pub fn new() -> Self {
        Self([const { Box { fault: AtomicU64::new(0), awake: AtomicBool::new(false) } }; HANDLERS])
    }

    /// In a forked child: the faults were the parent's threads'.
    pub fn reset(&self) {
        for b in &self.0 {
            b.fault.store(0, Ordering::SeqCst);
            b.awake.store(false, Ordering::SeqCst);
        }
    }

    /// Gives a fault to handler `to`. False: it sleeps or has mail already; the caller keeps the fault.
    pub fn send(&self, to: usize, addr: usize, tid: u32) -> bool {
        let b = &self.0[to];
        let fault = ((addr / PAGE_SIZE) as u64) << TID_BITS | u64::from(tid);
        // SeqCst with `sleep`: either we see that the owner sleeps, or he sees the fault.
        if tid >> TID_BITS != 0
            || !b.awake.load(Ordering::SeqCst)
            || b.fault.compare_exchange(0, fault, Ordering::SeqCst, Ordering::Relaxed).is_err()
        {
            return false;
        }
        // If he went to sleep meanwhile it is taken back, unless somebody has taken it.
        b.awake.load(Ordering::SeqCst)
            || b.fault.compare_exchange(fault, 0, Ordering::SeqCst, Ordering::Relaxed).is_err()
    }

    fn take(&self, from: usize) -> Option<(usize, u32)> {
        let b = &self.0[from];
        if b.fault.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let fault = b.fault.swap(0, Ordering::SeqCst);
        let tid = fault & ((1 << TID_BITS) - 1);
        (fault != 0).then_some(((fault >> TID_BITS) as usize * PAGE_SIZE, tid as u32))
    }

    /// Mail of handler `me`, who has nothing else to do; waits a moment for it if there are others.
    pub fn mine(&self, me: usize, alone: bool) -> Option<(usize, u32)> {
        for _ in 0..if alone { 1 } else { LOOKS } {
            if let Some(fault) = self.take(me) {
                return Some(fault);
            }
            crate::sys::point::spin();
        }
        None
    }

    /// Handler `me` goes to sleep, unless there is mail for anyone.
    pub fn sleep(&self, me: usize) -> Option<(usize, u32)> {
        self.0[me].awake.store(false, Ordering::SeqCst);
        let fault = (0..HANDLERS).find_map(|other| self.take(other));
        if fault.is_some() {
            self.wake(me);
        }
        fault
    }

    /// Handler `me` is awake.
    pub fn wake(&self, me: usize) {
        self.0[me].awake.store(true, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn mail_reaches_its_owner_or_stays_with_its_sender() {
        let mail = Mail::new();
        assert!(!mail.send(1, 5 * PAGE_SIZE, 7), "the owner sleeps");
        mail.wake(1);
        assert!(mail.send(1, 5 * PAGE_SIZE, 7));
        assert!(!mail.send(1, 6 * PAGE_SIZE, 8), "the box is full");
        assert_eq!(mail.mine(0, false), None);
        assert_eq!(mail.mine(1, true), Some((5 * PAGE_SIZE, 7)));
        assert!(mail.send(1, 6 * PAGE_SIZE, 8));
        assert_eq!(mail.sleep(0), Some((6 * PAGE_SIZE, 8)), "nobody sleeps over another's mail");
        assert_eq!(mail.sleep(1), None);
        assert!(!mail.send(1, 5 * PAGE_SIZE, 1 << TID_BITS));
    }

    /// No fault is lost and none is served twice, while owners go to sleep and wake up.
    #[test]
    fn every_fault_is_served_once() {
        const N: usize = 50_000;
        let mail = Mail::new();
        let served: Vec<AtomicUsize> = (0..N).map(|_| AtomicUsize::new(0)).collect();
        let sent = AtomicBool::new(false);
        let serve = |fault: (usize, u32)| served[fault.0 / PAGE_SIZE].fetch_add(1, Ordering::SeqCst);
        std::thread::scope(|s| {
            s.spawn(|| {
                for i in 0..N {
                    if !mail.send(1, i * PAGE_SIZE, 9) {
                        serve((i * PAGE_SIZE, 9));
                    }
                }
                sent.store(true, Ordering::SeqCst);
            });
            s.spawn(|| {
                while !sent.load(Ordering::SeqCst) {
                    mail.wake(1);
                    while let Some(fault) = mail.mine(1, false) {
                        serve(fault);
                    }
                    mail.sleep(1).map(serve);
                }
            });
        });
        while let Some(fault) = mail.mine(1, true) {
            serve(fault);
        }
        assert!(served.iter().all(|n| n.load(Ordering::SeqCst) == 1));
    }
}
