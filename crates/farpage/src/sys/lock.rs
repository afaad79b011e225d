//! A lock in shared memory that survives the death of its holder.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{futex_wait, futex_wake};

/// Says which process slots of the domain are alive.
pub trait Peers: Send + Sync {
    /// False once the process in this slot can never run again.
    fn is_alive(&self, owner: u16) -> bool;
}

/// A lock word in shared memory: 0 = free, else the holder's process slot, with a bit for "someone waits".
///
/// If the holder dies, the next one takes the lock over and is told so ([`Locked::recovered`]): what the lock
/// protects may be half changed and has to be rebuilt from what it was derived from.
pub struct RobustLock {
    word: &'static AtomicU32,
}

const WAITERS: u32 = 1 << 31;

/// The lock is held; dropping it unlocks.
pub struct Locked<'a> {
    lock: &'a RobustLock,
    /// The last holder died with the lock held: rebuild what it protects.
    pub recovered: bool,
}

impl RobustLock {
    /// A lock over a shared word, which is 0 at creation.
    pub fn new(word: &'static AtomicU32) -> Self {
        Self { word }
    }

    /// Takes the lock for the process in slot `owner` (above 0).
    pub fn lock(&self, owner: u16, peers: &dyn Peers) -> Locked<'_> {
        loop {
            if let Some(locked) = self.lock_unless(owner, peers, &mut || false) {
                return locked;
            }
        }
    }

    /// As [`Self::lock`], but asks, at least every 10 ms while it has to wait, whether to give up.
    pub fn lock_unless(
        &self,
        owner: u16,
        peers: &dyn Peers,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Option<Locked<'_>> {
        let me = u32::from(owner);
        debug_assert!(me != 0);
        let mut spins = 0;
        let mut mark = 0;
        loop {
            // Acquire pairs with the Release of the last holder's unlock.
            match self.word.compare_exchange(0, me | mark, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Locked { lock: self, recovered: false }),
                Err(now) => {
                    let holder = (now & !WAITERS) as u16;
                    if spins < 100 {
                        spins += 1;
                        std::hint::spin_loop();
                        continue;
                    }
                    if now == 0 {
                        continue;
                    }
                    if holder != owner && !peers.is_alive(holder) {
                        let taken = self.word.compare_exchange(
                            now,
                            me | WAITERS,
                            Ordering::Acquire,
                            Ordering::Relaxed,
                        );
                        if taken.is_ok() {
                            return Some(Locked { lock: self, recovered: true });
                        }
                        continue;
                    }
                    if give_up() {
                        return None;
                    }
                    if now & WAITERS != 0
                        || self
                            .word
                            .compare_exchange(now, now | WAITERS, Ordering::Relaxed, Ordering::Relaxed)
                            .is_ok()
                    {
                        // Once we have slept we cannot know whether others still do: keep the mark.
                        mark = WAITERS;
                        // The timeout is for a holder that dies without waking anyone.
                        futex_wait(self.word, now | WAITERS, Some(Duration::from_millis(10)));
                    }
                }
            }
        }
    }
}

impl RobustLock {
    /// Who has it, by its slot.
    pub fn holder(&self) -> Option<u16> {
        let holder = (self.word.load(Ordering::Relaxed) & !WAITERS) as u16;
        (holder != 0).then_some(holder)
    }

    /// Takes it from a dead process, whose slot is still its own, and gives it to nobody.
    pub fn take_from(&self, dead: u16) {
        let is_his = |word: u32| ((word & !WAITERS) == u32::from(dead)).then_some(0);
        // Acquire, Release: what the dead did under the lock is seen by the next holder.
        if self.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, is_his).is_ok() {
            futex_wake(self.word, 1);
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Release: what was changed under the lock is seen by the next holder.
        if self.lock.word.swap(0, Ordering::Release) & WAITERS != 0 {
            futex_wake(self.lock.word, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    struct Alive(AtomicBool);
    impl Peers for Alive {
        fn is_alive(&self, _: u16) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn excludes_threads() {
        let word: &'static AtomicU32 = Box::leak(Box::default());
        let lock: &'static RobustLock = Box::leak(Box::new(RobustLock::new(word)));
        let value: &'static AtomicU32 = Box::leak(Box::default());
        let threads: Vec<_> = (1..5u16)
            .map(|owner| {
                std::thread::spawn(move || {
                    for _ in 0..2000 {
                        let held = lock.lock(owner, &Alive(AtomicBool::new(true)));
                        assert!(!held.recovered);
                        // A read and a write that only a lock makes one step.
                        let v = value.load(Ordering::Relaxed);
                        value.store(v + 1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(value.load(Ordering::Relaxed), 8000);
    }

    #[test]
    fn a_dead_holder_is_succeeded_and_said_so() {
        let word: &'static AtomicU32 = Box::leak(Box::default());
        let lock = RobustLock::new(word);
        let alive = Alive(AtomicBool::new(true));
        std::mem::forget(lock.lock(7, &alive));
        alive.0.store(false, Ordering::SeqCst);
        let held = lock.lock(8, &alive);
        assert!(held.recovered);
        drop(held);
        assert!(!lock.lock(9, &alive).recovered);
    }

    #[test]
    fn who_waits_may_give_up() {
        let word: &'static AtomicU32 = Box::leak(Box::default());
        let lock = RobustLock::new(word);
        let alive = Alive(AtomicBool::new(true));
        assert_eq!(lock.holder(), None);
        std::mem::forget(lock.lock(7, &alive));
        let mut asked = 0;
        let mut third = || {
            asked += 1;
            asked == 3
        };
        assert!(lock.lock_unless(8, &alive, &mut third).is_none());
        assert_eq!((asked, lock.holder()), (3, Some(7)));
        lock.take_from(8);
        assert_eq!(lock.holder(), Some(7));
        lock.take_from(7);
        assert!(lock.lock_unless(8, &alive, &mut || true).is_some());
    }
}
