//! References to pages of a file. A page has a frame by its place in the file, and so has each huge page of 512 of them:
//! whoever holds all of a huge page holds one reference of that, as with a compound page in Linux. A page is idle if its
//! own count is 0 and its huge page's, too.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::table::Table;
use crate::frame::Pfn;
use crate::frame::ledger::{Extent, HolderKind};
use crate::pagemap::{HoldError, Run};

/// Pages of a huge page (2 MiB).
pub(super) const HUGE: Pfn = 512;
/// Tables are for a multiple of so many pages, so that both kinds of frames begin where frame tables may.
pub(super) const TABLE_ALIGN: Pfn = 64 * HUGE;

/// The frames of the huge pages lie behind those of the pages.
pub(super) fn frames_of(pages: Pfn) -> Pfn {
    pages + pages / HUGE
}

/// One reference to each of these pages; to be given back by [`Table::give`].
#[derive(Debug)]
pub(super) struct Refs {
    pages: Range<Pfn>,
    runs: ArrayVec<Run, 3>,
}

impl Refs {
    /// Which pages.
    pub fn pages(&self) -> &Range<Pfn> {
        &self.pages
    }
}

/// The pages that a record of the ledger holds, in a table of `base` pages.
pub(super) fn pages_held(base: Pfn, e: &Extent) -> Range<Pfn> {
    match e.pfn.checked_sub(base) {
        None => e.pfn..e.pfn + e.len,
        Some(huge) => huge * HUGE..(huge + e.len) * HUGE,
    }
}

impl Table {
    /// Takes a reference to each page; the first one of a page allocates it.
    ///
    /// # Errors
    /// See [`HoldError`]; nothing is held then.
    pub(super) fn take(&self, kind: HolderKind, pages: &Range<Pfn>) -> Result<Refs, HoldError> {
        let base = self.frames();
        // Whole huge pages, and the edges.
        let (first, last) = (pages.start.div_ceil(HUGE), pages.end / HUGE);
        let parts = if first < last {
            [pages.start..first * HUGE, base + first..base + last, last * HUGE..pages.end]
        } else {
            [pages.clone(), 0..0, 0..0]
        };
        let mut refs = Refs { pages: pages.clone(), runs: ArrayVec::new() };
        for part in parts.iter().filter(|part| !part.is_empty()) {
            match self.begin_run(kind, part, true) {
                Ok(run) => refs.runs.push(run),
                Err(e) => {
                    self.give(refs);
                    return Err(e);
                }
            }
        }
        Ok(refs)
    }

    /// Gives references back.
    pub(super) fn give(&self, refs: Refs) {
        refs.runs.into_iter().for_each(|run| self.pagemap().end_run(run));
    }

    /// Whether anybody has a reference to one of these pages, for whoever has put up a sign first.
    pub(super) fn is_used(&self, pages: &Range<Pfn>) -> bool {
        let frames = &self.pagemap().frames;
        let base = self.frames();
        let huge = base + pages.start / HUGE..base.saturating_add(pages.end.div_ceil(HUGE));
        let small = || frames.first_used(pages.start, pages.end.min(base)).is_some();
        // Who holds both pages that go and others may change from one kind of reference to the other meanwhile, where another cut
        // has him give up a part: he takes the new ones first, so he has some of one kind at any time.
        small() || (self.has_huge() && (frames.first_used(huge.start, huge.end).is_some() || small()))
    }

    /// The pages that a record of the ledger holds.
    pub(super) fn pages_held(&self, e: &Extent) -> Range<Pfn> {
        pages_held(self.frames(), e)
    }

    /// The pages of a frame.
    pub(super) fn pages_of(&self, pfn: Pfn) -> Range<Pfn> {
        match pfn.checked_sub(self.frames()) {
            None => pfn..pfn + 1,
            Some(huge) => huge * HUGE..(huge + 1) * HUGE,
        }
    }
}
