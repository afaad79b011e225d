//! Open files: which descriptors are ours, and what is behind each.
//!
//! A descriptor is a real one, of a memfd that is made for this `open`: `dup`, `poll`, `fork`, `exec` and close-on-exec are
//! the kernel's, and the file's inode tells which open file a descriptor belongs to, whatever its number.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use farpage::sys::{BlockedSignals, Mutex, MutexGuard};
use libc::c_int;
use rustix::fs::{MemfdFlags, OFlags};
use rustix::io::Errno;

use crate::gup::GupTest;
use crate::mirror::Mirror;
use crate::own;
use crate::uapi::{Node, is_coherent};

/// Larger than what a program maps of a device.
pub const FILE_LEN: u64 = 1 << 46;

/// What is behind an open file.
#[derive(Clone)]
pub enum File {
    /// A mirror of this process's address space.
    Mirror(Arc<Mutex<Mirror>>),
    /// A `gup_test`.
    GupTest(Arc<Mutex<GupTest>>),
    /// Another process opened it: it mirrors another address space. The device.
    Foreign(u8),
}

type Inode = (u64, u64);

/// By the inode of their memfds.
static FILES: Mutex<Option<HashMap<Inode, File>>> = Mutex::new(None);
/// Something is or was open: without that nobody looks.
static ANY: AtomicBool = AtomicBool::new(false);

/// A lock that no signal handler of this thread can meet.
pub struct Quiet<'a, T> {
    guard: Option<MutexGuard<'a, T>>,
    _signals: BlockedSignals,
}

/// Takes it.
pub fn quiet<T>(m: &Mutex<T>) -> Quiet<'_, T> {
    let _signals = BlockedSignals::new();
    Quiet { guard: Some(m.lock()), _signals }
}

impl<T> std::ops::Deref for Quiet<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        match &self.guard {
            Some(g) => g,
            None => unreachable!("there until dropped"),
        }
    }
}

impl<T> std::ops::DerefMut for Quiet<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.guard {
            Some(g) => g,
            None => unreachable!("there until dropped"),
        }
    }
}

impl<T> Drop for Quiet<'_, T> {
    fn drop(&mut self) {
        // Before the signals are let in.
        self.guard = None;
    }
}

fn inode(fd: c_int) -> Option<Inode> {
    // SAFETY: a number; if it is no descriptor the call says so.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    rustix::fs::fstat(fd).ok().map(|s| (s.st_dev, s.st_ino))
}

/// What a descriptor is, if it is ours.
pub fn find(fd: c_int) -> Option<File> {
    if fd < 0 || !ANY.load(Ordering::Acquire) || farpage_preload::is_manager() || forking() {
        return None;
    }
    let inode = inode(fd)?;
    let known = quiet(&FILES).as_ref().and_then(|f| f.get(&inode).cloned());
    known.or_else(|| inherited(fd, inode))
}

/// A file that was opened before a fork, or came from another process: a mirror is bound to who opened it, a `gup_test` works on
/// whoever uses it.
fn inherited(fd: c_int, inode: Inode) -> Option<File> {
    let name = rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new()).ok()?;
    let name = name.to_bytes().strip_prefix(b"/memfd:")?;
    if let Some([minor, ..]) = name.strip_prefix(b"hmm_dmirror") {
        return Some(File::Foreign(minor.wrapping_sub(b'0')));
    }
    if !name.starts_with(b"gup_test ") {
        return None;
    }
    let test = File::GupTest(Arc::new(Mutex::new(GupTest::new(own::space().ok()?))));
    quiet(&FILES).get_or_insert_default().insert(inode, test.clone());
    Some(test)
}

/// Opens one of our nodes.
pub fn open(node: Node, flags: c_int) -> Result<c_int, Errno> {
    if flags & libc::O_DIRECTORY != 0 {
        return Err(Errno::NOTDIR);
    }
    if flags & libc::O_EXCL != 0 && flags & libc::O_CREAT != 0 {
        return Err(Errno::EXIST);
    }
    let space = own::space()?;
    own::reap(space);
    let fd = rustix::fs::memfd_create(node.name(), MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, FILE_LEN)?;
    let fd = with_flags(fd, flags)?;
    let inode = inode(fd.as_raw_fd()).ok_or(Errno::BADF)?;
    let file = match node {
        Node::Mirror(minor) => File::Mirror(Arc::new(Mutex::new(Mirror::new(space, minor)))),
        Node::GupTest => File::GupTest(Arc::new(Mutex::new(GupTest::new(space)))),
    };
    ANY.store(true, Ordering::Release);
    quiet(&FILES).get_or_insert_default().insert(inode, file);
    Ok(fd.into_raw_fd())
}

/// The same file with the access mode and status flags that were asked for: a memfd is opened for reading and writing.
fn with_flags(fd: OwnedFd, flags: c_int) -> Result<OwnedFd, Errno> {
    let keep = libc::O_ACCMODE | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_APPEND | libc::O_PATH;
    let flags = OFlags::from_bits_retain((flags & keep) as u32);
    rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, rustix::fs::Mode::empty())
}

/// Every mirror of this process.
pub fn mirrors() -> Vec<Arc<Mutex<Mirror>>> {
    if !ANY.load(Ordering::Acquire) || forking() {
        return Vec::new();
    }
    let files = quiet(&FILES);
    let all = files.iter().flat_map(|f| f.values());
    all.filter_map(|f| if let File::Mirror(m) = f { Some(m.clone()) } else { None }).collect()
}

/// Descriptors are about to be closed: what is behind the last of a file ends. (Descriptors of it in children do not
/// count: what they are bound to is this process.)
pub fn closing(first: c_int, last: c_int) {
    if !ANY.load(Ordering::Acquire) || forking() {
        return;
    }
    // Whatever we open here is closed again by way of this function: no lock may be held.
    let known: Vec<Inode> = quiet(&FILES).iter().flat_map(|f| f.keys().copied()).collect();
    let is_ours = |fd: c_int| inode(fd).filter(|i| known.contains(i));
    let mut ending: Vec<Inode> = match (first, last) {
        _ if known.is_empty() => return,
        (fd, last) if fd == last => is_ours(fd).into_iter().collect(),
        _ => {
            let inside = descriptors().into_iter().filter(|fd| (first..=last).contains(fd));
            inside.filter_map(is_ours).collect()
        }
    };
    if ending.is_empty() {
        return;
    }
    let staying = descriptors().into_iter().filter(|fd| !(first..=last).contains(fd));
    let staying: Vec<Inode> = staying.filter_map(is_ours).collect();
    ending.retain(|i| !staying.contains(i));
    for inode in ending {
        let file = quiet(&FILES).as_mut().and_then(|f| f.remove(&inode));
        if let Some(File::Mirror(m)) = file {
            quiet(&m).close();
        }
    }
}

/// This process's descriptors. (Not by way of the C library, whose heap may call back here.)
fn descriptors() -> Vec<c_int> {
    use rustix::fs::{Dir, Mode};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open("/proc/self/fd", flags, Mode::empty());
    let Ok(dir) = dir.and_then(Dir::new) else { return Vec::new() };
    dir.filter_map(|e| e.ok()?.file_name().to_str().ok()?.parse().ok()).collect()
}

/// What to map in place of a device: fresh memory of zeros, as the device gives every mapping its own.
pub fn mapping(fd: c_int, len: usize) -> Option<OwnedFd> {
    let Some(File::Mirror(_) | File::Foreign(_)) = find(fd) else { return None };
    let memory = rustix::fs::memfd_create("hmm_dmirror", MemfdFlags::CLOEXEC).ok()?;
    let len = len.div_ceil(farpage::PAGE_SIZE) * farpage::PAGE_SIZE;
    // The device's pages are all there from the beginning.
    rustix::fs::fallocate(&memory, rustix::fs::FallocateFlags::empty(), 0, len as u64).ok()?;
    Some(memory)
}

/// The thread and the process that fork just now; 0: none. What they call meanwhile, in the child, too, finds no files: a
/// lock may be held by a thread that the child has not.
static FORKING: [AtomicI32; 2] = [const { AtomicI32::new(0) }; 2];

fn forking() -> bool {
    let tid = FORKING[0].load(Ordering::SeqCst);
    let me = || (farpage::sys::gettid() as i32, std::process::id() as i32);
    tid != 0 && (me().0 == tid || me().1 != FORKING[1].load(Ordering::SeqCst))
}

/// Before a fork: device page tables lose what parent and child will share.
pub extern "C" fn before_fork() {
    if ANY.load(Ordering::Acquire)
        && let Some(space) = farpage_preload::init::ready()
    {
        own::reap(space);
    }
    for m in mirrors() {
        quiet(&m).before_fork();
    }
    FORKING[1].store(std::process::id() as i32, Ordering::SeqCst);
    FORKING[0].store(farpage::sys::gettid() as i32, Ordering::SeqCst);
}

/// After it.
pub extern "C" fn after_fork_in_parent() {
    FORKING[0].store(0, Ordering::SeqCst);
}

/// After it: what is open mirrors the parent.
pub extern "C" fn after_fork_in_child() {
    // SAFETY: this is the only thread. What is replaced is the parent's, and may have been in the middle of a change.
    unsafe {
        FILES.renew(None);
    }
    FORKING[0].store(0, Ordering::SeqCst);
}

/// Devices that bring their pages back when memory is changed under them: those that the CPU reaches in place.
pub fn changing(start: usize, end: usize) {
    for m in mirrors() {
        let mut m = quiet(&m);
        if is_coherent(m.minor()) {
            m.bring_back(start, end);
        }
    }
}

/// Mappings have changed.
pub fn changed(start: usize, end: usize) {
    for m in mirrors() {
        quiet(&m).invalidate(start, end);
    }
}
