//! The table of a DAX file: the counts of its pages and who uses it, shared by all processes that have it open.
//!
//! It lies in a file of its own (0600) whose name is that of the DAX file to the kernel: device, inode, generation.
//! Each process has a [slot](super::slots). When none of a killed one's threads can run any more, whoever waits for
//! something that it held cleans up after it ([`Table::reap`]); he can be killed himself at that.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::counts::{Counts, no_memory};
use super::error::TableError;
use super::heads::{HEAD, Head, MAGIC, OwnHead, word};
use super::inner::Inner;
use super::mapping::Mapped;
use super::refs::frames_of;
use super::slots::{SLOTS, Slots, slot};
use crate::device::memory::DeviceMemory;
use crate::frame::cuts::Cuts;
use crate::frame::ledger::HolderKind;
use crate::frame::{Owner, Pfn};
use crate::pagemap::{DriverId, HoldError, MemoryType, Pagemap, PagemapOps, Registration, Run};
use crate::sys::{
    ForkMutex, LifeLock, Locked, Mutex, Peers, RobustLock, SharedMap, futex_wait, futex_wake, identity,
    is_locked, lock_first_byte, unlock_first_byte,
};

/// Where tables are.
pub const DIR: &str = "/dev/shm";
/// What their names begin with.
pub const PREFIX: &str = "farpage-dax-";

/// Looks at least so often for the dead, who wake nobody.
pub(super) const ROUND: Duration = Duration::from_millis(20);

/// See the module's description. One a file and process.
pub struct Table {
    path: PathBuf,
    /// Closed under [`FILES`].
    file: Option<OwnedFd>,
    /// Which file it is: what tells it from another one.
    identity: (u64, u64),
    life: OnceLock<LifeLock>,
    head: OwnHead,
    lock: RobustLock,
    size_lock: RobustLock,
    slots: Slots,
    body: SharedMap,
    counts: Arc<Counts>,
    pagemap: Pagemap,
    pages: u32,
    owner: Owner,
    pid: u32,
    /// Mappings of this process.
    pub(super) mappings: Mutex<Vec<Arc<Mutex<Mapped>>>>,
    /// Handles of this process.
    pub(super) files: Mutex<Vec<Weak<Inner>>>,
    /// Threads of this process that are opening the file.
    pub(super) opening: AtomicU32,
    agent: OnceLock<std::thread::JoinHandle<()>>,
}

impl Peers for Table {
    fn is_alive(&self, owner: u16) -> bool {
        self.slots.is_alive(owner, |byte| self.is_locked(byte))
    }
}

/// Of whom nobody takes anything.
struct Immortal;

impl Peers for Immortal {
    fn is_alive(&self, _owner: u16) -> bool {
        true
    }
}

/// A table that is to be made if there is none.
struct Make<'a> {
    /// The file's name.
    name: &'a Path,
    /// Whose it is.
    owner: u32,
    pages: u32,
    memory: Option<DeviceMemory>,
}

impl Make<'_> {
    /// For who joins only.
    fn nothing() -> Self {
        Make { name: Path::new("?"), owner: 0, pages: 0, memory: None }
    }
}

/// A table that was joined, and whether its agent runs.
type Joined = (Arc<Table>, Result<(), Errno>);

/// What the pages of a table need of their pagemap: somebody to clean up after the dead. A file's need nothing when they
/// become idle: the block stays the file's until that is changed, which waits for just this. A device's have its memory.
struct TableOps {
    name: String,
    frames: u32,
    memory: Option<DeviceMemory>,
    table: Arc<OnceLock<Weak<Table>>>,
}

impl PagemapOps for TableOps {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn page_free(&self, pfns: &[Pfn], owner: Owner) {
        if let Some(memory) = &self.memory {
            PagemapOps::page_free(memory, pfns, owner);
        }
    }

    fn memory(&self) -> Option<&DeviceMemory> {
        self.memory.as_ref()
    }

    fn stuck(&self, _owner: Owner) {
        if let Some(table) = self.table.get().and_then(Weak::upgrade) {
            table.reap();
        }
    }

    fn remove(&self, _owner: Owner) -> Result<(), Errno> {
        Ok(())
    }
}

/// The tables of this process; a forked child has none.
static TABLES: ForkMutex<Vec<(PathBuf, Weak<Table>)>> = ForkMutex::new(Vec::new(), Vec::new);

/// Held while this process opens, locks or closes a table's file. Such a file is locked by [`lock_first_byte`], whose locks
/// are the process's: a forked child does not keep them, and they end with the process, but also when it closes any
/// descriptor of the file.
pub(super) static FILES: ForkMutex<()> = ForkMutex::new((), || ());

impl Table {
    /// The name of the table of the file with this identity ([`crate::sys::dax::file_identity`]).
    pub(super) fn path_of(dir: &Path, identity: &[u8]) -> PathBuf {
        dir.join(format!("{PREFIX}{:032x}", twox_hash::XxHash3_128::oneshot(identity)))
    }

    /// This process's table of that name: the one it has, or one that it joins or makes, with counts for at least
    /// `pages` pages (of a file: a multiple of [`TABLE_ALIGN`](super::refs::TABLE_ALIGN)) if nobody else uses it yet.
    /// `file` is its name, for people, and `owner` whose it is; `memory`: it is a device.
    pub(super) fn attach(
        path: &Path,
        file: &Path,
        owner: u32,
        pages: u32,
        memory: Option<DeviceMemory>,
    ) -> Result<Arc<Self>, TableError> {
        let make = Make { name: file, owner, pages, memory };
        // Whoever makes one if there is none has one.
        let table = Self::find_or_join(path, Some(make))?.ok_or(TableError::Version)?;
        Ok(table)
    }

    /// A table, only to see who uses it, which makes nobody a user. `None`: nobody does, or there is none.
    pub(super) fn look_at(path: &Path) -> Result<Option<Arc<Self>>, TableError> {
        Self::find_or_join(path, None)
    }

    fn find_or_join(path: &Path, make: Option<Make<'_>>) -> Result<Option<Arc<Self>>, TableError> {
        let uses = make.is_some();
        let mut tables = TABLES.lock();
        tables.retain(|(_, table)| table.strong_count() > 0);
        let ours = tables.iter().find(|(p, _)| p == path).and_then(|(_, table)| table.upgrade());
        let table = match ours {
            Some(table) => table,
            None => {
                let joining = {
                    let _files = FILES.lock();
                    Self::join(path, make)
                };
                let Some((table, started)) = joining? else { return Ok(None) };
                started?;
                table.reap();
                tables.push((path.to_owned(), Arc::downgrade(&table)));
                table
            }
        };
        if uses {
            table.become_user();
        }
        Ok(Some(table))
    }

    fn join(path: &Path, make: Option<Make<'_>>) -> Result<Option<Joined>, TableError> {
        let Some(file) = open_locked(path, make.as_ref().map(|make| make.owner))? else { return Ok(None) };
        let mut size = rustix::fs::fstat(&file)?.st_size as usize;
        let identity = identity(file.as_fd())?;
        let head = OwnHead::map(file.as_fd())?;
        if size >= HEAD {
            head.area().populate(0, HEAD).map_err(no_memory)?;
        }
        let fresh = size < HEAD + SLOTS || head.word(word::MAGIC) == 0 || !any_alive(&file, &head)?;
        let Some(Make { name, pages, memory, .. }) = make.or_else(|| (!fresh).then(Make::nothing)) else {
            // Left by the dead. We have the lock: nobody can be about to use it.
            let _gone = rustix::fs::unlink(path);
            return Ok(None);
        };
        // What we have made, and nobody can use, does not stay.
        let failed = |why: TableError| {
            fresh.then(|| rustix::fs::unlink(path));
            why
        };
        let failed_for = |e: Errno| failed(no_memory(e).into());
        if fresh {
            // Nobody's: whatever is in it was left by the dead.
            rustix::fs::ftruncate(&file, 0)?;
            size = HEAD + SLOTS + Pagemap::shared_len(frames_of(pages));
            rustix::fs::ftruncate(&file, size as u64).map_err(failed_for)?;
            head.area().populate(0, HEAD).map_err(failed_for)?;
            // A device's memory is handed out by the page.
            head.begin(name, pages, if memory.is_some() { pages } else { frames_of(pages) });
        } else if head.word(word::MAGIC) != MAGIC {
            return Err(TableError::Version);
        }
        let (pages, frames) = (head.word(word::PAGES), head.word(word::FRAMES));
        if size != HEAD + SLOTS + Pagemap::shared_len(frames_of(pages)) {
            return Err(TableError::Version);
        }
        let create = head.word(word::MAGIC) == 0;
        let body = SharedMap::new(&file, HEAD as u64, size - HEAD).map_err(failed_for)?;
        let table = Arc::new(OnceLock::new());
        let what = Registration {
            id: 0,
            memory_type: if memory.is_some() { MemoryType::Generic } else { MemoryType::FsDax },
            driver: DriverId::default(),
            ranges: vec![0..frames; 1],
            ops: Box::new(TableOps {
                name: name.display().to_string(),
                frames,
                memory,
                table: table.clone(),
            }),
        };
        let area = body.area(SLOTS, size - HEAD - SLOTS);
        let slots = Slots::new(body.area(0, SLOTS), &head.words()[word::SLOTS_USED]);
        let ready = slots.claim().and_then(|owner| {
            let counts = Counts::new(area, file.as_fd(), identity, (HEAD + SLOTS) as u64, frames);
            Pagemap::shared_parts(owner).iter().try_for_each(|part| counts.provide_bytes(part))?;
            let pagemap = Pagemap::register(what, area, create).map_err(|_| TableError::Version)?;
            Ok((owner, counts, pagemap))
        });
        let (owner, counts, mut pagemap) = ready.map_err(|e| {
            body.unmap();
            failed(e)
        })?;
        let counts = Arc::new(counts);
        let there = counts.clone();
        pagemap.frames.look_only_at(move |frames| there.next(frames));
        head.publish();
        let joined = Arc::new(Self {
            path: path.to_owned(),
            file: Some(file),
            identity,
            life: OnceLock::new(),
            lock: RobustLock::new(&head.words()[word::LOCK]),
            size_lock: RobustLock::new(&head.words()[word::SIZE_LOCK]),
            head,
            slots,
            body,
            counts,
            pagemap,
            pages,
            owner,
            pid: std::process::id(),
            mappings: Mutex::new(Vec::new()),
            files: Mutex::new(Vec::new()),
            opening: AtomicU32::new(0),
            agent: OnceLock::new(),
        });
        let _first = table.set(Arc::downgrade(&joined));
        // Still under the lock: a slot that forms without it is a dead one's.
        let started = super::agent::start(&joined, &slots.of(owner)[slot::LIFE]).map(|agent| {
            let _first = joined.agent.set(agent);
            // Release: who sees us live sees our life sign.
            slots.of(owner)[slot::STATE].store(slot::LIVE, Ordering::Release);
        });
        joined.file.iter().for_each(|file| unlock_first_byte(file.as_fd()));
        // Only now, because it closes a descriptor. Until it is there our life sign alone says that we live, which is enough
        // for one who has nothing yet.
        let started = started.and_then(|()| joined.hold_life());
        Ok(Some((joined, started)))
    }

    /// The lock that stays until no thread of ours can run. [`FILES`] is held.
    fn hold_life(&self) -> Result<(), Errno> {
        loop {
            // A forked child may still have an earlier one.
            match LifeLock::hold(self.open_again()?, self.slots.next_life_lock(self.owner)) {
                Err(Errno::AGAIN) => {}
                Err(e) => return Err(e),
                Ok(life) => {
                    let _first = self.life.set(life);
                    return Ok(());
                }
            }
        }
    }

    /// The table's file. [`FILES`] is held, until it is closed.
    fn open_again(&self) -> Result<OwnedFd, Errno> {
        let file = rustix::fs::open(&self.path, OPEN, Mode::empty())?;
        if identity(file.as_fd())? == self.identity { Ok(file) } else { Err(Errno::STALE) }
    }

    /// Whether some process has locked this byte of the table's file. If that cannot be found out, it may be.
    fn is_locked(&self, byte: i64) -> bool {
        let ours = self.file.as_ref().filter(|file| identity(file.as_fd()) == Ok(self.identity));
        let locked = match ours {
            Some(file) => is_locked(file.as_fd(), byte),
            // The program has closed the descriptor.
            None => {
                let _files = FILES.lock();
                self.open_again().and_then(|file| is_locked(file.as_fd(), byte))
            }
        };
        locked.unwrap_or(true)
    }

    /// From now on this process is a user of the file. If somebody has a lease, that is in its way.
    fn become_user(&self) {
        // SeqCst, with `is_shared`: whoever takes a lease after this sees it, and whoever has one is told.
        if self.slots.of(self.owner)[slot::USER].swap(1, Ordering::SeqCst) == 0 {
            self.announce();
        }
    }

    /// Sees to it that the counts of these frames have memory, before they are used.
    ///
    /// # Errors
    /// [`HoldError::Memory`].
    pub(super) fn provide(&self, frames: &Range<Pfn>) -> Result<(), HoldError> {
        self.counts.provide(frames).map_err(HoldError::Memory)
    }

    /// Takes a reference to each of these frames, for this process; `create`: the first one of a frame allocates it.
    ///
    /// # Errors
    /// No memory, no room in the ledger; without `create`, a frame that is nobody's.
    pub(super) fn begin_run(
        &self,
        kind: HolderKind,
        frames: &Range<Pfn>,
        create: bool,
    ) -> Result<Run, HoldError> {
        self.provide(frames)?;
        self.pagemap.begin_run(self.owner, kind, frames.start, frames.len() as u32, create)
    }

    /// The counts.
    pub(super) fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// This process's slot.
    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// Whether this process made it, and is not a forked child.
    pub(super) fn is_ours(&self) -> bool {
        self.pid == crate::sys::pid()
    }

    /// The cuts under way.
    pub(super) fn cuts(&self) -> Cuts {
        self.head.cuts()
    }

    /// The number of its head among those of this process, for the signal handler.
    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    /// Pages that can be counted; the frames of huge pages come behind theirs.
    pub(super) fn frames(&self) -> u32 {
        self.pages
    }

    /// Whether huge pages have frames.
    pub(super) fn has_huge(&self) -> bool {
        self.pagemap.frames.len() > self.pages as usize
    }

    /// One at a time enters cuts, and cleans up. `None`: `give_up` has said so, which is asked every 10 ms.
    pub(super) fn lock(&self, give_up: &mut dyn FnMut() -> bool) -> Option<Locked<'_>> {
        self.lock.lock_unless(self.owner, self, give_up)
    }

    /// One at a time changes where the file ends by what he has read of that. As [`Self::lock`].
    pub(super) fn lock_size(&self, give_up: &mut dyn FnMut() -> bool) -> Option<Locked<'_>> {
        // Only `reap` takes it from the dead: whoever looks by himself may meet the next one in the slot.
        self.size_lock.lock_unless(self.owner, &Immortal, &mut || {
            self.reap();
            give_up()
        })
    }

    /// Who has these two locks.
    pub(super) fn lock_holders(&self) -> [Option<Owner>; 2] {
        [self.lock.holder(), self.size_lock.holder()]
    }

    /// Something has changed for which others may wait.
    pub(super) fn announce(&self) {
        self.head.event().fetch_add(1, Ordering::SeqCst);
        futex_wake(self.head.event(), i32::MAX);
    }

    /// As [`Self::announce`], of something for which only those wait who said so: not the agents.
    pub(super) fn announce_to_waiters(&self) {
        // SeqCst, with `wait`: either he sees what has changed, or we see him.
        fence(Ordering::SeqCst);
        if self.head.words()[word::WAITERS].load(Ordering::Relaxed) != 0 {
            self.announce();
        }
    }

    /// The file has grown: mappings of which a part had been cut off may take it back.
    pub(super) fn announce_growth(&self) {
        if self.head.words()[word::GAPS].load(Ordering::SeqCst) != 0 {
            self.announce();
        }
    }

    /// A mapping has lost a part, or has got it back.
    pub(super) fn count_gaps(&self, more: bool) {
        let gaps = &self.head.words()[word::GAPS];
        if more {
            gaps.fetch_add(1, Ordering::SeqCst);
        } else {
            gaps.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// What has changed so far, for [`Self::wait`].
    pub(super) fn event(&self) -> u32 {
        // SeqCst: what is looked at afterwards is at least as new.
        self.head.event().load(Ordering::SeqCst)
    }

    /// Waits until something has changed since `seen`, at most a [`ROUND`] and until `deadline`; cleans up after the dead
    /// if nothing has. False: it is past the deadline.
    pub(super) fn wait(&self, seen: u32, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        // If we die in here it stays too high, which costs others a system call now and then.
        let waiters = &self.head.words()[word::WAITERS];
        waiters.fetch_add(1, Ordering::SeqCst);
        futex_wait(self.head.event(), seen, Some(left.min(ROUND)));
        waiters.fetch_sub(1, Ordering::SeqCst);
        if self.event() == seen {
            self.reap();
        }
        true
    }

    /// Those who have the file open: slot, process, command.
    pub(super) fn living(&self) -> Vec<(Owner, u32, String)> {
        self.slots.living(|owner| self.is_alive(owner))
    }

    /// Whether another process has the file open.
    pub(super) fn is_shared(&self) -> bool {
        let uses = |owner| self.slots.of(owner)[slot::USER].load(Ordering::SeqCst) != 0;
        self.slots.all().any(|owner| owner != self.owner && self.slots.state(owner) != 0 && uses(owner))
    }

    /// Gives back what the dead held and ends what they were at; true if there were any.
    pub(super) fn reap(&self) -> bool {
        let dead = |owner: &Owner| self.slots.state(*owner) == slot::LIVE && !self.is_alive(*owner);
        if !self.slots.all().any(|owner| dead(&owner)) {
            return false;
        }
        // Somebody else may be at it, or be stopped at it: then another time.
        let began = Instant::now();
        let Some(_locked) = self.lock(&mut || began.elapsed() >= ROUND) else { return false };
        let dead: Vec<Owner> = self.slots.all().filter(dead).collect();
        let (map, frames) = (&self.pagemap, &self.pagemap.frames);
        // All their transfers first: one dead may have been at a frame that another one holds.
        for &owner in &dead {
            self.cuts().forget(owner);
            for pfn in frames.in_transit(owner) {
                if frames.recover(pfn, owner, map.ledger.publishes(owner, pfn)) {
                    map.free(&[pfn], owner);
                }
            }
        }
        for &owner in &dead {
            map.put_holds_of(owner);
            map.repair(owner, self.owner);
            self.size_lock.take_from(owner);
            // Release: who takes the slot next finds nothing of its last owner.
            self.slots.of(owner)[slot::STATE].store(0, Ordering::Release);
        }
        self.announce();
        !dead.is_empty()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let files = FILES.lock();
        let file = self.file.take();
        if !self.is_ours() {
            return; // a forked child: nothing in it is its
        }
        // Only then nobody opens it and finds us, the last, half gone.
        let locked = file.as_ref().filter(|file| lock_first_byte(file.as_fd()).is_ok());
        // While the slot is still ours. Nothing is held or under way any more.
        if let Some(life) = self.life.take() {
            life.end();
        }
        // Release: who takes the slot next finds nothing of ours.
        self.slots.of(self.owner)[slot::STATE].store(0, Ordering::Release);
        let others =
            |file: &OwnedFd| self.slots.any_alive(|byte| is_locked(file.as_fd(), byte).unwrap_or(true));
        if locked.is_some_and(|file| !others(file)) {
            // Whoever opens it now makes a new one. A table that stays is found to be nobody's.
            let _gone = rustix::fs::unlink(&self.path);
        }
        drop(file);
        drop(files);
        self.announce();
        if let Some(agent) = self.agent.take()
            && agent.thread().id() != std::thread::current().id()
        {
            let _ended = agent.join();
        }
        self.body.unmap();
    }
}

const OPEN: OFlags = OFlags::RDWR.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The table's file, with its lock, and still under its name; made if it is not there, for who uses the file of user
/// `file_owner`. `None`: it is not there, for who only looks.
fn open_locked(path: &Path, file_owner: Option<u32>) -> Result<Option<OwnedFd>, TableError> {
    let me = rustix::process::geteuid();
    // Root can open them all, but whoever made one can write into it and cut it off. So it trusts in a table him who can
    // do that to the file itself.
    let trust = |uid: u32| match () {
        () if uid == me.as_raw() || uid == 0 => Ok(()),
        () if !me.is_root() => Err(TableError::Foreign(uid)),
        () if file_owner == Some(uid) => Ok(()),
        () => Err(TableError::Untrusted(uid)),
    };
    loop {
        // With O_CREAT the kernel may refuse another's file in a directory of all (fs.protected_regular), root, too.
        let create = OPEN | OFlags::CREATE | OFlags::EXCL;
        let file = match rustix::fs::open(path, OPEN, Mode::empty()) {
            Err(Errno::NOENT) if file_owner.is_none() => return Ok(None),
            Err(Errno::NOENT) => match rustix::fs::open(path, create, Mode::RUSR | Mode::WUSR) {
                Err(Errno::EXIST) => continue, // another was quicker
                file => file?,
            },
            Err(e @ (Errno::ACCESS | Errno::PERM)) => {
                let owner = rustix::fs::lstat(path).map(|stat| stat.st_uid).ok();
                return Err(owner.filter(|uid| *uid != me.as_raw()).map_or(e.into(), TableError::Foreign));
            }
            file => file?,
        };
        trust(rustix::fs::fstat(&file)?.st_uid)?;
        lock_first_byte(file.as_fd())?;
        // The last user may have removed it while we waited.
        if rustix::fs::fstat(&file)?.st_nlink > 0 {
            return Ok(Some(file));
        }
    }
}

/// Whether some process that has a slot is alive.
fn any_alive(file: &OwnedFd, head: &Head) -> Result<bool, Errno> {
    let map = SharedMap::new(file, HEAD as u64, SLOTS)?;
    let slots = Slots::new(map.area(0, SLOTS), &head.words()[word::SLOTS_USED]);
    let alive = slots.any_alive(|byte| is_locked(file.as_fd(), byte).unwrap_or(true));
    map.unmap();
    Ok(alive)
}
