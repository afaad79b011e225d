//! The launcher's side: learning of every end in the tree and giving back what the dead held.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use super::child;
use super::layout::{self, WINDOW};
use super::slot::state;
use super::{Audit, Config, Counter, Domain, DomainError, Slot, Stats};
use crate::frame::{Owner, Pfn};
use crate::sys::{FUTEX_OWNER_DIED, SharedMap};

/// The creator of a domain, who outlives its processes and cleans up after them.
pub struct Launcher {
    pub(super) domain: Domain,
    me: Owner,
    /// When it has last looked for children (milliseconds).
    pub(super) looked: AtomicU64,
}

impl Launcher {
    /// Creates a domain; this process becomes its launcher.
    ///
    /// # Errors
    /// As [`Domain::create`].
    pub fn create(config: &Config) -> Result<Self, DomainError> {
        let domain = Domain::create(config)?;
        let me = domain.take_slot(std::process::id())?;
        domain.words.joined.store(0, Ordering::Relaxed);
        Ok(Self { domain, me, looked: AtomicU64::new(0) })
    }

    /// The value of [`super::ENV_DOMAIN`] for the processes of the tree.
    pub fn env_value(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", self.domain.launcher, self.domain.file.as_raw_fd())
    }

    /// Gives back what processes held that have died or begun another program; returns how many.
    pub fn reap(&self) -> usize {
        self.look_for_children();
        self.reap_those(false)
    }

    fn reap_those(&self, ended: bool) -> usize {
        Reaper { domain: &self.domain, me: self.me }.reap_those(ended)
    }
}

/// Who gives back what the dead held.
pub(crate) struct Reaper<'a> {
    pub domain: &'a Domain,
    pub me: Owner,
}

impl Reaper<'_> {
    /// `ended`: the whole tree has ended, so that a slot prepared for a child that never came is nobody's.
    pub(super) fn reap_those(&self, ended: bool) -> usize {
        let mut n = 0;
        for (owner, slot) in self.domain.slots() {
            let gone = match slot.state.load(Ordering::Acquire) {
                // Prepared by a parent for the child that he is about to fork.
                state::FORMING if slot.pid.load(Ordering::Acquire) == 0 && child::is_unclaimed(slot) => ended,
                state::LIVE | state::FORMING => owner != self.me && has_ended(slot),
                _ => false,
            };
            if gone {
                self.give_back(owner);
                n += 1;
            }
        }
        n
    }
}

impl Launcher {
    /// Process `pid` is about to make a call that leaves plain references to its pages with the kernel. Must be
    /// called before that call runs. Returns how many address spaces were marked: a process that is being forked and
    /// has no number yet may be `pid`, so it is marked too; a process that is not managed is not.
    pub fn mark_plain_refs(&self, pid: u32) -> usize {
        let mut n = 0;
        for (owner, slot) in self.domain.slots() {
            let state = slot.state.load(Ordering::Acquire);
            if owner == self.me || !matches!(state, state::LIVE | state::FORMING) || slot.is_dead() {
                continue;
            }
            // Acquire pairs with the Release that stores the process's number.
            let theirs = slot.pid.load(Ordering::Acquire);
            if theirs == pid || (theirs == 0 && state == state::FORMING) {
                n += 1;
                // SeqCst pairs with the load in `Domain::may_recycle`.
                if slot.plain_refs.swap(1, Ordering::SeqCst) == 0 {
                    slot.count(Counter::PlainRefs, 1);
                }
            }
        }
        n
    }

    /// Plain references are possible in any process, now and later: nothing is recycled from now on.
    pub fn mark_all(&self) {
        // SeqCst pairs with the load in `Domain::may_recycle`.
        self.domain.words.plain_all.store(1, Ordering::SeqCst);
    }

    /// The numbers (as this process or, where they cannot know, as they themselves see them) of the managed processes that are alive.
    pub fn processes(&self) -> Vec<u32> {
        let alive = |(owner, slot): (Owner, &super::Slot)| {
            let live = slot.state.load(Ordering::Acquire) == state::LIVE && !slot.is_dead();
            (live && owner != self.me).then(|| slot.pid.load(Ordering::Acquire))
        };
        self.domain.slots().filter_map(alive).collect()
    }

    /// Waits until some process of the tree joins, ends, or `timeout` has passed.
    pub fn wait_change(&self, timeout: Duration) {
        let epoch = self.domain.words.epoch;
        let seen = epoch.load(Ordering::Acquire);
        let mut waits = vec![(epoch, seen)];
        for (_, slot) in self.domain.slots() {
            let life = slot.life.load(Ordering::Acquire);
            if life != 0 && matches!(slot.state.load(Ordering::Acquire), state::LIVE | state::FORMING) {
                if slot.is_dead() {
                    return;
                }
                waits.push((&slot.life, life));
            }
        }
        let late = Duration::from_millis(child::LATE_MS);
        let timeout = if self.domain.waits_for_children() { timeout.min(late) } else { timeout };
        crate::sys::futex_wait_any(&waits, timeout);
    }

    /// The counters so far.
    pub fn stats(&self) -> Stats {
        self.domain.stats()
    }

    /// See [`Domain::audit`] and, without `charges`, [`Domain::audit_frames`].
    ///
    /// # Errors
    /// As those.
    pub fn audit(&self, charges: bool) -> Result<Audit, DomainError> {
        if charges { self.domain.audit() } else { self.domain.audit_frames() }
    }

    /// After the tree has ended: gives everything back and counts the frames that still have references.
    pub fn finish(&self) -> Stats {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            self.reap_those(true);
            let busy = self
                .domain
                .slots()
                .any(|(o, s)| o != self.me && s.state.load(Ordering::Acquire) != state::FREE);
            if !busy || Instant::now() > deadline {
                let stats = self.stats();
                if !busy {
                    self.domain.give_back_memory(self.me);
                }
                return stats;
            }
            self.wait_change(Duration::from_millis(5));
        }
    }
}

impl Reaper<'_> {
    /// Puts every reference of a dead process, drops its entries, frees its slot.
    pub(crate) fn give_back(&self, owner: Owner) {
        let d = self.domain;
        let slot = d.slot(owner);
        // One reaper a slot; Acquire: everything the dead process did comes before.
        let was = slot.state.load(Ordering::Acquire);
        if slot.state.compare_exchange(was, state::REAPING, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return;
        }
        // What it locked is anybody's to take over. The kernel has marked those that had a life sign; nobody else will mark one
        // that died before, and its locks would be waited for for ever, by us first of all.
        slot.life.fetch_or(FUTEX_OWNER_DIED, Ordering::SeqCst);
        d.parent_has_ended(owner);
        // Its memory has gone with it.
        slot.charge.store(0, Ordering::SeqCst);
        slot.pinned.store(0, Ordering::SeqCst);
        // Before the slot can be another's: locks that the dead process held, changes that it left half done.
        d.pagemaps.iter().for_each(|map| map.repair(owner, self.me));
        let mut held = false;
        match d.map_window(owner) {
            Ok(window) => {
                held = self.put_entries(owner, &window);
                window.unmap();
            }
            Err(e) => eprintln!(
                "farpage: cannot give back the pages of process {}: {e}",
                slot.pid.load(Ordering::Relaxed)
            ),
        }
        for (past, c) in d.words.past.iter().zip(&slot.counters) {
            past.fetch_add(c.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
        if held {
            d.words.reaped.fetch_add(1, Ordering::Relaxed);
        }
        slot.oldest.store(u64::MAX, Ordering::Relaxed);
        slot.life.store(0, Ordering::Relaxed);
        slot.wanted.store(0, Ordering::Relaxed);
        slot.plain_refs.store(0, Ordering::Relaxed);
        slot.pid.store(0, Ordering::Relaxed);
        slot.parent.store(0, Ordering::Relaxed);
        // Release: whoever takes the slot next finds it clean.
        slot.state.store(state::FREE, Ordering::Release);
        d.changed();
    }

    fn put_entries(&self, owner: Owner, window: &SharedMap) -> bool {
        let d = self.domain;
        // Frames whose count and entry the dead process was changing: known by their mark.
        let transit: Vec<Vec<Pfn>> = d.pagemaps.iter().map(|p| p.frames.in_transit(owner)).collect();
        let mut published = vec![Vec::new(); transit.len()];
        let mut held: Vec<Vec<Pfn>> = vec![Vec::new(); transit.len()];
        d.each_entry(owner, window, |_, e| {
            if let Some((dev, pfn)) = e.frame() {
                if transit[dev as usize].contains(&pfn) {
                    published[dev as usize].push(pfn);
                }
                held[dev as usize].push(pfn);
            }
        });
        let any = held.iter().any(|h| !h.is_empty());
        for (i, map) in d.pagemaps.iter().enumerate() {
            for &pfn in &transit[i] {
                let published = published[i].contains(&pfn) || map.ledger.publishes(owner, pfn);
                if map.frames.recover(pfn, owner, published) {
                    map.free(&[pfn], self.me);
                }
            }
            for batch in held[i].chunks(256) {
                // Without a mark of ours: nobody reaps us, and another dead process's mark on one of them is ours to
                // clear, later.
                map.put(batch, self.me);
            }
            map.put_holds(owner, self.me);
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(e) = rustix::fs::fallocate(&d.file, hole, layout::window_offset(owner), WINDOW as u64) {
            eprintln!("farpage: cannot drop the page entries of an ended process: {e}");
        }
        any
    }
}

/// Whether the process in this slot has ended, or begun another program: for the launcher, in whose namespace numbers are meant.
pub(super) fn has_ended(slot: &Slot) -> bool {
    match (slot.state.load(Ordering::Acquire), slot.pid.load(Ordering::Acquire)) {
        // A forked child has a life sign before it says its number: a number means nothing in another namespace, and it stays the
        // same when the process begins another program.
        (state::FORMING, pid) if pid != 0 && slot.life.load(Ordering::Acquire) == 0 => !process_exists(pid),
        _ => slot.is_dead(),
    }
}

/// Whether a process exists and is not a zombie.
fn process_exists(pid: u32) -> bool {
    state_and_parent(pid).is_some_and(|(ended, _)| !ended)
}

/// Whether a process has ended and is only waited for, and its parent. `None`: there is none of this number.
pub(super) fn state_and_parent(pid: u32) -> Option<(bool, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field may contain anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((matches!(fields.next()?, "Z" | "X"), fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ram;
    use crate::domain::{counts_len, own_len};

    /// The number of a process that does not exist.
    const NOBODY: u32 = u32::MAX >> 1;

    fn launcher() -> Launcher {
        Launcher::create(&Config::small(&["ram:1M"])).unwrap()
    }

    #[test]
    fn a_childs_number_says_nothing_while_its_life_sign_does() {
        let launcher = launcher();
        let domain = Domain::attach(&launcher.env_value()).unwrap();
        // Numbers of another namespace may exist here or not.
        for number in [NOBODY, std::process::id()] {
            let slot = domain.slot(domain.take_slot(number).unwrap());
            slot.life.store(1, Ordering::SeqCst);
            assert_eq!((launcher.reap(), slot.state.load(Ordering::SeqCst)), (0, state::FORMING), "it lives");
            slot.life.fetch_or(FUTEX_OWNER_DIED, Ordering::SeqCst);
            assert_eq!((launcher.reap(), slot.state.load(Ordering::SeqCst)), (1, state::FREE));
            assert_eq!(slot.life.load(Ordering::SeqCst), 0);
        }
    }

    /// Gives back within ten seconds what `n` dead processes held.
    fn reaps(launcher: Launcher, n: usize) {
        let (said, reaped) = std::sync::mpsc::channel();
        std::thread::spawn(move || said.send(launcher.reap()));
        assert_eq!(reaped.recv_timeout(Duration::from_secs(10)), Ok(n), "it waits for the dead");
    }

    #[test]
    fn the_lock_of_one_who_died_before_he_had_a_life_sign_is_taken_over() {
        let launcher = launcher();
        let domain = Domain::attach(&launcher.env_value()).unwrap();
        // Who is seen to first died otherwise, and is not the one who is waited for.
        let other = domain.slot(domain.take_slot(NOBODY).unwrap());
        other.life.store(FUTEX_OWNER_DIED, Ordering::SeqCst);
        let dead = domain.take_slot(NOBODY).unwrap();
        let spec = &domain.config.devices[0];
        let area = domain.map.area(layout::DEVICES + counts_len(spec.frames()), own_len(spec));
        ram::lock_for_ever(1 << 20, area, dead, &*domain.peers);
        reaps(launcher, 2);
    }
}
