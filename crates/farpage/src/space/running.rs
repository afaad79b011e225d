//! A space with its manager running: what an embedding program holds.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use super::{FaultMode, Space};
use crate::domain::{Domain, DomainError, Reaper, sys_err};
use crate::frame::Owner;
use crate::{fault, reclaim, sys};

type Threads = Arc<Mutex<Vec<JoinHandle<()>>>>;

/// A [`Space`] and the threads that manage it. Clones are the same space. When the last is gone (regions hold one each) the
/// threads end and everything is given back.
///
/// A child that `fork` makes does not have the space's memory, and must not use this.
///
/// ```
/// use farpage::{Domain, Running};
///
/// fn average(space: &Running) -> Result<u64, farpage::RegionError> {
///     let v = space.region_from_fn(1 << 16, |i| i as u64)?;
///     Ok(v.iter().sum::<u64>() / v.len() as u64)
/// }
///
/// let space = Domain::builder().dram("8M").build()?.start_inline()?;
/// // It is `Send` and `Sync`.
/// let other = space.clone();
/// let sum = std::thread::spawn(move || average(&other)).join().unwrap()?;
/// assert_eq!(sum, average(&space)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Running(Arc<Inner>);

struct Inner {
    space: Arc<Space>,
    worker: Option<JoinHandle<()>>,
    handlers: Threads,
    /// A slot that stands for the one who gives back: somebody alive.
    reaper: Owner,
}

impl Domain {
    /// Starts a space whose faults are resolved by threads of the manager: everything works in it, system calls included.
    ///
    /// ```
    /// use farpage::Domain;
    /// use farpage::space::FaultMode;
    ///
    /// let space = match Domain::builder().dram("8M").device("ram:32M").build()?.start() {
    ///     Ok(space) => space,
    ///     Err(why) => return Ok(println!("skipped: {why}")), // full userfaultfd is a privilege
    /// };
    /// assert_eq!(space.mode(), FaultMode::Threaded);
    /// let mut v = space.region::<u8>(16 << 20)?;
    /// // System calls work on pages that are away.
    /// let n = std::io::Read::read(&mut std::fs::File::open("/proc/self/exe")?, &mut v[1 << 20..])?;
    /// assert!(n > 0 && v[1 << 20..].starts_with(b"\x7fELF"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// No userfaultfd (see `farpage doctor`), no memory for the tables, no threads.
    pub fn start(self) -> Result<Running, DomainError> {
        Running::new(self, FaultMode::Threaded)
    }

    /// Starts a space whose faults are resolved by the threads that make them: about twice as fast, and any process may do
    /// it; but a system call that meets a page that is away fails with EFAULT, so what is given to one is pinned first.
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").device("ram:32M").build()?.start_inline()?;
    /// assert_eq!(space.mode(), farpage::space::FaultMode::Inline);
    /// let v = space.region_from_fn(2 << 20, |i| i as u64)?;
    /// assert!(v.iter().enumerate().all(|(i, &x)| x == i as u64));
    /// assert!(space.domain.stats().faults_device > 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Domain::start`].
    pub fn start_inline(self) -> Result<Running, DomainError> {
        Running::new(self, FaultMode::Inline)
    }
}

impl Running {
    fn new(domain: Domain, mode: FaultMode) -> Result<Self, DomainError> {
        let reaper = domain.take_slot(std::process::id())?;
        let space = Arc::new(Space::with_mode(domain, mode)?);
        space.stop.arm().map_err(sys_err("make an eventfd"))?;
        let (slots, len) = space.slots.area();
        sys::keep_from_children(slots, len).map_err(sys_err("keep memory from forked children"))?;
        if space.faults.bell() != 0 {
            sys::keep_from_children(space.faults.bell(), crate::PAGE_SIZE)
                .map_err(sys_err("keep memory from forked children"))?;
        }
        let handlers = Threads::default();
        // Signals are the program's business: threads inherit that they are blocked.
        let signals = sys::BlockedSignals::new();
        let worker = spawn(&space, "farpage-reclaim", reclaim::worker::run)?;
        let mut inner = Inner { space, worker: Some(worker), handlers, reaper };
        if mode == FaultMode::Threaded {
            inner.start_handlers()?;
        } else {
            inner.space.set_running(|_| false);
        }
        drop(signals);
        Ok(Self(Arc::new(inner)))
    }

    /// The space itself, to be shared with who outlives this value's borrow.
    pub(crate) fn shared(&self) -> &Arc<Space> {
        &self.0.space
    }
}

impl Inner {
    fn start_handlers(&mut self) -> Result<(), DomainError> {
        add_handler(&self.space, &self.handlers, 0)?;
        let (space, handlers): (Weak<Space>, Threads) = (Arc::downgrade(&self.space), self.handlers.clone());
        self.space.set_running(move |index| {
            space.upgrade().is_some_and(|space| add_handler(&space, &handlers, index).is_ok())
        });
        Ok(())
    }
}

fn add_handler(space: &Arc<Space>, handlers: &Threads, index: usize) -> Result<(), DomainError> {
    let handler = spawn(space, "farpage-fault", move |space| fault::handler::run(space, index))?;
    handlers.lock().unwrap_or_else(PoisonError::into_inner).push(handler);
    Ok(())
}

fn spawn(
    space: &Arc<Space>,
    name: &str,
    run: impl FnOnce(&Space) + Send + 'static,
) -> Result<JoinHandle<()>, DomainError> {
    /// A manager that is gone leaves pages that nobody answers for.
    struct AbortOnPanic;
    impl Drop for AbortOnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                sys::fatal("a manager thread has panicked");
            }
        }
    }
    let space = space.clone();
    let body = move || {
        let _abort = AbortOnPanic;
        run(&space);
    };
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(|e| DomainError::Sys {
        what: "start the manager's threads",
        source: rustix::io::Errno::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EAGAIN)),
    })
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("mode", &self.mode()).finish_non_exhaustive()
    }
}

impl Deref for Running {
    type Target = Space;
    fn deref(&self) -> &Space {
        &self.0.space
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.space.is_mine() {
            // In a forked child all this is the parent's; its threads are not here.
            std::mem::forget(self.space.clone());
            std::mem::forget(self.worker.take());
            let handlers = std::mem::take(&mut *self.handlers.lock().unwrap_or_else(PoisonError::into_inner));
            handlers.into_iter().for_each(std::mem::forget);
            return;
        }
        self.space.stop();
        // A thread that panicked has ended the process.
        let _ended = self.worker.take().map(JoinHandle::join);
        // Only the worker starts handlers, so these are all.
        let handlers = std::mem::take(&mut *self.handlers.lock().unwrap_or_else(PoisonError::into_inner));
        handlers.into_iter().for_each(|h| drop(h.join()));
        // The worker's end has cleared the life sign: the slot counts as a dead process's.
        Reaper { domain: &self.space.domain, me: self.reaper }.give_back(self.space.me());
    }
}
