//! The kernel's side of the watch: installing the filter, its listener, and looking at a stopped process.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::filter;

/// The child's side: installs the filter in the process that becomes the program, and hands its listener over.
pub struct Installer {
    program: Vec<libc::sock_filter>,
    socket: OwnedFd,
}

/// The keeper's side of the hand-over.
pub struct Receiver(OwnedFd);

/// Both sides.
pub fn pair() -> io::Result<(Installer, Receiver)> {
    let (socket, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok((Installer { program: filter::program(), socket }, Receiver(ours)))
}

impl Installer {
    /// Between `fork` and `exec`: installs the filter if that is possible, tells the keeper, and waits until he is
    /// ready. Async-signal-safe; fails only if the keeper does not answer.
    pub fn install(&self) -> io::Result<()> {
        let program =
            libc::sock_fprog { len: self.program.len() as u16, filter: self.program.as_ptr().cast_mut() };
        // A signal must not interrupt a call that is being looked at.
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
        let mode = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
        // SAFETY: the program outlives the call, which copies it.
        let raw = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
        let error = if raw < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { 0 };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let listener;
        let fds: [BorrowedFd<'_>; 1];
        if raw >= 0 {
            // SAFETY: a fresh descriptor that nobody else owns.
            listener = unsafe { OwnedFd::from_raw_fd(raw as i32) };
            fds = [listener.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(&self.socket, &[IoSlice::new(&error.to_ne_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        let mut answer = [0u8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut answer))? {
            1 => Ok(()),
            _ => Err(Errno::PIPE.into()),
        }
    }
}

impl Receiver {
    /// Waits for the listener, or for why there is none. `None`: the child ended first.
    pub fn receive(&self) -> io::Result<Option<Result<Listener, Errno>>> {
        let mut error = [0u8; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::io::retry_on_intr(|| {
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut error)], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        if got.bytes < error.len() {
            return Ok(None);
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match (fd, i32::from_ne_bytes(error)) {
            (Some(fd), 0) => Ok(Some(Ok(Listener(fd)))),
            (_, 0) => Ok(Some(Err(Errno::MFILE))),
            (_, error) => Ok(Some(Err(Errno::from_raw_os_error(error)))),
        }
    }

    /// The keeper is ready: the program may start.
    pub fn go_on(&self) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &[1]))?;
        Ok(())
    }
}

/// A system call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The kernel's number for this question.
    id: u64,
    /// The thread that makes it, 0 if it is not visible from here.
    pub tid: u32,
    /// `AUDIT_ARCH_*`.
    pub arch: u32,
    /// Which call.
    pub nr: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// Receives the calls that the filter stops.
pub struct Listener(OwnedFd);

impl Listener {
    fn ioctl<T>(&self, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes the structure that its request reads and writes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// The next call; `None` when no process with the filter is left.
    pub fn next(&self) -> io::Result<Option<Call>> {
        loop {
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            let events = fds[0].revents();
            if !events.contains(PollFlags::IN) {
                return Ok(None);
            }
            // SAFETY: plain integers, and the kernel demands zeros.
            let mut n: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            match self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, &mut n) {
                Ok(()) => {
                    let (arch, nr) = (n.data.arch, n.data.nr as u32);
                    return Ok(Some(Call { id: n.id, tid: n.pid, arch, nr, args: n.data.args }));
                }
                // The caller was killed, or interrupted before we saw the call.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether the caller is still there and waits.
    pub fn waits(&self, call: &Call) -> bool {
        let mut id = call.id;
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut id).is_ok()
    }

    /// Lets the call run.
    pub fn go_on(&self, call: &Call) -> io::Result<()> {
        let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        let mut answer = libc::seccomp_notif_resp { id: call.id, val: 0, error: 0, flags };
        match self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SEND, &mut answer) {
            // It was killed meanwhile.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

/// Reads memory of a process, as much of `buffer` as there is. Its pages are pinned for the copy, so one that the
/// manager is about to take out is read right.
pub fn read_memory(pid: u32, addr: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Page by page: a string may end just before memory that is not there.
    let mut remote = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 3];
    let (mut at, mut left, mut parts) = (addr, buffer.len(), 0);
    for part in &mut remote {
        let len = left.min(farpage::PAGE_SIZE - at as usize % farpage::PAGE_SIZE);
        if len == 0 {
            break;
        }
        *part = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len };
        (at, left, parts) = (at.wrapping_add(len as u64), left - len, parts + 1);
    }
    // SAFETY: the kernel writes only into `buffer`; the other addresses are the other process's.
    let n = unsafe { libc::process_vm_readv(pid as i32, &raw const local, 1, remote.as_ptr(), parts, 0) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// Whether two processes have one address space (`vfork`, `clone` with CLONE_VM).
pub fn share_memory(a: u32, b: u32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: compares kernel objects; no memory is touched.
    match unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        order => Ok(order == 0),
    }
}

const _: () = assert!(size_of::<libc::seccomp_notif>() == 80 && size_of::<libc::seccomp_notif_resp>() == 24);
