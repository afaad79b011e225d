//! Looking at a table that cannot be trusted: another user's, for root.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, memfd_create};
use rustix::io::Errno;

use super::error::TableError;
use super::heads::{HEAD, MAGIC, file_name, word};
use super::refs::{frames_of, pages_held};
use super::slots::{SLOTS, Slots};
use super::table::FILES;
use super::users::{User, users_of};
use crate::frame::Pfn;
use crate::frame::ledger::Ledger;
use crate::pagemap::Pagemap;
use crate::sys::SharedMap;

/// All records of a ledger are to be looked at.
static ALL: AtomicU32 = AtomicU32::new(u32::MAX);

/// What another user's table says: a copy of its first part, which he can neither change nor cut off.
pub(super) struct Copied {
    map: SharedMap,
    pages: u32,
}

impl Copied {
    /// Copies it. `None`: it is not there, or not one yet.
    pub fn of(path: &Path) -> Result<Option<Self>, TableError> {
        let len = HEAD + SLOTS + Pagemap::shared_parts(0)[2].end;
        let copy = memfd_create("farpage-dax-copy", MemfdFlags::CLOEXEC)?;
        {
            // Closing it ends locks that this process may just be taking.
            let _files = FILES.lock();
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = match rustix::fs::open(path, flags, Mode::empty()) {
                Err(Errno::NOENT) => return Ok(None),
                file => file?,
            };
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(TableError::Version);
            }
            let mut bytes = vec![0; len];
            let mut read = 0;
            while read < len {
                match rustix::io::pread(&file, &mut bytes[read..], read as u64)? {
                    0 => return Ok(None),
                    n => read += n,
                }
            }
            rustix::io::pwrite(&copy, &bytes, 0)?;
        }
        rustix::fs::ftruncate(&copy, len as u64)?;
        let map = SharedMap::new(&copy, 0, len)?;
        let words = map.area(0, HEAD).atomics32();
        let word = |i: usize| words[i].load(Ordering::Relaxed);
        match word(word::MAGIC) {
            // More pages than a table can have are none of ours.
            MAGIC if word(word::PAGES) <= 1 << 31 => Ok(Some(Self { map, pages: word(word::PAGES) })),
            other => {
                map.unmap();
                if other == 0 { Ok(None) } else { Err(TableError::Version) }
            }
        }
    }

    /// The file's name, and who has it open, and what he holds of it: as the table's user would have it.
    pub fn says(&self) -> (PathBuf, Vec<User>) {
        let head = self.map.area(0, HEAD);
        let slots = Slots::new(self.map.area(HEAD, SLOTS), &head.atomics32()[word::SLOTS_USED]);
        let [.., part] = Pagemap::shared_parts(0);
        let records = self.map.area(HEAD + SLOTS + part.start, part.len()).atomics64();
        let frames = u64::from(frames_of(self.pages));
        let ledger = Ledger::new(records, &ALL);
        let held = ledger.iter().map(|(_, e)| e);
        let held = held.filter(|e| u64::from(e.pfn) + u64::from(e.len) <= frames);
        let held = held.map(|e| (e.owner, e.kind, pages_held(self.pages, &e)));
        let living = slots.living(|owner| slots.is_alive(owner, |_| false));
        (file_name(head), users_of(held.collect(), living, &(0..Pfn::MAX)))
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.map.unmap();
    }
}
