//! An address space: its managed ranges, its page entries, and the operations that change its mappings.
//!
//! # Locks
//!
//! * The **world** lock: whoever resolves a fault, evicts or settles holds it shared, for microseconds; whoever
//!   changes a mapping or forks holds it exclusively, so that he finds no page in motion.
//! * A **granule** lock orders the two or three who work on the same granule.
//! * Lists (slots, queue) have mutexes, taken last and held for nanoseconds.
//!
//! A fault handler never waits for the world: it puts the fault aside and goes on reading messages, because the
//! one who holds the world may be waiting for just such a message to be read.

mod adopt;
mod advice;
mod audit;
mod behind;
pub(crate) mod bits;
pub mod exclusive;
#[doc(hidden)]
pub mod fork;
mod hold;
mod in_place;
mod on_device;
#[doc(hidden)]
pub mod ops;
mod orphan;
pub mod pin;
pub(crate) mod puts;
#[doc(hidden)]
pub mod range;
mod remap;
mod running;
#[doc(hidden)]
pub mod slots;
pub mod snapshot;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{MutexGuard, OnceLock, PoisonError};

#[doc(hidden)]
pub use hold::Hold;
#[doc(hidden)]
pub use on_device::OnDevice;
use range::{Found, GRANULE, Ranges, flag};
pub use running::Running;
use slots::Slots;

use crate::domain::entry::Entries;
use crate::domain::{Counter, Domain, DomainError, Slot, WINDOW};
use crate::fault::Faults;
use crate::frame::Owner;
use crate::reclaim::cost::MoveCost;
use crate::sys::uffd::{Stop, Uffd, features};
use crate::sys::{self, PageScan, RwLock, SharedMap, Stopper};
use crate::{PAGE_SIZE, domain};

/// Entries at the front of the queue that count as next.
const NEXT: usize = 4 * range::STRETCH;
/// Milliseconds until a granule that could not move is tried again.
const PARKED_MS: u64 = 500;

/// How much of its stack a thread uses, at most, while it holds the world: downwards and upwards.
const STACK_BELOW: usize = 64 << 10;
const STACK_ABOVE: usize = 8 << 10;

/// What is replaced as a whole: the ranges, and the descriptors, which a forked child opens anew.
#[doc(hidden)]
pub struct World {
    /// The managed ranges.
    pub ranges: Ranges,
    /// Faults and events of the managed ranges.
    pub uffd: Uffd,
    /// Whether the kernel tells us of forks.
    pub(crate) announces_forks: bool,
    /// The staging slots are registered here, without messages: only as targets of moves.
    pub slot_uffd: Uffd,
    /// For counting pages.
    pub scan: PageScan,
    /// Through it a child's userfaultfd goes from the thread that was told of the child to the one that fills it.
    pub(crate) relay: sys::Relay,
}

/// Who resolves the faults of a space.
///
/// Chosen by [`Domain::start`] or [`Domain::start_inline`]: see the example of [`Domain::start`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    /// The manager's handler threads, told by userfaultfd messages. System calls into pages that are away work.
    Threaded,
    /// The thread that faults, by a SIGBUS handler: about half the time of the above, and any process may do it. A system call
    /// that meets a page that is away fails with EFAULT: pin what it is given.
    Inline,
}

/// Starts handler number so-and-so; false: it cannot.
type Starter = Box<dyn Fn(usize) -> bool + Send + Sync>;

/// The manager of one process's address space.
///
/// An embedding program has one inside of a [`Running`], which derefs to it. Ranges are addresses in whole pages of 4 KiB, such
/// as [`Region::pages`](crate::Region::pages) gives.
///
/// ```
/// use farpage::{Domain, Pin, Target};
///
/// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
/// let v = space.region_from_fn(1 << 16, |i| i as u64)?;
/// let pages = v.pages(..);
/// assert!(space.manages(pages.start, pages.end));
///
/// let pin = space.pin(v.pages(..512), Pin::LongTerm, false)?;
/// assert_eq!((space.pinned(), space.pinned_long_term()), (1, 1));
/// // All but the page that is pinned leave DRAM.
/// let report = space.migrate(pages.clone(), Target::Device(0))?;
/// assert_eq!((report.moved(), report.refused().count()), (127, 1));
/// drop(pin);
/// let there = space.snapshot(pages)?;
/// assert_eq!(there.iter().filter(|page| page.place == farpage::space::snapshot::Place::System).count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Space {
    /// The domain it belongs to.
    pub domain: Domain,
    me: AtomicU32,
    /// Its page entries.
    #[doc(hidden)]
    pub entries: Entries,
    window: SharedMap,
    /// See the module's text.
    #[doc(hidden)]
    pub world: RwLock<World>,
    /// Staging slots and free frames.
    #[doc(hidden)]
    pub slots: Slots,
    /// Granules in order of arrival: stamp and address.
    queue: std::sync::Mutex<VecDeque<(u64, usize)>>,
    /// Granules of which nothing could move when it was their turn (read-only, locked, pinned), and when they are to be
    /// tried again.
    parked: std::sync::Mutex<(Vec<usize>, u64)>,
    /// Held while granules change between granted and registered.
    pub(crate) grants: std::sync::Mutex<()>,
    /// The budget was exhausted at some time: frames circulate, reclaim keeps a stock.
    #[doc(hidden)]
    pub pressure: AtomicBool,
    descriptors: [AtomicI32; 6],
    /// Not set in a child that nobody prepared: there all this is the parent's.
    mark: sys::ForkMark,
    running: AtomicBool,
    /// Tells the manager's threads to end.
    pub(crate) stop: Stopper,
    /// How faults are resolved.
    mode: FaultMode,
    /// Starts one more handler thread; who has the manager's threads provides it.
    starter: OnceLock<Starter>,
    /// Frames are used up fast: the worker is to keep a stock.
    pub(crate) stock_wanted: AtomicBool,
    /// More is staged than need be: the worker is to settle it.
    pub(crate) settle_wanted: AtomicBool,
    /// See [`MoveCost`].
    pub(crate) move_cost: MoveCost,
    /// Held by who makes room; whoever else needs room waits for him, and then has it.
    pub(crate) making_room: RwLock<()>,
    /// Held, shared, by who settles; exclusively, for a moment, by who evicts: see [`Space::make_room`]. Only for speed.
    pub(crate) quiet: RwLock<()>,
    /// The worker sleeps.
    pub(crate) asleep: AtomicBool,
    /// Forks through the C library whose event no handler has seen yet.
    pub(crate) forks: AtomicU32,
    /// Fault handling.
    pub faults: Faults,
    /// What streams will want next, as first byte and end.
    pub(crate) ahead: sys::Mutex<VecDeque<(usize, usize)>>,
    /// Granules that the program wants out of DRAM, and whether all the way.
    outgoing: sys::Mutex<VecDeque<(usize, bool)>>,
    /// How many of them are not out yet; who asked sleeps on it.
    leaving: AtomicU32,
    /// Ranges that others drop pages of just now.
    flux: sys::Mutex<behind::Flux>,
    /// See [`hold`].
    holds: hold::Holds,
    /// A fault brings in the page that was touched and no other.
    pub(crate) one_by_one: AtomicBool,
    /// See [`pin`].
    pins: pin::Pins,
    /// See [`exclusive`].
    exclusives: exclusive::Exclusives,
    /// Pages have been mapped in place at some time: see [`in_place`].
    maps_in_place: AtomicBool,
    /// What manager threads are asked to do: see [`crate::migrate`].
    pub(crate) jobs: crate::migrate::Jobs,
    /// No device takes a page any more; cleared when frames become free.
    pub(crate) full: AtomicBool,
    pub(crate) said_full: AtomicBool,
    /// Until when (in milliseconds of the monotonic clock) it is of no use to look for something that could leave.
    pub(crate) stuck_until: AtomicU64,
}

fn lock<T>(m: &std::sync::Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of a manager thread aborts the process; there is no poisoned state to fear.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    /// Joins the domain with the calling process.
    ///
    /// # Errors
    /// [`DomainError`]: no slot, no userfaultfd, no memory for the tables.
    #[doc(hidden)]
    pub fn new(domain: Domain) -> Result<Self, DomainError> {
        Self::with_mode(domain, FaultMode::Threaded)
    }

    /// As [`Space::new`]; faults are resolved as `mode` says.
    ///
    /// # Errors
    /// As [`Space::new`].
    #[doc(hidden)]
    pub fn with_mode(domain: Domain, mode: FaultMode) -> Result<Self, DomainError> {
        let me = domain.take_slot(sys::number_in_proc())?;
        let window = domain.map_window(me)?;
        let budget = domain.budget() as usize;
        // Enough slots that a sixteenth of the budget can be staged even if a granule has only 8 pages in DRAM.
        let slots = Slots::new((budget / 16 / 8).clamp(16, 8192))
            .map_err(domain::sys_err("reserve staging slots"))?;
        let world = World::open(Ranges::default(), &slots, mode)?;
        let space = Self {
            me: AtomicU32::new(u32::from(me)),
            entries: Entries::new(&window),
            window,
            world: RwLock::new(world),
            slots,
            queue: std::sync::Mutex::new(VecDeque::new()),
            parked: std::sync::Mutex::new((Vec::new(), 0)),
            grants: std::sync::Mutex::new(()),
            pressure: AtomicBool::new(false),
            mark: sys::ForkMark::new().map_err(domain::sys_err("map a page"))?,
            descriptors: [const { AtomicI32::new(-1) }; 6],
            running: AtomicBool::new(false),
            stop: Stopper::default(),
            mode,
            starter: OnceLock::new(),
            stock_wanted: AtomicBool::new(false),
            settle_wanted: AtomicBool::new(false),
            move_cost: MoveCost::default(),
            making_room: RwLock::new(()),
            quiet: RwLock::new(()),
            asleep: AtomicBool::new(false),
            forks: AtomicU32::new(0),
            faults: Faults::new(),
            ahead: sys::Mutex::new(VecDeque::new()),
            outgoing: sys::Mutex::new(VecDeque::new()),
            leaving: AtomicU32::new(0),
            flux: sys::Mutex::new(behind::Flux::default()),
            holds: hold::Holds::new(),
            one_by_one: AtomicBool::new(false),
            pins: pin::Pins::default(),
            exclusives: exclusive::Exclusives::default(),
            maps_in_place: AtomicBool::new(false),
            jobs: crate::migrate::Jobs::default(),
            full: AtomicBool::new(false),
            said_full: AtomicBool::new(false),
            stuck_until: AtomicU64::new(0),
            domain,
        };
        if mode == FaultMode::Threaded {
            space.ring_bell_with(&space.world.read())?;
        }
        space.note_descriptors(&space.world.read());
        Ok(space)
    }

    /// This process's slot number.
    #[doc(hidden)]
    pub fn me(&self) -> Owner {
        self.me.load(Ordering::Relaxed) as Owner
    }

    /// This process's slot.
    #[doc(hidden)]
    pub fn slot(&self) -> &'static Slot {
        self.domain.slot(self.me())
    }

    /// Descriptors of the manager, which the program must not close.
    #[doc(hidden)]
    pub fn descriptors(&self) -> [i32; 6] {
        self.descriptors.each_ref().map(|d| d.load(Ordering::Relaxed))
    }

    /// Whether a descriptor is the manager's.
    #[doc(hidden)]
    pub fn owns_descriptor(&self, fd: i32) -> bool {
        self.descriptors.iter().any(|d| d.load(Ordering::Relaxed) == fd)
    }

    pub(crate) fn note_descriptors(&self, world: &World) {
        use std::os::fd::{AsFd, AsRawFd};
        let [to, from] = world.relay.raw();
        let segment = self.domain.fd().as_fd().as_raw_fd();
        let fds = [world.uffd.raw(), world.slot_uffd.raw(), world.scan.raw(), segment, to, from];
        self.descriptors.iter().zip(fds).for_each(|(d, fd)| d.store(fd, Ordering::Relaxed));
    }

    /// Whether this is the process (or the prepared child) that this manager belongs to. In a child that was forked past
    /// the C library nothing of it may be used.
    #[doc(hidden)]
    pub fn is_mine(&self) -> bool {
        self.mark.is_set()
    }

    /// The manager's threads are there: from now on faults are answered. `starter` starts handler number so-and-so, on a
    /// manager thread; false: it cannot.
    #[doc(hidden)]
    pub fn set_running(&self, starter: impl Fn(usize) -> bool + Send + Sync + 'static) {
        let _the_same = self.starter.set(Box::new(starter));
        self.running.store(true, Ordering::Release);
    }

    /// How faults are resolved.
    ///
    /// See the example of [`Domain::start`].
    pub fn mode(&self) -> FaultMode {
        self.mode
    }

    /// The manager's threads end as soon as they have done what they are at. From then on faults are not answered.
    #[doc(hidden)]
    pub fn stop(&self) {
        self.stop.pull();
        self.faults.follow.wake_all();
        self.wake_worker();
    }

    /// Whether [`Space::stop`] was called.
    pub(crate) fn stopping(&self) -> bool {
        self.stop.is_pulled()
    }

    /// Can be read once [`Space::stop`] was called.
    pub(crate) fn stop_fd(&self) -> i32 {
        self.stop.fd()
    }

    /// Whether the manager's threads are there.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// The world, to look at it.
    pub(crate) fn read_world(&self) -> sys::Read<'_, World> {
        self.world.read()
    }

    pub(crate) fn start_handler(&self, index: usize) -> bool {
        self.starter.get().is_some_and(|start| start(index))
    }

    /// Whether a fault brings in, besides the page that was touched, those that are likely to be touched next (it does unless told
    /// otherwise).
    ///
    /// ```
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// space.set_fault_around(false); // for accesses without any order
    /// let v = space.region_from_fn(1 << 16, |i| i as u64)?;
    /// space.migrate(v.pages(..), Target::Device(0))?;
    /// assert_eq!(v[5 * 512], 5 * 512);
    /// assert_eq!(space.domain.stats().pages_in, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_fault_around(&self, around: bool) {
        self.one_by_one.store(!around, Ordering::Relaxed);
    }

    /// Whether an address is in the manager's tables or slots.
    #[doc(hidden)]
    pub fn is_own(&self, addr: usize) -> bool {
        addr.wrapping_sub(self.window.addr()) < WINDOW || self.slots.holds(addr) || self.domain.maps(addr)
    }

    /// With `--strict`: whether a new mapping of `len` bytes finds no room any more.
    #[doc(hidden)]
    pub fn refuses(&self, _len: usize) -> bool {
        self.domain.config.strict && self.full.load(Ordering::Relaxed)
    }

    /// Adds to one of this process's counters.
    #[doc(hidden)]
    pub fn count(&self, c: Counter, n: u64) {
        self.slot().count(c, n);
    }

    /// The granule has pages in DRAM: it queues as the youngest.
    pub(crate) fn enqueue(&self, found: &Found<'_>) {
        if !found.granule.set(flag::QUEUED) {
            let stamp = self.domain.stamp();
            let mut q = lock(&self.queue);
            if q.is_empty() {
                self.slot().oldest.store(stamp, Ordering::Relaxed);
            }
            q.push_back((stamp, found.start));
        }
    }

    /// The granule at `addr` has left the queue: what was cut off it while it was there, of which the queue does not know, queues.
    fn enqueue_parts(&self, world: &World, addr: usize) {
        let end = addr / GRANULE * GRANULE + GRANULE;
        for (found, ..) in world.ranges.granules(addr, end) {
            if found.start > addr && found.granule.clear(flag::CUT) && found.granule.clear(flag::QUEUED) {
                self.enqueue(&found);
            }
        }
    }

    /// The granule that arrived first.
    pub(crate) fn dequeue(&self, world: &World) -> Option<usize> {
        self.dequeue_at(world, |_| Some(0))
    }

    /// Takes the granule at `addr` from the queue if it is among the next: two streams' granules come in turns.
    pub(crate) fn dequeue_if(&self, world: &World, addr: usize) -> bool {
        self.dequeue_at(world, |q| q.iter().take(NEXT).position(|e| e.1 == addr)).is_some()
    }

    fn dequeue_at(
        &self,
        world: &World,
        place: impl FnOnce(&VecDeque<(u64, usize)>) -> Option<usize>,
    ) -> Option<usize> {
        let mut q = lock(&self.queue);
        let taken = place(&q).and_then(|at| q.remove(at));
        self.slot().oldest.store(q.front().map_or(u64::MAX, |e| e.0), Ordering::Relaxed);
        drop(q);
        let (_, addr) = taken?;
        self.enqueue_parts(world, addr);
        Some(addr)
    }

    /// Nothing of the granule can move now: it does not queue for a while, so that not every fault tries it again.
    pub(crate) fn park(&self, found: &Found<'_>) {
        if !found.granule.set(flag::QUEUED) {
            let mut parked = lock(&self.parked);
            if parked.0.is_empty() {
                parked.1 = sys::now_ms() + PARKED_MS;
            }
            parked.0.push(found.start);
        }
    }

    /// Those that were parked long enough queue again.
    pub(crate) fn unpark(&self, world: &World) {
        let mut parked = lock(&self.parked);
        if parked.0.is_empty() || sys::now_ms() < parked.1 {
            return;
        }
        let granules = std::mem::take(&mut parked.0);
        drop(parked);
        for at in granules {
            self.enqueue_parts(world, at);
            if let Some(found) = world.ranges.granule(at)
                && found.granule.clear(flag::QUEUED)
            {
                self.enqueue(&found);
            }
        }
    }

    /// How many granules are queued.
    pub(crate) fn queued(&self) -> usize {
        lock(&self.queue).len()
    }

    /// Wakes the reclaim worker.
    pub(crate) fn wake_worker(&self) {
        // SeqCst with the worker's store to `asleep`: either it sees the new number or we see that it sleeps.
        let work = &self.slot().work;
        work.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            crate::sys::futex_wake(work, i32::MAX);
        }
    }
}

impl World {
    fn open(ranges: Ranges, slots: &Slots, mode: FaultMode) -> Result<Self, DomainError> {
        use domain::sys_err;
        let (uffd, announces_forks) = match mode {
            FaultMode::Threaded => Self::open_for_messages(),
            FaultMode::Inline => (Uffd::open_for_sigbus(features::POISON | features::MOVE), false),
        };
        let uffd = uffd.map_err(sys_err("open userfaultfd (see `farpage doctor`)"))?;
        let slot_uffd = Uffd::open_for_sigbus(features::MOVE).map_err(sys_err("open userfaultfd"))?;
        let (start, len) = slots.area();
        slot_uffd.register(start, len).map_err(sys_err("register the staging slots"))?;
        let scan = PageScan::open().map_err(sys_err("open the page map"))?;
        let relay = sys::Relay::new().map_err(sys_err("make a pair of sockets"))?;
        Ok(Self { ranges, uffd, announces_forks, slot_uffd, scan, relay })
    }

    fn open_for_messages() -> (rustix::io::Result<Uffd>, bool) {
        let base = features::EVENT_REMAP | features::EVENT_REMOVE | features::EVENT_UNMAP;
        let base = base | features::THREAD_ID | features::POISON | features::MOVE;
        // Without CAP_SYS_PTRACE a fork is not announced; forks through the C library are handled all the same.
        match Uffd::open(base | features::EVENT_FORK) {
            Ok(uffd) => (Ok(uffd), true),
            Err(_) => (Uffd::open(base), false),
        }
    }

    /// Registers `[start, end)`. In a forked child the parent's handler may be just about to let go of it (EBUSY until then).
    fn register(&self, start: usize, end: usize) -> Result<(), DomainError> {
        let deadline = sys::now_ms() + 5000;
        loop {
            match self.uffd.register(start, end - start) {
                Err(rustix::io::Errno::BUSY) if sys::now_ms() < deadline => sys::yield_now(),
                r => return r.map_err(domain::sys_err("register memory with userfaultfd")),
            }
        }
    }

    /// The part of the calling thread's stack that it is going to use, if that is managed and not all in DRAM.
    fn away_from_stack(&self) -> Option<(usize, usize)> {
        let here = sys::stack_pointer();
        let found = self.ranges.granule(here)?;
        let start = here.saturating_sub(STACK_BELOW).max(found.range.start) / PAGE_SIZE * PAGE_SIZE;
        let end = (here + STACK_ABOVE).min(found.range.end).next_multiple_of(PAGE_SIZE);
        let pages = ((end - start) / PAGE_SIZE) as u64;
        (self.scan.count(start, end) != Ok(pages)).then_some((start, end))
    }

    /// `UFFDIO_MOVE` by way of `uffd`: returns the bytes moved and, if fewer than asked, why not all.
    ///
    /// Linux 6.18 moves pages and does not count them: once it has had to try again inside the call (the pages are parts of
    /// a huge page that it first has to split), it goes over what it has just moved as well, finds it at the
    /// destination, and answers EEXIST. So EEXIST is believed only if the page is still at its source.
    pub(crate) fn move_pages(
        &self,
        uffd: &Uffd,
        dst: usize,
        src: usize,
        len: usize,
        holes: bool,
    ) -> (usize, Option<Stop>) {
        let mut at = 0;
        loop {
            let (done, stop) = uffd.move_pages(dst + at, src + at, len - at, holes);
            at += done;
            if stop != Some(Stop::Exists) {
                return (at, stop);
            }
            let gone = match self.scan.first_present(src + at, src + len) {
                Ok(first) => first.unwrap_or(src + len) - src - at,
                Err(e) => sys::fatal(&format!("cannot find out which pages have moved: {e}")),
            };
            if gone == 0 {
                return (at, stop);
            }
            at += gone;
            if at == len {
                return (len, None);
            }
        }
    }

    /// Counts the pages of `[start, end)` that are in DRAM; all of them if that cannot be found out.
    pub(crate) fn resident(&self, start: usize, end: usize) -> u64 {
        self.scan.count(start, end).unwrap_or(((end - start) / PAGE_SIZE) as u64)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // Nobody else has the space any more, so no view of the entries is left.
        self.window.unmap();
    }
}

const _: () = assert!(WINDOW == domain::ADDRESS_LIMIT / PAGE_SIZE * 8);
