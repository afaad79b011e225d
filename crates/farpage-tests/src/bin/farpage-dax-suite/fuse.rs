//! A FUSE file system whose file `data` is a DAX file: what is done through the mount goes to farpage, and so waits for
//! pins that any process holds of the file behind it. Its file `gate` keeps transfers in flight until it is opened.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use farpage::dax::{DaxError, DaxFile};
use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::place::LONG;

/// Nothing is remembered: others change the file behind.
const TTL: Duration = Duration::ZERO;
const DATA: INodeNo = INodeNo(2);
const GATE: INodeNo = INodeNo(3);
/// The length that `gate` says it has.
const GATE_LEN: u64 = 1 << 20;

/// What holds transfers up.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: bool,
    /// Transfers that wait.
    waiting: u32,
    /// The byte of which everything consists that is read.
    byte: u8,
    /// What was written last.
    written: Vec<u8>,
}

impl Gate {
    fn pass(&self, write: Option<&[u8]>) -> u8 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        self.changed.notify_all();
        let until = Instant::now() + LONG;
        while !state.open && Instant::now() < until {
            state = self
                .changed
                .wait_timeout(state, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.waiting -= 1;
        if let Some(data) = write {
            state.written = data.to_vec();
        }
        state.byte
    }

    /// Waits until a transfer is held up; false if none comes.
    pub fn is_used(&self) -> bool {
        let until = Instant::now() + LONG;
        while Instant::now() < until {
            if self.state.lock().unwrap_or_else(PoisonError::into_inner).waiting > 0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Lets all pass, or none; what is read from now on consists of `byte`.
    pub fn set(&self, open: bool, byte: u8) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.open, state.byte) = (open, byte);
        self.changed.notify_all();
    }

    /// What was written last.
    pub fn written(&self) -> Vec<u8> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).written.clone()
    }
}

/// Serves the file at `mount`, until the session is dropped.
///
/// # Errors
/// FUSE cannot be had here.
pub fn serve(file: DaxFile, gate: Arc<Gate>, mount: &Path) -> std::io::Result<BackgroundSession> {
    let mut config = fuser::Config::default();
    config.mount_options = vec![MountOption::FSName("farpage-dax".to_owned())];
    // Reads go on while a change waits.
    config.n_threads = Some(4);
    fuser::spawn_mount(Served { file, gate }, mount, &config)
}

struct Served {
    file: DaxFile,
    gate: Arc<Gate>,
}

/// What the kernel is told.
fn errno(error: &DaxError) -> Errno {
    match error {
        DaxError::Sys { errno, .. } => Errno::from_i32(errno.raw_os_error()),
        // Somebody holds pages of it for too long.
        DaxError::Held { .. } => Errno::EBUSY,
        DaxError::Range { .. } => Errno::EINVAL,
        _ => Errno::EIO,
    }
}

impl Served {
    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let (kind, perm, size) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            DATA => (FileType::RegularFile, 0o600, self.file.len().map_err(|e| errno(&e))?),
            GATE => (FileType::RegularFile, 0o600, GATE_LEN),
            _ => return Err(Errno::ENOENT),
        };
        Ok(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }

    fn read_data(&self, offset: u64, size: u32) -> Result<Vec<u8>, DaxError> {
        let mut buffer = vec![0; size as usize];
        let read = self.file.read_at(&mut buffer, offset)?;
        buffer.truncate(read);
        Ok(buffer)
    }

    fn change(&self, offset: u64, length: u64, mode: i32) -> Result<(), DaxError> {
        let range = offset..offset.saturating_add(length);
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            self.file.punch_hole(range)
        } else if mode & libc::FALLOC_FL_ZERO_RANGE != 0 {
            let end = range.end;
            self.file.zero_range(range)?;
            match self.file.len()? {
                len if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && len < end => self.file.truncate(end),
                _ => Ok(()),
            }
        } else if mode & libc::FALLOC_FL_COLLAPSE_RANGE != 0 {
            self.file.collapse_range(range)
        } else if mode == 0 {
            self.file.allocate(range)
        } else {
            let (path, errno) = (self.file.path().to_owned(), rustix::io::Errno::OPNOTSUPP);
            Err(DaxError::Sys { path, what: "change", errno })
        }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = match name.to_str() {
            Some("data") if parent == INodeNo::ROOT => DATA,
            Some("gate") if parent == INodeNo::ROOT => GATE,
            _ => return reply.error(Errno::ENOENT),
        };
        match self.attr(ino) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let (DATA, Some(size)) = (ino, size)
            && let Err(e) = self.file.truncate(size)
        {
            return reply.error(errno(&e));
        }
        self.getattr(_req, ino, None, reply);
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: the DAX file behind has none.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if ino == GATE {
            return reply.data(&vec![self.gate.pass(None); size as usize]);
        }
        match self.read_data(offset, size) {
            Ok(data) => reply.data(&data),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if ino == GATE {
            self.gate.pass(Some(data));
            return reply.written(data.len() as u32);
        }
        match self.file.write_at(data, offset) {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if ino != DATA {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match self.change(offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.file.flush(0..u64::MAX) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
