//! Appending to a file: where it ends is read and moved in one step.

use std::ops::Range;

use rustix::io::Errno;

use super::change::{Patience, enter};
use super::error::DaxError;
use super::file::DaxFile;
use super::inner::Inner;
use super::table::ROUND;
use super::{Change, Wait};
use crate::sys::Locked;

impl DaxFile {
    /// Writes at the end of the file, as one step among all who append and truncate through farpage. Returns where.
    ///
    /// # Errors
    /// What `pwrite` says; what was written is cut off again then. [`DaxError::AppendedInPart`]: or it is not, because
    /// somebody uses it by then, or has written behind it. [`DaxError::Held`]: another process does not get on with appending or
    /// truncating.
    pub fn append(&self, buf: &[u8]) -> Result<u64, DaxError> {
        let file = &**self.inner();
        file.check_open()?;
        file.check_writable("append to")?;
        let _size = file.lock_end(buf.len())?;
        let at = file.len()?;
        let mut written = 0;
        while written < buf.len() {
            match file.write_some_at(&buf[written..], at + written as u64) {
                Ok(n) => written += n,
                Err(DaxError::Sys { errno, .. }) if written > 0 => {
                    return Err(file.take_back(at..at + written as u64, errno));
                }
                Err(e) => return Err(e),
            }
        }
        file.table.announce_growth();
        Ok(at)
    }

    /// Writes at `at`, which may grow the file; less than asked for only where an error is behind it, of which the next
    /// call tells. Durable after [`Self::flush`].
    ///
    /// # Errors
    /// What `pwrite` says: no space, mostly. [`DaxError::Held`], if the file grows, as for [`Self::append`].
    pub fn write_at(&self, buf: &[u8], at: u64) -> Result<usize, DaxError> {
        let file = &**self.inner();
        file.check_writable("write to")?;
        // Nobody who takes back what he has appended takes this along.
        let grows = at.saturating_add(buf.len() as u64) > file.len()?;
        let _size = grows.then(|| file.lock_end(buf.len())).transpose()?;
        let written = file.write_some_at(buf, at)?;
        file.table.announce_growth();
        Ok(written)
    }
}

impl Inner {
    /// The size lock, for so many bytes behind the end.
    fn lock_end(&self, len: usize) -> Result<Locked<'_>, DaxError> {
        let wait = Wait { timeout: self.options.wait, stop: None };
        self.lock_size(&mut Patience::new(&wait), || {
            let end = self.len().unwrap_or(0);
            end..end.saturating_add(len as u64)
        })
    }

    /// Cuts off what was appended before `errno` came, if that is nobody's. We have the size lock, so nobody who farpage knows of
    /// moves the end meanwhile.
    fn take_back(&self, part: Range<u64>, errno: Errno) -> DaxError {
        let pages = Change::Truncate(part.start).pages(self.table.frames(), part.end);
        // Whoever has the size lock waits for nobody who may wait for that: he has a moment for the records, and that is all.
        let wait = Wait { timeout: ROUND, stop: None };
        let under = enter(self, &pages, &mut Patience::new(&wait));
        let is_ours = under.is_ok() && !self.table.is_used(&pages) && self.len() == Ok(part.end);
        if is_ours && rustix::fs::ftruncate(&self.fd, part.start).is_ok() {
            return self.failed("append to", errno);
        }
        drop(under);
        self.table.announce_growth();
        DaxError::AppendedInPart { path: self.path.clone(), range: part, errno }
    }
}
