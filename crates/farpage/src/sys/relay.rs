//! Handing a descriptor from one thread to another that has a descriptor table of its own ([`super::keep_only`]): a number
//! means nothing there.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// A pair of sockets that all these threads have: what one sends the next to receive gets, in order.
#[derive(Debug)]
pub struct Relay {
    to: OwnedFd,
    from: OwnedFd,
}

impl Relay {
    /// A new one, with numbers that programs do not count on.
    ///
    /// # Errors
    /// No descriptors.
    pub fn new() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (to, from) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok(Self { to: super::move_high(to), from: super::move_high(from) })
    }

    /// The numbers of both ends, the one to send through first.
    pub fn raw(&self) -> [RawFd; 2] {
        [self.to.as_raw_fd(), self.from.as_raw_fd()]
    }

    /// Receives what was sent first and not yet received, in the calling thread's table.
    ///
    /// # Errors
    /// There is nothing; no free descriptor.
    pub fn receive(&self) -> Result<OwnedFd, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let bytes = &mut [rustix::io::IoSliceMut::new(&mut byte)];
        recvmsg(self.from.as_fd(), bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let received = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        received.map(super::move_high).ok_or(Errno::MFILE)
    }
}

/// Sends a descriptor of the calling thread's through the end with the number `to` ([`Relay::raw`]); it is closed here.
///
/// # Errors
/// So many are under way, or `to` has been closed.
pub fn relay(to: RawFd, fd: OwnedFd) -> Result<(), Errno> {
    // SAFETY: a number that the manager keeps open in every table; should it not be, or be another file's, the call fails.
    let to = unsafe { BorrowedFd::borrow_raw(to) };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[rustix::io::IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_arrive_in_order_in_another_table() {
        let pair = Relay::new().unwrap();
        let [to, _] = pair.raw();
        assert_eq!(pair.receive().unwrap_err(), Errno::AGAIN);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                crate::sys::keep_only(&pair.raw());
                for text in ["first", "second"] {
                    let file = tempfile::tempfile().unwrap();
                    rustix::io::pwrite(&file, text.as_bytes(), 0).unwrap();
                    relay(to, file.into()).unwrap();
                }
            });
            sender.join().unwrap();
        });
        for text in ["first", "second"] {
            let file = pair.receive().unwrap();
            let mut bytes = [0; 16];
            let n = rustix::io::pread(&file, &mut bytes, 0).unwrap();
            assert_eq!(&bytes[..n], text.as_bytes());
        }
    }
}
