//! Who uses a DAX file, and what he holds of it.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use super::table::Table;
use crate::PAGE_SIZE;
use crate::frame::ledger::{Extent, HolderKind};
use crate::frame::{Owner, Pfn};

/// One process that has the file open.
///
/// ```
/// use farpage::Pin;
/// use farpage::dax::{DaxOptions, Holding};
/// use farpage::pagemap::HolderKind;
///
/// # let dir = tempfile::tempdir()?;
/// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// # let file = options.create(dir.path().join("file"))?;
/// file.write_at(&[1; 8192], 0)?;
/// let pin = file.pin(4096..8192, Pin::Short)?;
/// let users = file.users();
/// assert_eq!(users[0].pid, std::process::id());
/// assert_eq!(users[0].holds, [Holding { kind: HolderKind::Pin, range: 4096..8192 }]);
/// assert!(users[0].to_string().ends_with(") has a pin of 0x1000..0x2000"));
/// assert!(file.audit().is_empty(), "counts and records agree");
/// # drop(pin);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number, as it sees itself (another one in another pid namespace).
    pub pid: u32,
    /// The name of its command, at most 15 bytes.
    pub command: String,
    /// What it holds.
    pub holds: Vec<Holding>,
}

/// Pages that a process holds.
///
/// See the example of [`User`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// What for: a mapping, a pin, a long-term pin.
    pub kind: HolderKind,
    /// Which bytes of the file, whole pages.
    pub range: Range<u64>,
}

/// A count that differs from the references that are recorded.
///
/// What [`DaxFile::audit`](super::DaxFile::audit) finds: see the example of [`User`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where in the file the page, or huge page, is.
    pub offset: u64,
    /// Its count.
    pub count: u32,
    /// The references that are recorded.
    pub recorded: u32,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)?;
        for (i, hold) in self.holds.iter().enumerate() {
            write!(f, "{} {hold}", if i == 0 { " has a" } else { ", a" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {:#x}..{:#x}", self.kind, self.range.start, self.range.end)
    }
}

/// The bytes of the file that are these pages.
pub(super) fn bytes(pages: &Range<Pfn>) -> Range<u64> {
    u64::from(pages.start) * PAGE_SIZE as u64..u64::from(pages.end) * PAGE_SIZE as u64
}

fn overlap(held: &Range<Pfn>, pages: &Range<Pfn>) -> Option<Range<Pfn>> {
    let part = held.start.max(pages.start)..held.end.min(pages.end);
    (!part.is_empty()).then_some(part)
}

/// These processes, with what they hold of these pages: neighbours of one kind as one.
pub(super) fn users_of(
    mut held: Vec<(Owner, HolderKind, Range<Pfn>)>,
    living: Vec<(Owner, u32, String)>,
    pages: &Range<Pfn>,
) -> Vec<User> {
    let mut holds: HashMap<Owner, Vec<Holding>> = HashMap::new();
    held.sort_by_key(|(owner, kind, pages)| (*owner, *kind, pages.start));
    for (owner, kind, held) in held {
        let Some(part) = overlap(&held, pages) else { continue };
        let range = bytes(&part);
        let of_owner = holds.entry(owner).or_default();
        match of_owner.last_mut() {
            Some(last) if last.kind == kind && last.range.end == range.start => last.range.end = range.end,
            _ => of_owner.push(Holding { kind, range }),
        }
    }
    living
        .into_iter()
        .map(|(owner, pid, command)| User { pid, command, holds: holds.remove(&owner).unwrap_or_default() })
        .collect()
}

impl Table {
    /// Those who hold some of these pages.
    pub(super) fn holders_of(&self, pages: &Range<Pfn>) -> Vec<User> {
        let mut users = self.users(pages);
        users.retain(|user| !user.holds.is_empty());
        users
    }

    /// The one in this slot, if he has the file open.
    pub(super) fn user(&self, owner: Option<Owner>) -> Vec<User> {
        let named = self.living().into_iter().filter(|(slot, ..)| Some(*slot) == owner);
        named.map(|(_, pid, command)| User { pid, command, holds: Vec::new() }).collect()
    }

    /// All who have the file open, with what they hold of these pages.
    pub(super) fn users(&self, pages: &Range<Pfn>) -> Vec<User> {
        let held = self.pagemap().ledger.iter().map(|(_, e)| (e.owner, e.kind, self.pages_held(&e)));
        users_of(held.collect(), self.living(), pages)
    }

    /// Whether some page of these is pinned, by the ledger.
    pub(super) fn is_pinned(&self, pages: &Range<Pfn>) -> bool {
        let pins = |e: &Extent| matches!(e.kind, HolderKind::Pin | HolderKind::LongPin);
        self.pagemap().ledger.iter().any(|(_, e)| pins(&e) && overlap(&self.pages_held(&e), pages).is_some())
    }

    /// Compares each count with what is recorded, looking again at those that differ: others may be at work meanwhile.
    pub(super) fn differences(&self) -> Vec<Difference> {
        let mut differences = self.differences_now();
        for _ in 0..50 {
            if differences.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
            let again = self.differences_now();
            differences.retain(|d| again.contains(d));
        }
        differences
    }

    fn differences_now(&self) -> Vec<Difference> {
        let map = self.pagemap();
        let mut recorded: HashMap<Pfn, u32> = HashMap::new();
        for (_, e) in map.ledger.iter() {
            (e.pfn..e.pfn + e.len).for_each(|pfn| *recorded.entry(pfn).or_default() += 1);
        }
        let counts: HashMap<Pfn, u32> = map.frames.in_use().collect();
        let mut pages: Vec<Pfn> = recorded.keys().chain(counts.keys()).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        let difference = |pfn| {
            let count = counts.get(&pfn).copied().unwrap_or(0);
            let recorded = recorded.get(&pfn).copied().unwrap_or(0);
            (count != recorded).then(|| Difference {
                offset: bytes(&self.pages_of(pfn)).start,
                count,
                recorded,
            })
        };
        pages.into_iter().filter_map(difference).collect()
    }
}
