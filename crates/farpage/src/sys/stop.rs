//! A signal to threads that sleep in `poll`: end.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;

/// Pulled once; whoever polls its descriptor, if it has one, wakes up then, and always will.
#[derive(Default)]
pub struct Stopper {
    pulled: AtomicBool,
    fd: OnceLock<OwnedFd>,
}

impl Stopper {
    /// Gets it a descriptor. Without one it reaches only those who look.
    ///
    /// # Errors
    /// No descriptor (EMFILE, ENFILE) or no memory.
    pub fn arm(&self) -> rustix::io::Result<()> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let _the_first = self.fd.set(fd);
        Ok(())
    }

    /// Pulls it.
    pub fn pull(&self) {
        // SeqCst: pairs with the look that a thread takes before it sleeps on something else than the descriptor.
        self.pulled.store(true, Ordering::SeqCst);
        if let Some(fd) = self.fd.get() {
            // A counter that starts at 0 takes a 1.
            let _written = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    /// Whether it was pulled.
    pub fn is_pulled(&self) -> bool {
        self.pulled.load(Ordering::SeqCst)
    }

    /// What to poll for reading; negative: none.
    pub fn fd(&self) -> RawFd {
        self.fd.get().map_or(-1, AsRawFd::as_raw_fd)
    }
}
