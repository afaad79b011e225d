//! Memory that somebody else has mapped, managed for a while.

use std::ops::Range;

use rustix::io::Errno;

use super::RegionError;
use crate::PAGE_SIZE;
use crate::fault::inline;
use crate::reclaim::Hands;
use crate::space::{FaultMode, Running, Space};
use crate::sys::{self, Mappings};

/// Memory that a space manages as long as this lives; see [`Running::adopt`].
///
/// See the example of [`Running::adopt`].
#[derive(Debug)]
pub struct Adopted {
    space: Running,
    range: Range<usize>,
}

impl Running {
    /// Manages memory that somebody else has mapped (a buffer of an allocator or of another library): `range`, whole pages of
    /// private anonymous memory that may be read and written. What is in it stays in it. When the result is dropped all of
    /// it comes back to DRAM and is the kernel's again.
    ///
    /// A forked child does not have the memory as long as it is adopted.
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").device("ram:64M").build()?.start_inline()?;
    /// let mut buffer = vec![1u8; 32 << 20];
    /// let page = |at: usize| at.next_multiple_of(4096);
    /// let (start, end) = (buffer.as_ptr() as usize, buffer.as_ptr() as usize + buffer.len());
    /// // The whole pages inside; 32 MiB within 8 MiB of DRAM from now on.
    /// // SAFETY: the buffer stays where it is until `adopted` is dropped.
    /// let adopted = unsafe { space.adopt(page(start)..page(end - 4095))? };
    /// assert_eq!(adopted.addresses(), page(start)..page(end - 4095));
    /// buffer.iter_mut().for_each(|b| *b += 1);
    /// assert!(buffer.iter().all(|&b| b == 2));
    /// assert!(space.domain.stats().pages_in > 0);
    /// drop(adopted);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`RegionError`]: not such memory, or managed by a userfaultfd already.
    ///
    /// # Safety
    /// Until the result is dropped nobody unmaps, moves or reprotects any of `range`, nor drops its pages with `madvise`.
    pub unsafe fn adopt(&self, range: Range<usize>) -> Result<Adopted, RegionError> {
        let len = range.len();
        let failed = |what: &'static str| super::failed(what, len);
        let bad = !range.start.is_multiple_of(PAGE_SIZE) || !range.end.is_multiple_of(PAGE_SIZE);
        if bad || range.is_empty() || range.end > crate::domain::ADDRESS_LIMIT || !is_plain(&range) {
            return Err(failed("adopt")(Errno::INVAL));
        }
        if self.manages(range.start, range.end) {
            return Err(failed("adopt, being managed already,")(Errno::BUSY));
        }
        sys::keep_from_children(range.start, len).map_err(failed("keep from children"))?;
        let undo = |e| {
            let _inherited_again = sys::leave_to_children(range.start, len);
            e
        };
        if self.mode() == FaultMode::Inline {
            inline::serve(range.start, range.end, self.shared())
                .map_err(failed("handle the faults of"))
                .map_err(undo)?;
        }
        let (start, end) = (range.start, range.end);
        self.change(|world| Space::adopt(self, world, start, end)).map_err(failed("manage")).map_err(
            |e| {
                if self.mode() == FaultMode::Inline {
                    inline::unserve(start);
                }
                undo(e)
            },
        )?;
        self.wait_for_budget();
        Ok(Adopted { space: self.clone(), range })
    }
}

/// Whether all of `range` is private anonymous memory that may be read and written.
fn is_plain(range: &Range<usize>) -> bool {
    let Ok(mappings) = Mappings::open() else { return false };
    let mut at = range.start;
    while at < range.end {
        match mappings.at(at) {
            Some(m) if m.read && m.write && !m.shared && m.anonymous => at = m.end,
            _ => return false,
        }
    }
    true
}

impl Adopted {
    /// The memory.
    pub fn addresses(&self) -> Range<usize> {
        self.range.clone()
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if !self.space.is_mine() {
            return; // in a forked child the memory is not here
        }
        self.space.release(self.range.start, self.range.end, &mut Hands::new());
        if self.space.mode() == FaultMode::Inline {
            inline::unserve(self.range.start);
        }
        let _inherited_again = sys::leave_to_children(self.range.start, self.range.len());
    }
}
