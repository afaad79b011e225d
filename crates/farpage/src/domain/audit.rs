//! The audit: does every frame's count equal the references that can be found?
//!
//! The rule says that whoever can reach a page holds a reference. So the references can be looked for, one by one: in the
//! page entries of every process that has not been reaped, dead ones too, and wherever else references are held
//! ([`KINDS`]). What is found must be what the frame's word says.
//!
//! # While everything runs
//!
//! Nobody is stopped. Whoever changes a count and its entry marks the frame as *in transit* before and clears the mark
//! after, so between two looks at the words that agree and have no mark, count and entries did not change either, except if
//! the frame was put and taken again to the same count meanwhile. Hence:
//!
//! 1. All words are read, all references counted, all words read once more. A frame whose word has changed, has a mark or is
//!    frozen says nothing in this round; nor does one that a process refers to which is being given back just then
//!    (its references go before its entries do).
//! 2. A frame that was found right in any round is done with: motion makes a wrong frame look right only by the same
//!    rare chance as a right one wrong, and the next audit looks again.
//! 3. The others are looked at again, a little later each time. A lost or a forgotten reference does not come back: it is
//!    the same number in every round. So a difference is reported only if it was seen [`SEEN`] times with the same two
//!    numbers, and never otherwise in between. What was never at rest is counted as such and judged by the next audit.
//!
//! # DRAM
//!
//! What a process is charged for cannot be seen from outside: its ranges and grants are its own. So it is asked to count
//! by itself, at a moment when no page moves (`space/audit.rs`).
//!
//! # What it catches
//!
//! Rules broken by hand, one at a time (most of them for one page in 64), and the programs of `c_programs` and
//! `device_faults` in which the audit of `farpage run --audit` said so; `crates/farpage-tests/tests/audit.rs` makes differences
//! on purpose.
//!
//! | mutation | caught in |
//! |---|---|
//! | fork forgets the child's reference | `fork snapshot`, `fork modify` |
//! | dropped pages: the entries change, nothing is put | `races drop`, `mappings munmap` |
//! | settling forgets to put the old copy | `touch scattered` |
//! | settling forgets it where the page became same-filled | not there: no program does that to a page with a copy; `models.rs` |
//! | giving up copies forgets the put | `device::all-full` |
//! | the reaper forgets a put | `fork storm`, `fork killed` |
//! | `mremap` leaves the old entry | `races move`, `mappings fixed-move` |
//! | a page that is lost keeps its frame | `device::corrupt-store-poisons` |
//! | `munmap` uncharges a page too few | `races unmap`, `mappings munmap` |
//! | a forked child is charged for its parent's stock | `fork modify`, `fork workers` |
//! | a discard does not charge what the kernel gave meanwhile | `races give-up` (this was a bug) |

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::slot::state;
use super::{Domain, DomainError, Slot};
use crate::frame::{Look, Owner, Pfn};

/// A frame, by its device's number and its own.
type Frame = (u8, Pfn);
/// What is called with each reference.
type Found<'a> = &'a mut dyn FnMut(Frame);

/// A kind of reference: its name, and where those that one process holds are found.
struct Kind {
    /// As a report names it.
    name: &'static str,
    /// Calls the function with the frame of each.
    walk: fn(&Domain, Owner, Found<'_>) -> Result<(), DomainError>,
}

/// Every kind of reference that outlives a single call. Whoever makes another kind adds it here; it has to be found from
/// outside its process, as the one who gives back what a killed process held has to find it, too.
const KINDS: &[Kind] =
    &[Kind { name: "page entries", walk: page_entries }, Kind { name: "holds", walk: holds }];

/// What is not in a page entry is in the ledger of its pagemap: mappings, pins, drivers' allocations.
fn holds(domain: &Domain, owner: Owner, found: Found<'_>) -> Result<(), DomainError> {
    for map in &domain.pagemaps {
        for (_, extent) in map.ledger.of(owner) {
            (extent.pfn..extent.pfn + extent.len).for_each(|pfn| found((map.id, pfn)));
        }
    }
    Ok(())
}

/// Mapped and clean copies alike: each entry that names a frame holds one reference.
fn page_entries(domain: &Domain, owner: Owner, found: Found<'_>) -> Result<(), DomainError> {
    domain.for_entries(owner, |_, e| {
        if let Some(frame) = e.frame() {
            found(frame);
        }
    })
}

/// How long to wait before each further look.
const PAUSES_MS: [u64; 9] = [1, 1, 2, 4, 8, 16, 32, 32, 32];
/// How often a difference has to be seen.
const SEEN: u32 = 5;
/// How long a process has to count its DRAM.
const ANSWER: Duration = Duration::from_millis(400);
/// How often a charge that differs is counted again.
const RECOUNTS: u32 = 4;

/// The answer of a process whose pages others drop by raw system calls just then.
pub(crate) const UNCERTAIN: u64 = u64::MAX;

/// What an audit found.
///
/// ```
/// use farpage::{Domain, Target};
///
/// let space = Domain::builder().dram("8M").device("ram:16M").build()?.start_inline()?;
/// let v = space.region_from_fn(512 << 3, |i| i as u64)?;
/// space.migrate(v.pages(..), Target::Device(0))?;
/// let audit = space.domain.audit()?;
/// // Eight pages are on the device, each with one reference: this process's page entry.
/// assert_eq!((audit.frames, audit.references), (8, 8));
/// assert!(audit.is_right());
/// // What would be wrong says which frame or process it is, and both numbers.
/// audit.differences.iter().for_each(|d| println!("{d}: held by {} processes", d.holders.len()));
/// audit.charges.iter().for_each(|c| println!("{c}"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Audit {
    /// Frames in use, or named by a reference.
    pub frames: u64,
    /// References that were found to them.
    pub references: u64,
    /// Address spaces that were walked.
    pub processes: u64,
    /// Frames whose count is not the number of references.
    pub differences: Vec<Difference>,
    /// Frames that changed whenever they were looked at.
    pub moving: u64,
    /// Processes whose DRAM charge is not what is there.
    pub charges: Vec<ChargeDifference>,
    /// Processes that did not count their DRAM in time (stopped, very busy, or dropping pages by raw system calls).
    pub silent: Vec<u32>,
}

/// A frame whose count is wrong.
///
/// Part of an [`Audit`]: see the example of [`Audit`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// The device's name.
    pub device: String,
    /// The frame.
    pub frame: Pfn,
    /// The count in its word.
    pub count: u32,
    /// The references that were found.
    pub references: u32,
    /// Who has these.
    pub holders: Vec<Holding>,
}

/// References of one process to one frame.
///
/// Part of an [`Audit`]: see the example of [`Audit`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Holding {
    /// The process.
    pub process: u32,
    /// Where it holds them.
    pub kind: &'static str,
    /// How many.
    pub references: u32,
}

/// A process whose DRAM charge is wrong.
///
/// Part of an [`Audit`]: see the example of [`Audit`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ChargeDifference {
    /// The process.
    pub process: u32,
    /// Pages that it is charged for.
    pub charged: u64,
    /// Pages that it has, grants in full.
    pub found: u64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, frame, count, references, holders } = self;
        write!(f, "device {device}, frame {frame}: count {count}, references found {references}")?;
        for (i, h) in holders.iter().enumerate() {
            let before = if i == 0 { " (" } else { ", " };
            write!(f, "{before}process {}: {} in {}", h.process, h.references, h.kind)?;
        }
        if holders.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

impl fmt::Display for ChargeDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { process, charged, found } = self;
        write!(f, "process {process}: charged for {charged} pages of DRAM, has {found}")
    }
}

impl Audit {
    /// Whether all that could be judged is right.
    pub fn is_right(&self) -> bool {
        self.differences.is_empty() && self.charges.is_empty()
    }
}

/// One look at everything.
struct Round {
    before: Vec<Vec<Look>>,
    after: Vec<Vec<Look>>,
    /// References to the frames that a device has.
    found: Vec<Vec<u32>>,
    /// References to others: entries that make no sense.
    strangers: BTreeMap<Frame, u32>,
    /// Frames of processes that were being given back meanwhile.
    uncertain: HashSet<Frame>,
    processes: u64,
}

/// What a round says of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Changing,
    Is { count: u32, references: u32 },
}

impl Round {
    fn judge(&self, frame: Frame) -> Verdict {
        if let Some(&references) = self.strangers.get(&frame) {
            return Verdict::Is { count: 0, references };
        }
        let (device, pfn) = (frame.0 as usize, frame.1 as usize);
        let word = |looks: &[Vec<Look>]| looks[device].get(pfn).copied().unwrap_or_default();
        let (before, after) = (word(&self.before), word(&self.after));
        if before != after || before.is_changing() || self.uncertain.contains(&frame) {
            return Verdict::Changing;
        }
        let references = self.found[device].get(pfn).copied().unwrap_or(0);
        Verdict::Is { count: before.count(), references }
    }

    /// Every frame of which there is something to say.
    fn frames(&self) -> Vec<Frame> {
        let mut all: Vec<Frame> = self.strangers.keys().copied().collect();
        for (device, (words, found)) in self.before.iter().zip(&self.found).enumerate() {
            let n = words.len().max(found.len());
            all.extend((0..n).filter_map(|i| {
                let used = words.get(i).is_some_and(|w| *w != Look::default());
                (used || found.get(i).is_some_and(|n| *n > 0)).then_some((device as u8, i as Pfn))
            }));
        }
        all
    }
}

impl Domain {
    /// Compares every frame's count with the references that can be found, and every process's DRAM charge with what is
    /// there, while everything runs. See the module's text for what it believes.
    ///
    /// Not to be called by a manager thread, which is the one that answers for its process.
    ///
    /// # Errors
    /// [`DomainError::Sys`]: the page entries of a process cannot be mapped.
    pub fn audit(&self) -> Result<Audit, DomainError> {
        let mut audit = self.audit_frames()?;
        self.audit_charges(&mut audit);
        Ok(audit)
    }

    /// As [`Domain::audit`], without the DRAM charges: asks nobody anything.
    ///
    /// # Errors
    /// As [`Domain::audit`].
    pub fn audit_frames(&self) -> Result<Audit, DomainError> {
        let first = self.round()?;
        let mut audit = Audit { processes: first.processes, ..Audit::default() };
        // Those not found right yet, each with what was seen of it, and how often.
        let mut open: Vec<(Frame, Verdict, u32)> =
            first.frames().into_iter().map(|f| (f, Verdict::Changing, 0)).collect();
        audit.settle(&first, &mut open);
        for pause in PAUSES_MS {
            if open.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(pause));
            audit.settle(&self.round()?, &mut open);
        }
        for (frame, verdict, seen) in open {
            audit.frames += 1;
            match verdict {
                Verdict::Is { count, references } if seen >= SEEN => {
                    audit.references += u64::from(references);
                    audit.differences.push(self.difference(frame, count, references)?);
                }
                _ => audit.moving += 1,
            }
        }
        Ok(audit)
    }

    fn round(&self) -> Result<Round, DomainError> {
        let look = || self.pagemaps.iter().map(|p| p.frames.look()).collect();
        let mut round = Round {
            before: look(),
            after: Vec::new(),
            found: vec![Vec::new(); self.pagemaps.len()],
            strangers: BTreeMap::new(),
            uncertain: HashSet::new(),
            processes: 0,
        };
        for (owner, slot) in self.slots() {
            let state = || (slot.state.load(Ordering::Acquire), slot.pid.load(Ordering::Acquire));
            let began = state();
            // Who joins after this look changes the words of the frames that he shares.
            if began.0 == state::FREE {
                continue;
            }
            round.processes += u64::from(began.0 != state::FORMING);
            let mut theirs = Vec::new();
            self.references_of(owner, &mut |_, frame| theirs.push(frame))?;
            // Acquire of the entries comes before this.
            if began.0 == state::REAPING || state() != began {
                round.uncertain.extend(&theirs);
            }
            for (device, pfn) in theirs {
                match self.pagemaps.get(device as usize) {
                    Some(map) if (pfn as usize) < map.frames.len() => {
                        let found = &mut round.found[device as usize];
                        if found.len() <= pfn as usize {
                            found.resize(pfn as usize + 1, 0);
                        }
                        found[pfn as usize] += 1;
                    }
                    _ => *round.strangers.entry((device, pfn)).or_default() += 1,
                }
            }
        }
        round.after = look();
        Ok(round)
    }

    /// Every reference of one process.
    fn references_of(
        &self,
        owner: Owner,
        found: &mut dyn FnMut(&'static str, Frame),
    ) -> Result<(), DomainError> {
        KINDS.iter().try_for_each(|k| (k.walk)(self, owner, &mut |frame| found(k.name, frame)))
    }

    /// The report of a difference: who has the references that were found.
    fn difference(&self, frame: Frame, count: u32, references: u32) -> Result<Difference, DomainError> {
        let mut holders: Vec<Holding> = Vec::new();
        for (owner, slot) in self.slots() {
            if slot.state.load(Ordering::Acquire) == state::FREE {
                continue;
            }
            let process = slot.pid.load(Ordering::Acquire);
            self.references_of(owner, &mut |kind, f| {
                if f != frame {
                    return;
                }
                match holders.last_mut().filter(|h| h.process == process && h.kind == kind) {
                    Some(h) => h.references += 1,
                    None => holders.push(Holding { process, kind, references: 1 }),
                }
            })?;
        }
        let map = self.pagemaps.get(frame.0 as usize);
        let device = map.map_or_else(|| format!("number {}", frame.0), |m| m.device.name().into());
        Ok(Difference { device, frame: frame.1, count, references, holders })
    }

    /// Asks every process to count its DRAM.
    fn audit_charges(&self, audit: &mut Audit) {
        // The slot, what was answered last, and whether it was the same each time.
        let mut open: Vec<(Owner, Option<i64>)> = self.askable().map(|(o, _)| (o, None)).collect();
        for _ in 0..RECOUNTS {
            let asked: Vec<(Owner, u32)> = open.iter().map(|&(o, _)| (o, ask(self.slot(o)))).collect();
            let deadline = Instant::now() + ANSWER;
            let mut still = Vec::new();
            for ((owner, question), (_, before)) in asked.into_iter().zip(open) {
                let slot = self.slot(owner);
                let pid = slot.pid.load(Ordering::Acquire);
                match answer(slot, question, deadline) {
                    Some((charged, found)) if charged != found => {
                        let by = charged as i64 - found as i64;
                        // Another number than before: it is changing.
                        if before.is_none_or(|b| b == by) {
                            still.push((owner, Some(by), ChargeDifference { process: pid, charged, found }));
                        }
                    }
                    Some(_) => {}
                    None if slot.is_dead() || slot.pid.load(Ordering::Acquire) != pid => {}
                    None => audit.silent.push(pid),
                }
            }
            open = still.iter().map(|s| (s.0, s.1)).collect();
            audit.charges = still.into_iter().map(|s| s.2).collect();
            if open.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        audit.silent.sort_unstable();
        audit.silent.dedup();
    }

    /// The processes that can answer.
    fn askable(&self) -> impl Iterator<Item = (Owner, &'static Slot)> + '_ {
        self.slots().filter(|(_, s)| s.state.load(Ordering::Acquire) == state::LIVE && !s.is_dead())
    }
}

/// Has a process count its DRAM; the number of the question.
fn ask(slot: &Slot) -> u32 {
    let question = slot.audit_asked.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
    wake_worker(slot);
    question
}

fn wake_worker(slot: &Slot) {
    slot.work.fetch_add(1, Ordering::SeqCst);
    crate::sys::futex_wake(&slot.work, i32::MAX);
}

/// The answer: pages charged and pages found. `None`: there is none by the deadline.
fn answer(slot: &Slot, question: u32, deadline: Instant) -> Option<(u64, u64)> {
    loop {
        // Acquire pairs with the Release in `Space::answer_audit`.
        let answered = slot.audit_answered.load(Ordering::Acquire);
        if answered.wrapping_sub(question) as i32 >= 0 {
            let answer = slot.audit_answer.load(Ordering::Relaxed);
            return (answer != UNCERTAIN).then_some((answer >> 32, answer & u64::from(u32::MAX)));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || slot.is_dead() {
            return None;
        }
        crate::sys::futex_wait(&slot.audit_answered, answered, Some(left.min(Duration::from_millis(5))));
        // It may have had no quiet moment the last time.
        wake_worker(slot);
    }
}

impl Audit {
    /// Takes those out of `open` that a round found right, and notes what it says of the others.
    fn settle(&mut self, round: &Round, open: &mut Vec<(Frame, Verdict, u32)>) {
        open.retain_mut(|(frame, last, seen)| match round.judge(*frame) {
            Verdict::Is { count, references } if count == references => {
                self.frames += u64::from(count > 0);
                self.references += u64::from(references);
                false
            }
            Verdict::Changing => true,
            verdict => {
                *seen = if *last == verdict { *seen + 1 } else { 1 };
                *last = verdict;
                true
            }
        });
    }
}
