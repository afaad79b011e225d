//! O_DIRECT through a FUSE file system that takes its time: the kernel holds the buffer's pages by plain
//! references meanwhile, and they must stay where they are.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::RwLock;
use std::time::{Duration, UNIX_EPOCH};

use farpage_tests::{Job, MIB, Rng, Verdict, need, program, run_both_and, suite};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

const PAGE: usize = 4096;
const TTL: Duration = Duration::from_secs(3600);
const FILE: INodeNo = INodeNo(2);

/// One file `data` in memory; every transfer is answered late.
struct Slow {
    bytes: RwLock<Vec<u8>>,
    delay: Duration,
}

impl Slow {
    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            FILE => (FileType::RegularFile, 0o666, self.bytes.read().map_or(0, |b| b.len())),
            _ => return None,
        };
        Some(FileAttr {
            ino,
            size: size as u64,
            blocks: size.div_ceil(512) as u64,
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
}

impl Filesystem for Slow {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(FILE) {
            Some(attr) if parent == INodeNo::ROOT && name == "data" => {
                reply.entry(&TTL, &attr, Generation(0))
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The delay is what this file system is for: the buffer's pages are held by now.
        std::thread::sleep(self.delay);
        let Ok(bytes) = self.bytes.read() else { return reply.error(Errno::EIO) };
        let from = (offset as usize).min(bytes.len());
        let to = (from + size as usize).min(bytes.len());
        reply.data(&bytes[from..to]);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        std::thread::sleep(self.delay);
        let Ok(mut bytes) = self.bytes.write() else { return reply.error(Errno::EIO) };
        let from = offset as usize;
        match bytes.get_mut(from..from + data.len()) {
            Some(slot) => {
                slot.copy_from_slice(data);
                reply.written(data.len() as u32);
            }
            None => reply.error(Errno::ENOSPC),
        }
    }
}

/// `fill_page(page, 1, index)` of `programs/common.h`.
fn contents(len: usize) -> Vec<u8> {
    let mix = |x: u64| Rng::new(x).draw();
    let mut bytes = Vec::with_capacity(len);
    for page in 0..(len / PAGE) as u64 {
        let base = mix(0x0100_0000_01b3_u64.wrapping_add(page));
        for i in 0..(PAGE / 8) as u64 {
            let word = if i < PAGE as u64 / 16 { mix(base.wrapping_add(i)) } else { base };
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
    }
    bytes
}

fn run(case: &'static str) -> Result<Verdict, String> {
    if let Err(why) = need::device(Path::new("/dev/fuse")) {
        return Ok(Verdict::Skipped(why));
    }
    let path = match program("odirect") {
        Ok(path) => path,
        Err(verdict) => return verdict,
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let slow = Slow { bytes: RwLock::new(contents(4 * MIB as usize)), delay: Duration::from_millis(4) };
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("farpage-test".to_owned())];
    config.n_threads = Some(2);
    let session = match fuser::spawn_mount(slow, dir.path(), &config) {
        Ok(session) => session,
        Err(e) => return Ok(Verdict::Skipped(format!("a FUSE file system cannot be mounted: {e}"))),
    };
    let file = dir.path().join("data").into_os_string();
    let job =
        Job::new([path.into_os_string(), case.into(), "48".into(), file]).limit(Duration::from_secs(60));
    // Calls through the C library have their buffers held, whether this kernel pins them or not.
    let verdict = run_both_and(&job, "12M", |stats| match stats.held_skips {
        0 if case == "reads" => Err("no buffer was held".to_owned()),
        _ => Ok(()),
    });
    session.umount_and_join().map_err(|e| format!("unmounting: {e}"))?;
    verdict
}

fn main() -> ExitCode {
    suite(vec![
        ("odirect::reads".to_owned(), Box::new(|| run("reads"))),
        ("odirect::reads-raw".to_owned(), Box::new(|| run("reads-raw"))),
        ("odirect::writes".to_owned(), Box::new(|| run("writes"))),
    ])
}
