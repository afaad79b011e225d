//! Taking device memory away (Linux: `memunmap_pages`): no new references, what can move moves, then the rest is
//! waited for, and only when every count is 0 the memory goes.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{NotLive, Pagemap};
use crate::frame::ledger::HolderKind;
use crate::frame::live::Phase;
use crate::frame::{Owner, Pfn};

/// Frames that an error names.
const NAMED: usize = 16;
/// What moves is asked to again so often while the rest is waited for.
const ROUND: Duration = Duration::from_millis(20);

/// Who holds references to a frame.
///
/// See the example of [`UnregisterError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The process slot.
    pub owner: Owner,
    /// What for.
    pub kind: HolderKind,
    /// How many references.
    pub refs: u32,
}

/// A frame that somebody holds.
///
/// See the example of [`UnregisterError`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The frame.
    pub pfn: Pfn,
    /// Its references; 0: it is just being freed.
    pub refs: u32,
    /// Who holds them, as far as it is known.
    pub holders: Vec<Holder>,
}

impl Held {
    /// References of which nobody said what they are: readers for a moment, or a bug.
    pub fn unknown(&self) -> u32 {
        self.refs.saturating_sub(self.holders.iter().map(|h| h.refs).sum())
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = if self.refs == 1 { "" } else { "s" };
        write!(f, "frame {} ({} reference{many}", self.pfn, self.refs)?;
        for (i, h) in self.holders.iter().enumerate() {
            let sep = if i == 0 { ": " } else { ", " };
            write!(f, "{sep}{} {} of process slot {}", h.refs, h.kind, h.owner)?;
        }
        match self.unknown() {
            0 => write!(f, ")"),
            n => write!(f, "{} {n} unknown)", if self.holders.is_empty() { ":" } else { "," }),
        }
    }
}

/// Those who have pages in a pagemap and keep their own records of them (page entries): asked when it is to go.
///
/// ```
/// use std::time::Duration;
///
/// use farpage::device::memory::MemorySpec;
/// use farpage::pagemap::{Hold, Holder, HolderKind, Owner, Pagemap, Pfn, Registration, SharedArea, Tenants};
///
/// const ME: Owner = 1;
///
/// /// Somebody who can do without his frames.
/// struct Cache<'m>(Vec<Hold<'m>>);
///
/// impl Tenants for Cache<'_> {
///     fn migrate(&mut self, _: &Pagemap, pfns: &[Pfn]) {
///         self.0.retain(|hold| !pfns.contains(&hold.pfn()));
///     }
///     fn holders(&mut self, _: &Pagemap, _: &[Pfn]) -> Vec<(Pfn, Holder)> {
///         Vec::new() // a hold is in the ledger
///     }
/// }
///
/// let memory = "generic:memfd:1M".parse::<MemorySpec>()?.create()?;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
/// let map = Pagemap::register(Registration::memory(0, memory), counts, true)?;
/// let mut cache = Cache(Vec::new());
/// for _ in 0..10 {
///     cache.0.push(map.alloc_held(ME, HolderKind::Driver, 1, 1)?);
/// }
/// map.unregister(&mut cache, ME, Duration::from_secs(5))?;
/// assert!(cache.0.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Tenants {
    /// Moves what can be moved out of these frames. Whatever stays is waited for, and asked about again.
    fn migrate(&mut self, map: &Pagemap, pfns: &[Pfn]);

    /// Who holds references to these frames. What is in the pagemap's own ledger is known already.
    fn holders(&mut self, map: &Pagemap, pfns: &[Pfn]) -> Vec<(Pfn, Holder)>;
}

/// Nobody: for memory that is only held by mappings, pins and drivers.
impl Tenants for () {
    fn migrate(&mut self, _map: &Pagemap, _pfns: &[Pfn]) {}

    fn holders(&mut self, _map: &Pagemap, _pfns: &[Pfn]) -> Vec<(Pfn, Holder)> {
        Vec::new()
    }
}

/// Why memory could not be taken away.
///
/// ```
/// use std::time::Duration;
///
/// use farpage::device::memory::MemorySpec;
/// use farpage::pagemap::{Holder, HolderKind, Owner, Pagemap, Registration, SharedArea, UnregisterError};
///
/// const ME: Owner = 1;
/// let memory = "generic:memfd:1M".parse::<MemorySpec>()?.create()?;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
/// let map = Pagemap::register(Registration::memory(0, memory), counts, true)?;
/// let mapping = map.map_new(ME, 4096, 4096)?;
/// match map.unregister(&mut (), ME, Duration::ZERO) {
///     Err(UnregisterError::Held { held, total: 1, .. }) => {
///         assert_eq!((held[0].pfn, held[0].refs, held[0].unknown()), (mapping.hold().pfn(), 1, 0));
///         assert_eq!(held[0].holders, [Holder { owner: ME, kind: HolderKind::Mapping, refs: 1 }]);
///     }
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnregisterError {
    /// Frames are still held. The first of them, and how many there are.
    #[error("{} of {name} {} still held: {}", frames(*.total), if *.total == 1 { "is" } else { "are" }, list(.held, *.total))]
    Held {
        /// The device.
        name: String,
        /// The first of them.
        held: Vec<Held>,
        /// How many there are.
        total: usize,
    },
    /// Somebody has a live reference to the pagemap itself.
    #[error("process slot {owner} still works with {name} ({refs} live references)")]
    Busy {
        /// The device.
        name: String,
        /// The process slot.
        owner: Owner,
        /// How many.
        refs: u32,
    },
    /// It was not registered, or somebody else has just unregistered it.
    #[error(transparent)]
    NotLive(#[from] NotLive),
    /// Nobody holds a frame, but the memory could not be given back to the system.
    #[error("cannot give the memory back: {0}")]
    Remove(Errno),
}

fn frames(n: usize) -> String {
    format!("{n} frame{}", if n == 1 { "" } else { "s" })
}

fn list(held: &[Held], total: usize) -> String {
    let mut text: Vec<String> = held.iter().map(Held::to_string).collect();
    if total > held.len() {
        text.push(format!("and {} more", total - held.len()));
    }
    text.join("; ")
}

impl Pagemap {
    /// Takes the memory away: gives no new references from now on, has `tenants` move their pages, waits until every
    /// count is 0, at most `timeout`, and gives the memory back to the system. It can then be registered again. `owner`
    /// is the caller.
    ///
    /// After an error it stays without new references: call again to go on waiting, or [`Self::resume`].
    ///
    /// # Errors
    /// See [`UnregisterError`]; none of them takes anything from those who hold frames.
    pub fn unregister(
        &self,
        tenants: &mut dyn Tenants,
        owner: Owner,
        timeout: Duration,
    ) -> Result<(), UnregisterError> {
        let deadline = crate::sys::after(Instant::now(), timeout);
        while !self.live.begin_remove(owner) {
            match self.live.phase() {
                Phase::Fresh | Phase::Gone => return Err(NotLive::Unregistered.into()),
                // Another is just at it.
                _ if Instant::now() >= deadline => return Err(NotLive::Unregistering.into()),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        let removed = self.drain(tenants, deadline).and_then(|()| {
            // Only after the last reference, and before anyone can register it again.
            self.device.ops().remove(owner).map_err(UnregisterError::Remove)
        });
        self.live.finish_remove(owner, removed.is_ok());
        removed
    }

    /// Waits until every count is 0.
    fn drain(&self, tenants: &mut dyn Tenants, deadline: Instant) -> Result<(), UnregisterError> {
        let busy = |(owner, refs)| UnregisterError::Busy { name: self.name().to_owned(), owner, refs };
        self.live.drain(deadline).map_err(busy)?;
        // From here on every allocation that there will ever be is seen in the counts.
        loop {
            let held: Vec<Pfn> = self.frames.in_use().map(|(pfn, _)| pfn).collect();
            if held.is_empty() {
                return Ok(());
            }
            tenants.migrate(self, &held);
            let left = deadline.saturating_duration_since(Instant::now());
            let end = Instant::now() + left.min(ROUND);
            let wait = |pfn: Pfn| self.frames.wait_idle(pfn, end.saturating_duration_since(Instant::now()));
            if !held.into_iter().all(wait) && left.is_zero() {
                return Err(self.still_held(tenants));
            }
        }
    }

    /// Makes memory live again of which [`Self::unregister`] has failed. False: it is not in that state. `owner` is the
    /// caller.
    pub fn resume(&self, owner: Owner) -> bool {
        let resumes = self.live.begin_resume(owner);
        if resumes {
            self.live.finish_open(owner);
        }
        resumes
    }

    fn still_held(&self, tenants: &mut dyn Tenants) -> UnregisterError {
        let frames: Vec<(Pfn, u32)> = self.frames.in_use().collect();
        let named: Vec<Pfn> = frames.iter().take(NAMED).map(|(pfn, _)| *pfn).collect();
        let tenants = tenants.holders(self, &named);
        let held = frames.iter().take(NAMED).map(|&(pfn, refs)| {
            let mut holders = self.holders(pfn);
            holders.extend(tenants.iter().filter(|(p, _)| *p == pfn).map(|(_, holder)| *holder));
            Held { pfn, refs, holders }
        });
        UnregisterError::Held { name: self.name().to_owned(), held: held.collect(), total: frames.len() }
    }

    /// Who holds the frame, by the ledger.
    pub fn holders(&self, pfn: Pfn) -> Vec<Holder> {
        let mut holders: Vec<Holder> = Vec::new();
        for (_, e) in self.ledger.iter().filter(|(_, e)| e.covers(pfn)) {
            match holders.iter_mut().find(|h| (h.owner, h.kind) == (e.owner, e.kind)) {
                Some(holder) => holder.refs += 1,
                None => holders.push(Holder { owner: e.owner, kind: e.kind, refs: 1 }),
            }
        }
        holders
    }
}
