//! The slots of a table: one for each process that uses it.
//!
//! A process shows that it lives in two ways. A robust futex of its agent thread is a word that anybody can look at, but the
//! agent dies at once with a signal, and so while another thread of the process may still be inside a system call that
//! nothing ends: making a hole, writing. So the slot of a process whose agent is gone is still its own while it has
//! its [`LifeLock`](crate::sys::LifeLock), which the kernel gives back when the last of its threads is gone.

use std::sync::atomic::{AtomicU32, Ordering};

use super::counts::no_memory;
use super::error::TableError;
use crate::PAGE_SIZE;
use crate::frame::{MAX_OWNER, Owner};
use crate::pagemap::SharedArea;
use crate::sys::FUTEX_OWNER_DIED;

/// Words of a slot, and their use.
const SLOT: usize = 16;
/// Bytes of all.
pub(super) const SLOTS: usize = (MAX_OWNER as usize + 1) * SLOT * 4;
pub(super) mod slot {
    pub const STATE: usize = 0;
    pub const PID: usize = 1;
    pub const LIFE: usize = 2;
    /// Not 0: it has the file open, or is about to.
    pub const USER: usize = 3;
    pub const COMMAND: usize = 4;
    /// Tells the life lock of one process in the slot from that of the next.
    pub const NUMBER: usize = 8;

    /// Its process has not raised its life sign yet; it holds the file's lock until it has.
    pub const FORMING: u32 = 1;
    pub const LIVE: u32 = 2;
}
/// Life locks are of bytes of the table's file from here on, where it has none.
const LIFE_LOCKS: i64 = 1 << 50;

/// The slots, and the number of the highest that was ever used.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    area: SharedArea,
    words: &'static [AtomicU32],
    used: &'static AtomicU32,
}

impl Slots {
    pub fn new(area: SharedArea, used: &'static AtomicU32) -> Self {
        Self { area, words: area.atomics32(), used }
    }

    pub fn of(&self, owner: Owner) -> &'static [AtomicU32] {
        &self.words[usize::from(owner) * SLOT..][..SLOT]
    }

    pub fn state(&self, owner: Owner) -> u32 {
        self.of(owner)[slot::STATE].load(Ordering::Acquire)
    }

    /// Whether some thread of the process can still run: it has a slot, and its life sign is up, or else its life lock is
    /// there. `is_locked` says of a byte of the table's file whether it is locked.
    pub fn is_alive(&self, owner: Owner, is_locked: impl Fn(i64) -> bool) -> bool {
        // Acquire pairs with the kernel's store when the owner died: all that its agent did comes before. What its other
        // threads did comes before they gave the life lock back, in a system call, after which ours asks.
        self.state(owner) == slot::LIVE
            && (self.of(owner)[slot::LIFE].load(Ordering::Acquire) & FUTEX_OWNER_DIED == 0
                || is_locked(self.life_lock(owner)))
    }

    /// Which byte of the table's file the process in this slot has locked while it lives.
    fn life_lock(&self, owner: Owner) -> i64 {
        // Relaxed: written before the life lock was had, by one whose life sign was seen.
        let number = self.of(owner)[slot::NUMBER].load(Ordering::Relaxed);
        LIFE_LOCKS + (i64::from(owner) << 32) + i64::from(number)
    }

    /// The byte for the next one in this slot, which is the caller's: nobody has ever had it locked in this table.
    pub fn next_life_lock(&self, owner: Owner) -> i64 {
        // Relaxed: only the owner of the slot writes it, and who reads it finds no such byte locked, or ours.
        self.of(owner)[slot::NUMBER].fetch_add(1, Ordering::Relaxed);
        self.life_lock(owner)
    }

    pub fn all(&self) -> impl Iterator<Item = Owner> + '_ {
        // Acquire pairs with `claim`: a slot that is in use is among them.
        1..=self.used.load(Ordering::Acquire).min(u32::from(MAX_OWNER)) as Owner
    }

    /// Those who have the file open and are alive: slot, process, command.
    pub fn living(&self, is_alive: impl Fn(Owner) -> bool) -> Vec<(Owner, u32, String)> {
        let uses = |owner: &Owner| self.of(*owner)[slot::USER].load(Ordering::Relaxed) != 0;
        let alive = self.all().filter(|owner| is_alive(*owner)).filter(uses);
        alive
            .map(|owner| {
                let slot = self.of(owner);
                let command: Vec<u8> = slot[slot::COMMAND..slot::COMMAND + 4]
                    .iter()
                    .flat_map(|w| w.load(Ordering::Relaxed).to_ne_bytes())
                    .take_while(|b| *b != 0)
                    .collect();
                let command = String::from_utf8_lossy(&command).into_owned();
                (owner, slot[slot::PID].load(Ordering::Relaxed), command)
            })
            .collect()
    }

    pub fn any_alive(&self, is_locked: impl Fn(i64) -> bool) -> bool {
        self.all().any(|owner| self.is_alive(owner, &is_locked))
    }

    /// One that is nobody's, with memory.
    fn free_one(&self) -> Result<Owner, TableError> {
        const IN_A_PAGE: Owner = (PAGE_SIZE / (SLOT * 4)) as Owner;
        for owner in 1..=MAX_OWNER {
            // Before the first look into a page of them.
            if owner == 1 || owner.is_multiple_of(IN_A_PAGE) {
                let page = usize::from(owner / IN_A_PAGE) * PAGE_SIZE;
                self.area.populate(page, PAGE_SIZE).map_err(no_memory)?;
            }
            // One that is forming was left by somebody who died with the lock.
            if matches!(self.state(owner), 0 | slot::FORMING) {
                return Ok(owner);
            }
        }
        Err(TableError::Full)
    }

    /// A slot for this process. The file's lock is held: nobody else forms one.
    pub fn claim(&self) -> Result<Owner, TableError> {
        let owner = self.free_one()?;
        // Before it is in use.
        self.used.fetch_max(u32::from(owner), Ordering::AcqRel);
        let slot = self.of(owner);
        slot[slot::STATE].store(slot::FORMING, Ordering::Relaxed);
        slot[slot::USER].store(0, Ordering::Relaxed);
        slot[slot::PID].store(std::process::id(), Ordering::Relaxed);
        let command = std::fs::read("/proc/self/comm").unwrap_or_default();
        let mut name = [0u8; 16];
        let len = command.iter().take(15).take_while(|b| **b != b'\n').count();
        name[..len].copy_from_slice(&command[..len]);
        for (word, bytes) in slot[slot::COMMAND..].iter().zip(name.as_chunks::<4>().0) {
            word.store(u32::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        Ok(owner)
    }
}
