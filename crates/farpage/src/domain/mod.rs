//! A domain: a process tree that shares a DRAM budget and devices, and the segment that holds its state.

mod audit;
mod budget;
mod builder;
pub(crate) mod child;
#[doc(hidden)]
pub mod entry;
mod layout;
mod reap;
mod slot;
mod stats;
mod tenants;
mod walk;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags};

pub(crate) use audit::UNCERTAIN;
pub use audit::{Audit, ChargeDifference, Difference, Holding};
pub use builder::{BuildError, Builder};
#[doc(hidden)]
pub use layout::{ADDRESS_LIMIT, SLOT_COUNT, WINDOW};
#[doc(hidden)]
pub use reap::Launcher;
pub(crate) use reap::Reaper;
#[doc(hidden)]
pub use slot::{Counter, Slot, state};
pub use stats::{DeviceStats, Stats};
#[doc(hidden)]
pub use tenants::DomainTenants;

use crate::device::memory::DeviceMemory;
use crate::device::spec::{SetupError, Spec};
use crate::device::{Attach, Device, MemoryType};
use crate::frame::{Owner, Pfn};
use crate::pagemap::{Live, Pagemap, RefError, RegisterError, Registration};
use crate::sys::{Peers, SharedArea, SharedMap};

/// Environment variable that names the domain's segment to the processes of the tree.
#[doc(hidden)]
pub const ENV_DOMAIN: &str = "FARPAGE_DOMAIN";

/// What a domain is made of. Sizes in bytes.
///
/// A domain has its own as [`Domain::config`]; see the example of [`Domain`].
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// The most DRAM that the managed memory of the whole tree may occupy.
    pub dram: u64,
    /// The smallest anonymous mapping that is managed.
    pub min_size: u64,
    /// When everything is full, new mappings fail instead of going above the budget.
    pub strict: bool,
    /// Say more on stderr.
    pub verbose: bool,
    /// DRAM frames may be used again without giving them to the kernel, where it is certain that the kernel holds no
    /// plain reference to them. See [`Domain::may_recycle`].
    pub recycle: bool,
    /// The most memory that may be pinned in the whole tree (as `RLIMIT_MEMLOCK`); half of `dram` if not given. What is
    /// pinned cannot leave DRAM, so it takes from what all others may use.
    #[serde(default)]
    pub max_pinned: Option<u64>,
    /// In order of preference; sizes resolved.
    pub devices: Vec<Spec>,
}

#[cfg(test)]
impl Config {
    /// The smallest, with these devices.
    pub(crate) fn small(devices: &[&str]) -> Self {
        Self {
            dram: 1 << 20,
            min_size: 1 << 20,
            strict: false,
            verbose: false,
            recycle: false,
            max_pinned: None,
            devices: devices.iter().map(|spec| spec.parse().unwrap()).collect(),
        }
    }
}

/// Why a domain could not be made or joined.
///
/// ```
/// use farpage::domain::DomainError;
/// use farpage::{BuildError, Domain};
///
/// let error = Domain::builder().device("file:/nowhere:64M").build().err().unwrap();
/// assert!(matches!(error, BuildError::Domain(DomainError::Device { .. })));
/// assert!(error.to_string().starts_with("device file:/nowhere:64M: cannot create a file of 64M in `/nowhere`: "));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Sys {
        /// What was tried.
        what: &'static str,
        /// The reason.
        source: rustix::io::Errno,
    },
    /// A device could not be set up.
    #[error("device {device}: {source}")]
    Device {
        /// Its specification.
        device: String,
        /// The reason.
        source: SetupError,
    },
    /// A device's memory could not be registered, or is not registered any more.
    #[error("device {device}: {source}")]
    Register {
        /// Its specification.
        device: String,
        /// The reason.
        source: RegisterError,
    },
    /// The segment is not one of ours, or of another version.
    #[error("not a farpage segment")]
    NotOurs,
    /// The domain has devices of its creator's own.
    #[error("the domain has devices that only the process that made them can reach")]
    Private,
    /// All process slots are taken.
    #[error("more than {} processes at once", SLOT_COUNT - 1)]
    TooManyProcesses,
    /// The configuration is too long.
    #[error("configuration too long")]
    TooLong,
}

/// Turns an errno into an error that says what was tried.
pub(crate) fn sys_err(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> DomainError {
    move |source| DomainError::Sys { what, source }
}

/// What the segment records of the domain besides the caller's [`Config`].
#[derive(serde::Serialize, serde::Deserialize)]
struct Record {
    config: Config,
    launcher: u32,
    /// Per device: path of its backing file.
    paths: Vec<Option<String>>,
    /// There are devices that only the creating process can reach.
    private: bool,
}

/// Words of the header behind the configuration.
struct HeaderWords {
    /// Stamps of arrival.
    clock: &'static AtomicU64,
    /// Largest sum of charges seen.
    peak: &'static AtomicU64,
    /// Processes that ever joined.
    joined: &'static AtomicU64,
    /// Address spaces whose references the launcher gave back when they ended.
    reaped: &'static AtomicU64,
    /// One past the highest slot ever used.
    high: &'static AtomicU32,
    /// Changes when a slot changes its state.
    epoch: &'static AtomicU32,
    /// Not 0: any process may have plain references to its pages. Never goes back to 0.
    plain_all: &'static AtomicU32,
    /// Counters of processes that have ended.
    past: &'static [AtomicU64],
}

/// The domain as one process sees it.
///
/// Made by [`Domain::builder`]. Counts of DRAM are in pages of 4 KiB, configured sizes in bytes.
///
/// ```
/// use farpage::Domain;
///
/// let domain = Domain::builder().dram("8M").device("ram:16M").device("mem:1M").max_pinned(1 << 20).build()?;
/// assert_eq!((domain.config.dram, domain.budget(), domain.pin_limit()), (8 << 20, 2048, 256));
/// // Devices have numbers, in order of preference.
/// assert_eq!((domain.pagemap(1).name(), domain.pagemap(1).id), ("mem:1M", 1));
///
/// // It becomes part of its space, which hands it out.
/// let space = domain.start_inline()?;
/// let v = space.region_from_fn(1 << 16, |i| i as u64)?;
/// let domain = &space.domain;
/// assert!(domain.charged() >= v.pages(..).len() as u64 / 4096);
/// assert_eq!(domain.pinned(), 0);
/// assert!(domain.audit_frames()?.is_right());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Domain {
    /// The configuration.
    pub config: Config,
    /// The process that created it.
    #[doc(hidden)]
    pub launcher: u32,
    /// The devices, in order of preference.
    pub pagemaps: Vec<Pagemap>,
    map: SharedMap,
    file: OwnedFd,
    words: HeaderWords,
    peers: Arc<SlotPeers>,
    /// In the launcher: the devices' backing files.
    backing: Vec<OwnedFd>,
}

/// Slots as peers of a robust lock.
struct SlotPeers {
    area: SharedArea,
    /// This is the process that gives back what others held. It can tell of one without a life sign whether it has ended, and
    /// nobody would tell it: a lock that it waits for is waited for by its reaper.
    reaps: bool,
}

impl SlotPeers {
    fn slot(&self, owner: Owner) -> &'static Slot {
        let area = self.area.part(owner as usize * layout::SLOT_SIZE, size_of::<Slot>());
        let words = area.atomics64();
        // SAFETY: a slot consists of atomics only, for which any bytes are valid; it lies in a shared mapping
        // that is never unmapped, at an offset that is a multiple of its alignment (the mapping is page-aligned).
        unsafe { &*words.as_ptr().cast::<Slot>() }
    }
}

impl Peers for SlotPeers {
    fn is_alive(&self, owner: u16) -> bool {
        let slot = self.slot(owner);
        !(slot.is_dead() || self.reaps && reap::has_ended(slot))
    }
}

impl Domain {
    /// Creates the segment, and in it the devices.
    ///
    /// # Errors
    /// [`DomainError::Sys`] and [`DomainError::Device`], both saying on what.
    #[doc(hidden)]
    pub fn create(config: &Config) -> Result<Self, DomainError> {
        Self::create_with(config, Vec::new())
    }

    /// As [`Domain::create`], with devices of this process's own besides; no other process can join then.
    ///
    /// # Errors
    /// As [`Domain::create`].
    #[doc(hidden)]
    pub fn create_with(config: &Config, own: Vec<Box<dyn Device>>) -> Result<Self, DomainError> {
        let file = rustix::fs::memfd_create("farpage", MemfdFlags::CLOEXEC)
            .map_err(sys_err("create the domain's shared memory"))?;
        rustix::fs::ftruncate(&file, layout::FILE_LEN).map_err(sys_err(
            "size the domain's shared memory (is a file size limit set? see `ulimit -f`)",
        ))?;
        let launcher = std::process::id();
        let mut config = config.clone();
        for spec in &mut config.devices {
            *spec = spec.clone().resolved().map_err(|source| device_err(spec, source))?;
        }
        let mut backing = Vec::new();
        let mut paths = Vec::new();
        for spec in &config.devices {
            let fd = spec.create_backing().map_err(|source| device_err(spec, source))?;
            paths.push(fd.as_ref().map(crate::device::spec::backing_path));
            backing.push(fd);
        }
        let private = !own.is_empty();
        let record = Record { config, launcher, paths, private };
        let json = serde_json::to_vec(&record).map_err(|_| DomainError::TooLong)?;
        if json.len() > layout::HEADER / 2 {
            return Err(DomainError::TooLong);
        }
        let map = Self::map(&file, &record, &own)?;
        let area = map.area(0, layout::HEADER);
        area.write(16, &json);
        area.atomics64()[1].store(json.len() as u64, Ordering::Relaxed);
        // Release: who sees the magic sees the rest (the tree is started afterwards anyway).
        area.atomics64()[0].store(layout::MAGIC, Ordering::Release);
        // Its children reach them through /proc.
        let mut domain = Self::open(file, map, record, true, own)?;
        domain.backing = backing.into_iter().flatten().collect();
        Ok(domain)
    }

    /// Joins the domain whose segment `path` names.
    ///
    /// # Errors
    /// [`DomainError::NotOurs`] if the file is something else; [`DomainError::Sys`] if it cannot be reached.
    #[doc(hidden)]
    pub fn attach(path: &str) -> Result<Self, DomainError> {
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(sys_err("open the domain's shared memory"))?;
        let file = crate::sys::move_high(file);
        let head = SharedMap::new(&file, 0, layout::HEADER).map_err(sys_err("map the domain's header"))?;
        let area = head.area(0, layout::HEADER);
        let words = area.atomics64();
        // Acquire pairs with the Release in `create`.
        if words[0].load(Ordering::Acquire) != layout::MAGIC {
            return Err(DomainError::NotOurs);
        }
        let len = (words[1].load(Ordering::Relaxed) as usize).min(layout::HEADER / 2);
        let mut json = vec![0; len];
        area.read(16, &mut json);
        let record: Record = serde_json::from_slice(&json).map_err(|_| DomainError::NotOurs)?;
        if record.private {
            return Err(DomainError::Private);
        }
        let map = Self::map(&file, &record, &[])?;
        Self::open(file, map, record, false, Vec::new())
    }

    fn map(file: &OwnedFd, record: &Record, own: &[Box<dyn Device>]) -> Result<SharedMap, DomainError> {
        let len: usize = record.config.devices.iter().map(|s| counts_len(s.frames()) + own_len(s)).sum();
        let len = len + own.iter().map(|d| counts_len(d.frames())).sum::<usize>();
        SharedMap::new(file, 0, layout::DEVICES + len).map_err(sys_err(
            "map the domain's shared memory (is an address space limit set? see `ulimit -v`)",
        ))
    }

    fn open(
        file: OwnedFd,
        map: SharedMap,
        record: Record,
        create: bool,
        own: Vec<Box<dyn Device>>,
    ) -> Result<Self, DomainError> {
        let area = map.area(layout::HEADER, SLOT_COUNT * layout::SLOT_SIZE);
        let peers = Arc::new(SlotPeers { area, reaps: create });
        let mut at = layout::DEVICES;
        let mut pagemaps = Vec::new();
        for (id, (spec, path)) in record.config.devices.iter().zip(&record.paths).enumerate() {
            let counts = map.area(at, counts_len(spec.frames()));
            let area = map.area(at + counts_len(spec.frames()), own_len(spec));
            at += counts_len(spec.frames()) + own_len(spec);
            let attach = Attach { area, path: path.clone(), peers: peers.clone(), create };
            let device = spec.attach(attach).map_err(|source| device_err(spec, source))?;
            let what = registration(id as u8, device);
            let map = Pagemap::register(what, counts, create)
                .map_err(|source| DomainError::Register { device: spec.to_string(), source })?;
            pagemaps.push(map);
        }
        for device in own {
            let counts = map.area(at, counts_len(device.frames()));
            at += counts.len();
            let name = device.name().to_owned();
            let what = registration(pagemaps.len() as u8, device);
            let map = Pagemap::register(what, counts, create)
                .map_err(|source| DomainError::Register { device: name, source })?;
            pagemaps.push(map);
        }
        let w = map.area(layout::HEADER / 2, layout::HEADER / 2).atomics64();
        let w32 = map.area(layout::HEADER - 64, 64).atomics32();
        let words = HeaderWords {
            clock: &w[0],
            peak: &w[8],
            joined: &w[16],
            reaped: &w[17],
            high: &w32[0],
            epoch: &w32[1],
            plain_all: &w32[2],
            past: &w[24..24 + slot::COUNTERS],
        };
        let Record { config, launcher, .. } = record;
        Ok(Self { config, launcher, pagemaps, map, file, words, peers, backing: Vec::new() })
    }

    /// The tree has ended: the memory of devices that have some of their own goes back, as far as it can, so that a file that
    /// has a name is empty again.
    fn give_back_memory(&self, me: Owner) {
        let own = self.pagemaps.iter().filter(|map| map.device.ops().memory().is_some());
        for map in own.filter(|map| map.frames.used() == 0) {
            if let Err(e) = map.device.ops().remove(me) {
                crate::sys::say(&format!("device {}: cannot give its memory back: {e}", map.name()));
            }
        }
    }

    /// The segment's descriptor.
    #[doc(hidden)]
    pub fn fd(&self) -> impl AsFd + '_ {
        self.file.as_fd()
    }

    /// Whether an address is in this process's mappings of the segment and of the devices' memory.
    #[doc(hidden)]
    pub fn maps(&self, addr: usize) -> bool {
        let of_a_device = |map: &Pagemap| {
            let len = map.frames.len() * crate::PAGE_SIZE;
            map.device.address_of(0).is_some_and(|start| addr.wrapping_sub(start) < len)
        };
        addr.wrapping_sub(self.map.addr()) < self.map.len() || self.pagemaps.iter().any(of_a_device)
    }

    /// Where a frame's bytes lie, if they lie somewhere as they are: a file, and the offset in it.
    #[doc(hidden)]
    pub fn file_of(&self, device: u8, pfn: Pfn) -> Option<(BorrowedFd<'_>, u64)> {
        let map = self.pagemap(device);
        if let Some(memory) = map.device.ops().memory() {
            return Some((memory.file().get().ok()?, u64::from(pfn) * memory.frame_size()));
        }
        let offset = map.device.address_of(pfn)?.checked_sub(self.map.addr())?;
        (offset < self.map.len()).then_some((self.file.as_fd(), offset as u64))
    }

    /// Gives back what processes of the domain held that have died or begun another program, and returns how many: for the process
    /// in slot `me`, where there is no launcher.
    #[doc(hidden)]
    pub fn reap(&self, me: Owner) -> usize {
        reap::Reaper { domain: self, me }.reap_those(false)
    }

    /// The process slot `owner`.
    #[doc(hidden)]
    pub fn slot(&self, owner: Owner) -> &'static Slot {
        self.peers.slot(owner)
    }

    /// Slots that were ever used, with their numbers.
    #[doc(hidden)]
    pub fn slots(&self) -> impl Iterator<Item = (Owner, &'static Slot)> + '_ {
        let high = self.words.high.load(Ordering::Acquire) as Owner;
        (1..high.max(1)).map(|o| (o, self.slot(o)))
    }

    /// The next stamp of the domain's clock, which orders arrivals across its processes.
    #[doc(hidden)]
    pub fn stamp(&self) -> u64 {
        // Relaxed: only the order of the numbers matters.
        self.words.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a free slot for process `pid`; it is FORMING.
    #[doc(hidden)]
    pub fn take_slot(&self, pid: u32) -> Result<Owner, DomainError> {
        for owner in 1..SLOT_COUNT as Owner {
            let s = self.slot(owner);
            // Acquire pairs with the Release of the reaper that freed it.
            if s.state.load(Ordering::Relaxed) == state::FREE
                && s.state
                    .compare_exchange(state::FREE, state::FORMING, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                s.pid.store(pid, Ordering::Release);
                s.oldest.store(u64::MAX, Ordering::Relaxed);
                self.words.high.fetch_max(u32::from(owner) + 1, Ordering::AcqRel);
                self.words.joined.fetch_add(1, Ordering::Relaxed);
                self.changed();
                return Ok(owner);
            }
        }
        Err(DomainError::TooManyProcesses)
    }

    /// Maps the window of page entries of `owner`.
    #[doc(hidden)]
    pub fn map_window(&self, owner: Owner) -> Result<SharedMap, DomainError> {
        SharedMap::new(&self.file, layout::window_offset(owner), WINDOW)
            .map_err(sys_err("map the page entries (is an address space limit set? see `ulimit -v`)"))
    }

    /// Whether a frame that `owner` has moved out may be used for another page. To be asked *after* the page was
    /// moved: a call that takes plain references is marked before it runs, so no mark then means that no such
    /// reference to the moved page exists.
    #[doc(hidden)]
    pub fn may_recycle(&self, owner: Owner) -> bool {
        // SeqCst pairs with the stores of `Launcher::mark_plain_refs` and `mark_all`.
        self.recycles() && self.slot(owner).plain_refs.load(Ordering::SeqCst) == 0
    }

    /// Whether frames are recycled in this domain at all.
    pub(crate) fn recycles(&self) -> bool {
        self.config.recycle && self.words.plain_all.load(Ordering::SeqCst) == 0
    }

    /// Something about the slots changed: the launcher looks again.
    #[doc(hidden)]
    pub fn changed(&self) {
        self.words.epoch.fetch_add(1, Ordering::AcqRel);
        crate::sys::futex_wake(self.words.epoch, i32::MAX);
    }

    /// The pagemap of frame `pfn` of device `id`, kept from being unregistered while the result lives.
    ///
    /// # Errors
    /// As [`crate::pagemap::lookup`].
    #[doc(hidden)]
    pub fn lookup(&self, id: u8, pfn: Pfn, owner: Owner) -> Result<Live<'_>, RefError> {
        crate::pagemap::lookup(&self.pagemaps, id, pfn, owner)
    }

    /// The pagemap with this number.
    ///
    /// Panics if there is no such device; [`Domain::pagemaps`] has all of them.
    pub fn pagemap(&self, id: u8) -> &Pagemap {
        &self.pagemaps[id as usize]
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Views of the segment are handed out by way of the domain only, and used while it lives.
        self.map.unmap();
    }
}

/// A device that stores and loads pages: of the type of the memory in which they lie, if the CPU reaches that.
fn registration(id: u8, device: Box<dyn Device>) -> Registration {
    let memory_type = device.memory().map_or(MemoryType::Private, DeviceMemory::memory_type);
    Registration { memory_type, ..Registration::paging(id, device) }
}

/// Bytes of a device's frame table in the segment; whole pages, so that its own area begins on one.
fn counts_len(frames: u32) -> usize {
    Pagemap::shared_len(frames).next_multiple_of(crate::PAGE_SIZE)
}

/// Bytes of a device's own area in the segment.
fn own_len(spec: &Spec) -> usize {
    spec.shared_len().next_multiple_of(crate::PAGE_SIZE)
}

fn device_err(spec: &Spec, source: SetupError) -> DomainError {
    DomainError::Device { device: spec.to_string(), source }
}
