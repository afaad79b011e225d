//! Pins of a file's pages.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::error::DaxError;
use super::inner::Inner;
use super::mapping::Map;
use super::refs::Refs;
use super::users::bytes;
use crate::frame::Pfn;
use crate::frame::ledger::HolderKind;
use crate::space::pin::Pin;
use crate::sys::after;

/// Pinned pages of a DAX file: while this lives nobody who uses farpage truncates, punches or collapses them, in no process.
///
/// In a forked child it is nothing: the pin is the parent's.
///
/// ```
/// use farpage::Pin;
/// use farpage::dax::DaxOptions;
///
/// # let dir = tempfile::tempdir()?;
/// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// # let file = options.create(dir.path().join("file"))?;
/// file.write_at(&[7; 8192], 0)?;
/// // Of the file alone: for who has its bytes otherwise, as a device that was given its blocks.
/// let pin = file.pin(100..200, Pin::Short)?;
/// assert_eq!((pin.range(), pin.as_ptr()), (0..4096, None));
/// // Through a mapping: its addresses are valid as long as the pin is there.
/// let pin = file.map(0..8192)?.pin(4100..4200, Pin::Short)?;
/// assert_eq!(pin.range(), 4096..8192);
/// // SAFETY: pinned.
/// assert_eq!(unsafe { pin.as_ptr().unwrap().read_volatile() }, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DaxPin {
    file: Arc<Inner>,
    refs: Option<Refs>,
    pages: Range<Pfn>,
    /// The mapping through which it was pinned, and the address of its first byte there.
    mapped: Option<(Arc<Map>, usize)>,
}

impl DaxPin {
    pub(super) fn new(file: &Arc<Inner>, pages: Range<Pfn>, pin: Pin) -> Result<Self, DaxError> {
        let kind = match pin {
            Pin::Short => HolderKind::Pin,
            Pin::LongTerm if file.options.revoke.is_some() => HolderKind::LongPin,
            Pin::LongTerm => return Err(DaxError::LongTerm { path: file.path.clone() }),
        };
        let refs = file.counted(|| Self::take(file, kind, &pages))?;
        file.lease.pinned(file);
        Ok(Self { file: file.clone(), refs: Some(refs), pages, mapped: None })
    }

    fn take(file: &Inner, kind: HolderKind, pages: &Range<Pfn>) -> Result<Refs, DaxError> {
        let mut deadline = None;
        loop {
            let event = file.table.event();
            match file.try_take(kind, pages)? {
                Ok(refs) => return Ok(refs),
                Err(_cut) => {
                    let deadline = deadline.get_or_insert_with(|| after(Instant::now(), file.options.wait));
                    file.wait_for_cut(event, *deadline, pages)?;
                }
            }
        }
    }

    pub(super) fn keep_mapped(&mut self, map: Arc<Map>, addr: usize) {
        self.mapped = Some((map, addr));
    }

    pub(super) fn pages(&self) -> &Range<Pfn> {
        &self.pages
    }

    /// Which bytes of the file, whole pages.
    pub fn range(&self) -> Range<u64> {
        bytes(&self.pages)
    }

    /// Where they are, if they were pinned through a mapping: the first byte that was asked for. Valid while the pin lives,
    /// also when the mapping is dropped.
    pub fn as_ptr(&self) -> Option<*mut u8> {
        self.mapped.as_ref().map(|(_, addr)| *addr as *mut u8)
    }
}

impl Drop for DaxPin {
    fn drop(&mut self) {
        if let Some(refs) = self.refs.take()
            && self.file.table.is_ours()
        {
            self.file.table.give(refs);
            self.file.lease.unpinned(&self.file);
            // Tells those, too, who wait for the pages.
            self.file.gone();
        }
    }
}
