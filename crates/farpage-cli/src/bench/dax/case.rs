//! What is measured, and what it may cost.

use std::ops::Range;

use super::{ELSEWHERE, MIB, PART};

/// One act, done bare and through farpage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Copies all bytes out of a mapping that was touched before.
    Read,
    /// Copies as many in.
    Write,
    /// Maps 2 MiB and unmaps them.
    Map {
        /// Has each page mapped in between.
        touch: bool,
    },
    /// Pins 2 MiB of a mapping that was touched before, and unpins them; bare, `mlock` and `munlock`.
    Pin,
    /// Both: maps, pins, unpins, unmaps.
    MapPin,
    /// Punches a hole where there is data.
    Punch(Range<u64>),
    /// The same while a page elsewhere is in use for a while: bare by the kernel, which waits for it; else by a pin.
    PunchBeside(Range<u64>),
}

/// What a second process does meanwhile, through farpage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherAct {
    /// Maps what is not punched.
    MapsElsewhere,
    /// Maps what is punched.
    MapsIt,
    /// Pins what is not punched.
    PinsElsewhere,
}

/// A row.
#[derive(Debug, Clone)]
pub struct Case {
    /// For people.
    pub name: &'static str,
    /// What.
    pub act: Act,
    /// Beside whom.
    pub other: Option<OtherAct>,
    /// Ours may cost so many times what the bare call does.
    pub at_most: Option<f64>,
    /// How often on each side in a round.
    pub times: u32,
}

impl Case {
    /// Whether the bare side is what only DAX file systems do.
    pub fn needs_dax(&self) -> bool {
        matches!(self.act, Act::PunchBeside(_))
    }

    /// The bytes that are punched.
    pub fn punched(&self) -> Option<Range<u64>> {
        match &self.act {
            Act::Punch(range) | Act::PunchBeside(range) => Some(range.clone()),
            _ => None,
        }
    }
}

/// All of them.
pub fn all() -> Vec<Case> {
    use OtherAct::{MapsElsewhere, MapsIt, PinsElsewhere};
    let page = PART.start..PART.start + 4096;
    let case = |name, act, other, at_most, times| Case { name, act, other, at_most, times };
    let punch =
        |name, range: &Range<u64>, other, at_most| case(name, Act::Punch(range.clone()), other, at_most, 50);
    vec![
        case("read 64M, mapped", Act::Read, None, Some(1.05), 5),
        case("write 64M, mapped", Act::Write, None, Some(1.05), 5),
        case("map + unmap 2M", Act::Map { touch: false }, None, Some(2.0), 20),
        case("map + touch + unmap 2M", Act::Map { touch: true }, None, Some(2.0), 20),
        case("pin + unpin 2M (mlock)", Act::Pin, None, Some(2.0), 20),
        case("map + pin + unpin + unmap 2M", Act::MapPin, None, Some(2.0), 20),
        punch("punch 4K", &page, None, Some(1.5)),
        punch("punch 2M", &PART, None, Some(1.5)),
        punch("punch 4K, mapped elsewhere", &page, Some(MapsElsewhere), Some(1.5)),
        punch("punch 2M, mapped elsewhere", &PART, Some(MapsElsewhere), Some(1.5)),
        punch("punch 4K, pinned elsewhere", &page, Some(PinsElsewhere), Some(1.5)),
        punch("punch 2M, pinned elsewhere", &PART, Some(PinsElsewhere), Some(1.5)),
        punch("punch 4K, mapped there", &page, Some(MapsIt), None),
        punch("punch 2M, mapped there", &PART, Some(MapsIt), None),
        case("punch 4K, 100 ms of use elsewhere", Act::PunchBeside(page), None, Some(0.1), 1),
    ]
}

/// What the second process maps or pins.
pub fn range_of(other: OtherAct) -> Range<u64> {
    match other {
        OtherAct::MapsIt => PART,
        OtherAct::MapsElsewhere | OtherAct::PinsElsewhere => ELSEWHERE,
    }
}

const _: () = assert!(PART.end - PART.start == 2 * MIB && ELSEWHERE.start >= PART.end);
