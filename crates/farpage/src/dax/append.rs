//! Appending to a file: where it ends is read and moved in one step.

use super::Wait;
use super::change::Patience;
use super::error::DaxError;
use super::file::DaxFile;

impl DaxFile {
    /// Writes at the end of the file, as one step among all who append and truncate through farpage. Returns where.
    ///
    /// # Errors
    /// What `pwrite` says; a part may have been written then, and is cut off again. [`DaxError::Held`]: another process
    /// does not get on with appending or truncating.
    pub fn append(&self, buf: &[u8]) -> Result<u64, DaxError> {
        let file = &**self.inner();
        file.check_open()?;
        file.check_writable("append to")?;
        let wait = Wait { timeout: self.timeout(), stop: None };
        let _size = file.lock_size(&mut Patience::new(&wait), || {
            let end = file.len().unwrap_or(0);
            end..end.saturating_add(buf.len() as u64)
        })?;
        let at = file.len()?;
        if let Err(e) = file.write_all_at(buf, at) {
            // Nobody can have taken it for appended: we have the lock.
            let _cut = rustix::fs::ftruncate(&file.fd, at);
            return Err(e);
        }
        file.table.announce_growth();
        Ok(at)
    }
}
