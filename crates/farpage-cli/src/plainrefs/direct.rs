//! Whether O_DIRECT transfers on a file pin their pages (or copy them), as farpage needs it, or hold them by plain
//! references.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, openat, openat2};
use rustix::io::Errno;

/// File systems whose O_DIRECT pins (or, tmpfs and pipes, copies): ext2-4, XFS, btrfs, F2FS, tmpfs, pipes.
const PINNING: &[u32] = &[0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0x0102_1994, 0x5049_5045];

/// Whether O_DIRECT on this open file certainly leaves no plain references.
pub fn pins(file: impl AsFd) -> bool {
    let block_device =
        fstat(&file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::BlockDevice);
    block_device || fstatfs(&file).is_ok_and(|s| PINNING.contains(&(s.f_type as u32)))
}

/// The same for a descriptor of process `pid`.
pub fn descriptor_pins(pid: u32, fd: i32) -> bool {
    let path = format!("/proc/{pid}/fd/{fd}");
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).is_ok_and(pins)
}

/// The same for what process `pid` is about to open. `dir` is a descriptor of that process, or `AT_FDCWD`. False
/// where it cannot be told.
pub fn path_pins(pid: u32, dir: i32, path: &Path) -> bool {
    let (base, resolve) = if path.is_absolute() {
        (PathBuf::from(format!("/proc/{pid}/root")), ResolveFlags::IN_ROOT)
    } else if !same_root(pid) {
        return false; // a link in the path would be followed from our root
    } else if dir == libc::AT_FDCWD {
        (PathBuf::from(format!("/proc/{pid}/cwd")), ResolveFlags::empty())
    } else {
        (PathBuf::from(format!("/proc/{pid}/fd/{dir}")), ResolveFlags::empty())
    };
    let Ok(base) = openat(CWD, base, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else { return false };
    match find(&base, path, resolve, OFlags::empty()) {
        Ok(file) => pins(file),
        // To be created, unless it is a link that leads nowhere yet.
        Err(Errno::NOENT) => {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            find(&base, path, resolve, OFlags::NOFOLLOW).err() == Some(Errno::NOENT)
                && find(&base, parent, resolve, OFlags::empty()).is_ok_and(pins)
        }
        Err(_) => false,
    }
}

/// Links of /proc to open files mean something else to us than to the process: they are an error.
fn find(base: &OwnedFd, path: &Path, resolve: ResolveFlags, more: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | more;
    openat2(base, path, flags, Mode::empty(), resolve | ResolveFlags::NO_MAGICLINKS)
}

fn same_root(pid: u32) -> bool {
    let id = |p: String| fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    let namespace = |p: String| fs::read_link(p).ok();
    let root = id(format!("/proc/{pid}/root"));
    let mounts = namespace(format!("/proc/{pid}/ns/mnt"));
    root.is_some()
        && root == id("/".into())
        && mounts.is_some()
        && mounts == namespace("/proc/self/ns/mnt".into())
}

/// Whether this process has a descriptor, and so the program will inherit one, through which plain references can
/// be left: an io_uring, or O_DIRECT where it does not pin.
pub fn inherited_carrier() -> bool {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return true };
    let fds = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    fds.into_iter().any(|fd| {
        if fs::read_link(format!("/proc/self/fd/{fd}"))
            .is_ok_and(|l| l.as_os_str() == "anon_inode:[io_uring]")
        {
            return true;
        }
        let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else { return false };
        let flags = info.lines().find_map(|l| i32::from_str_radix(l.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_none_or(|f| f & libc::O_DIRECT != 0) && !descriptor_pins(std::process::id(), fd)
    })
}
