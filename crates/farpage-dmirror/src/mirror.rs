//! One open `/dev/hmm_dmirrorN`: a device that mirrors the address space of the process that opened it.
//!
//! Its page table says what the device reaches without a fault. It is filled by faults and migrations and loses what is
//! mapped otherwise: the wrappers of the mapping calls tell (Linux: `mmu_notifier`), and what they cannot see, a
//! copy-on-write, a collapse, a call past the C library, is seen by the frame that the page is in.

use std::collections::BTreeMap;

use farpage::PAGE_SIZE;
use farpage::space::Space;
use farpage::space::exclusive::ExclusiveRange;
use rustix::io::Errno;

use crate::pagemap::{self, PageMap};
use crate::pages::{self, HUGE, View, runs};
use crate::uapi::{Command, FLAG_FAIL_ALLOC, Request, is_coherent, prot};
use crate::vma::{self, Vma};
use crate::{own, user};

/// Rounds of faulting that a transfer may need while others change the mapping all the time.
const ROUNDS: u64 = 1000;

/// How the device may use a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    /// To itself, until the CPU takes it back. It is read, not written.
    Exclusive,
}

/// Where the page was when the entry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    /// In this frame of DRAM (as far as the kernel tells).
    System(u64),
    /// On this device.
    Device,
    /// Out of the program for the device's sake.
    Taken,
}

#[derive(Debug, Clone, Copy)]
struct Pte {
    access: Access,
    home: Home,
}

/// What of the kernel's word identifies a page.
const IDENTITY: u64 = pagemap::PRESENT | pagemap::PFN;

/// The device, as one process opened it.
pub struct Mirror {
    space: &'static Space,
    minor: u8,
    table: BTreeMap<usize, Pte>,
    taken: Vec<ExclusiveRange<'static>>,
    /// The next huge allocation fails.
    fail_huge: bool,
}

impl Mirror {
    /// Device `minor`, of this process.
    pub fn new(space: &'static Space, minor: u8) -> Self {
        Self { space, minor, table: BTreeMap::new(), taken: Vec::new(), fail_huge: false }
    }

    /// Its number.
    pub fn minor(&self) -> u8 {
        self.minor
    }

    /// Does what is asked; the numbers that it fills in are meant only where it succeeds.
    pub fn command(&mut self, request: Request, c: &mut Command) -> Result<(), Errno> {
        let (start, end) = c.range()?;
        (c.cpages, c.faults) = (0, 0);
        if let Request::Flags = request {
            self.fail_huge = c.npages & FLAG_FAIL_ALLOC != 0;
            return Ok(());
        }
        match request {
            Request::Read => self.read(start, end, c),
            Request::Write => self.write(start, end, c),
            Request::MigrateToDevice => self.migrate_to_device(start, end, c),
            Request::MigrateToSystem => self.migrate_to_system(start, end, c),
            Request::Snapshot => self.snapshot(start, end, c),
            Request::Exclusive => self.exclusive(start, end, c),
            Request::CheckExclusive => self.check_exclusive(start, end),
            Request::Release => self.release(),
            Request::Flags => Ok(()),
        }
    }

    /// The table loses `[start, end)`.
    pub fn invalidate(&mut self, start: usize, end: usize) {
        let gone: Vec<usize> =
            self.table.range(start / PAGE_SIZE * PAGE_SIZE..end).map(|(&at, _)| at).collect();
        for at in gone {
            self.table.remove(&at);
        }
    }

    /// A fork makes private pages of parent and child shared ones. Those that the CPU reaches on the device come back first.
    pub fn before_fork(&mut self) {
        self.bring_back(0, usize::MAX);
        self.table.clear();
        self.taken.clear();
    }

    /// Pages of `[start, end)` that the CPU reaches on this device come back.
    pub fn bring_back(&mut self, start: usize, end: usize) {
        if is_coherent(self.minor)
            && let Err(e) = pages::to_system(self.space, self.minor, start, end, &mut true)
        {
            farpage::sys::say(&format!("pages of hmm_dmirror{} could not come back: {e}", self.minor));
        }
    }

    /// The last descriptor is closed: everything comes back.
    pub fn close(&mut self) {
        if let Err(e) = self.release() {
            farpage::sys::say(&format!("pages of hmm_dmirror{} could not come back: {e}", self.minor));
        }
        self.taken.clear();
        own::reap(self.space);
    }

    fn valid(&self, view: &View, at: usize, write: bool) -> Option<Home> {
        let pte = self.table.get(&at)?;
        if write && pte.access != Access::Write {
            return None;
        }
        let place = view.place(at);
        let there = match pte.home {
            // (A page on another coherent device is one that the CPU reaches.)
            Home::System(word) => view.is_present(at) && view.word(at) & IDENTITY == word,
            Home::Device => place.is_some_and(|p| p.device == self.minor),
            Home::Taken => self.taken_by(at).is_some(),
        };
        there.then_some(pte.home)
    }

    fn taken_by(&self, at: usize) -> Option<&ExclusiveRange<'static>> {
        self.taken.iter().rev().find(|t| t.is_still_exclusive(at))
    }

    /// Calls `go` with each run of pages of `[start, end)` that the device reaches, in order; faults in what it does not reach, if
    /// it `may`. Returns how often it had to.
    fn reach(
        &mut self,
        start: usize,
        end: usize,
        write: bool,
        may: bool,
        mut go: impl FnMut(&Self, usize, usize, Home) -> Result<(), Errno>,
    ) -> Result<u64, Errno> {
        let mut at = start;
        let mut faults = 0;
        loop {
            let view = View::new(self.space, at, end)?;
            while let Some(home) = (at < end).then(|| self.valid(&view, at, write)).flatten() {
                let same = |h: Option<Home>| {
                    h.is_some_and(|h| std::mem::discriminant(&h) == std::mem::discriminant(&home))
                };
                let mut until = at + PAGE_SIZE;
                while until < end && same(self.valid(&view, until, write)) {
                    until += PAGE_SIZE;
                }
                match go(self, at, until, home) {
                    Ok(()) => at = until,
                    // It went while we looked.
                    Err(Errno::FAULT) => {
                        self.invalidate(at, until);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
            if at == end {
                return Ok(faults);
            }
            if !may {
                return Err(Errno::NOENT);
            }
            if faults == ROUNDS {
                return Err(Errno::BUSY);
            }
            self.fault(at, end, write)?;
            faults += 1;
        }
    }

    /// Faults `[start, end)` in as the CPU would, and enters it in the table. What is on this device is reached where it is.
    fn fault(&mut self, start: usize, end: usize, write: bool) -> Result<(), Errno> {
        let mut at = start;
        for v in vma::find(start, end)? {
            if v.start > at || !v.read {
                return Err(Errno::FAULT);
            }
            if write && !v.write {
                return Err(Errno::PERM);
            }
            let view = View::new(self.space, v.start, v.end)?;
            let mine = |at: usize| {
                !is_coherent(self.minor)
                    && view.place(at).is_some_and(|p| p.device == self.minor && (p.own || !write))
            };
            for (s, e) in runs(v.start, v.end, |at| !mine(at)) {
                user::populate(s, e, write)?;
            }
            let after = View::new(self.space, v.start, v.end)?;
            for at in (v.start..v.end).step_by(PAGE_SIZE) {
                let home = match after.place(at) {
                    Some(p) if p.device == self.minor => Home::Device,
                    _ => Home::System(after.word(at) & IDENTITY),
                };
                if home == Home::Device || after.is_present(at) {
                    let writable = write || after.is_writable(at, &v);
                    let access = if writable { Access::Write } else { Access::Read };
                    self.table.insert(at, Pte { access, home });
                }
            }
            at = v.end;
        }
        if at < end { Err(Errno::FAULT) } else { Ok(()) }
    }

    /// The device reads a run of pages.
    fn fetch(&self, start: usize, home: Home, out: &mut [u8]) -> Result<(), Errno> {
        match home {
            Home::Device if !is_coherent(self.minor) => {
                self.space.device_read(start, out).map_err(|_| Errno::FAULT)
            }
            Home::System(_) | Home::Device => user::read(start, out),
            Home::Taken => {
                // A run may lie in several that were taken one after the other.
                for (i, page) in out.chunks_mut(PAGE_SIZE).enumerate() {
                    let at = start + i * PAGE_SIZE;
                    let taken = self.taken_by(at).ok_or(Errno::FAULT)?;
                    taken.read(at, page).map_err(|_| Errno::FAULT)?;
                }
                Ok(())
            }
        }
    }

    /// Reads `[start, end)` by way of the table and gives the bytes to the process.
    fn read_out(&mut self, start: usize, end: usize, may: bool, c: &mut Command) -> Result<(), Errno> {
        let mut bytes = room(end - start)?;
        c.faults = self.reach(start, end, false, may, |mirror, s, e, home| {
            mirror.fetch(s, home, &mut bytes[s - start..e - start])
        })?;
        user::write(c.ptr as usize, &bytes)?;
        c.cpages = c.npages;
        Ok(())
    }

    fn read(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        self.read_out(start, end, true, c)
    }

    fn write(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        let mut bytes = room(end - start)?;
        user::read(c.ptr as usize, &mut bytes)?;
        c.faults = self.reach(start, end, true, true, |mirror, s, e, home| {
            let bytes = &bytes[s - start..e - start];
            match home {
                Home::Device if !is_coherent(mirror.minor) => {
                    mirror.space.device_write(s, bytes).map_err(|_| Errno::FAULT)
                }
                _ => user::write(s, bytes),
            }
        })?;
        c.cpages = c.npages;
        Ok(())
    }

    fn migrate_to_device(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        // All of it is looked at first, so that a range with a mistake in it moves nothing.
        let vmas = vma::readable(start, end, Errno::INVAL)?;
        if vmas.iter().any(Vma::is_special) {
            return Err(Errno::INVAL);
        }
        for v in &vmas {
            let mut huge = !self.fail_huge;
            let moved = pages::to_device(self.space, self.minor, v, &mut huge)?;
            self.fail_huge = !huge;
            let access = if v.write { Access::Write } else { Access::Read };
            for page in moved {
                self.table.insert(page, Pte { access, home: Home::Device });
            }
        }
        self.read_out(start, end, false, c)
    }

    fn migrate_to_system(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        let mut at = start;
        for v in vma::find(start, end)? {
            if v.start > at || !v.read || (v.is_special() && !is_coherent(self.minor)) {
                return Err(Errno::INVAL);
            }
            at = v.end;
        }
        if at < end {
            return Err(Errno::INVAL);
        }
        let mut huge = !self.fail_huge;
        c.cpages = pages::to_system(self.space, self.minor, start, end, &mut huge)? as u64;
        self.fail_huge = !huge;
        let gone = self.table.range(start..end).filter(|(_, p)| p.home == Home::Device);
        for at in gone.map(|(&at, _)| at).collect::<Vec<_>>() {
            self.table.remove(&at);
        }
        Ok(())
    }

    fn snapshot(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact((end - start) / PAGE_SIZE).map_err(|_| Errno::NOMEM)?;
        bytes.resize((end - start) / PAGE_SIZE, prot::ERROR);
        let map = PageMap::open()?;
        for v in vma::find(start, end)?.iter().filter(|v| v.read && !v.name.starts_with("[vvar")) {
            let view = View::new(self.space, v.start, v.end)?;
            let huge: Vec<usize> = self.space.huge_on_devices(v.start, v.end).iter().map(|b| b.0).collect();
            let mut kinds = BTreeMap::new();
            map.kinds(v.start, v.end, |s, e, kind| {
                kinds.insert(s, (e, kind));
            })?;
            for at in (v.start..v.end).step_by(PAGE_SIZE) {
                let kind = kinds.range(..=at).next_back().filter(|(_, k)| k.0 > at).map_or(0, |(_, k)| k.1);
                bytes[(at - start) / PAGE_SIZE] = {
                    let huge = huge.binary_search(&(at / HUGE * HUGE)).is_ok();
                    self.describe(&view, v, at, kind, huge)
                };
            }
        }
        user::write(c.ptr as usize, &bytes)?;
        c.cpages = c.npages;
        Ok(())
    }

    fn describe(&self, view: &View, v: &Vma, at: usize, kind: u64, huge_there: bool) -> u8 {
        let rights = if view.is_writable(at, v) { prot::WRITE } else { prot::READ };
        if let Some(place) = view.place(at) {
            let local = place.device == self.minor;
            let huge = if huge_there { prot::PMD } else { 0 };
            return match (is_coherent(place.device), local) {
                (true, true) => prot::COHERENT_LOCAL | rights,
                (true, false) => prot::COHERENT_REMOTE | rights,
                (false, true) => prot::PRIVATE_LOCAL | rights | huge,
                // It would have to be faulted in first.
                (false, false) => prot::NONE,
            };
        }
        if !view.is_present(at) {
            return prot::NONE;
        }
        let huge = kind & pagemap::IS_HUGE != 0;
        let size = match () {
            () if !huge => 0,
            () if v.page_size() >= 1 << 30 => prot::PUD,
            () => prot::PMD,
        };
        let zero = if kind & pagemap::IS_PFNZERO != 0 && !huge { prot::ZERO } else { 0 };
        rights | size | zero
    }

    fn exclusive(&mut self, start: usize, end: usize, c: &mut Command) -> Result<(), Errno> {
        let mut at = start;
        for v in vma::find(start, end)? {
            if v.start > at || !v.read || !v.write {
                return Err(Errno::FAULT);
            }
            if !v.is_anonymous() {
                return Err(Errno::BUSY);
            }
            // As for a write of the CPU's, and each page of this process's own.
            user::populate(v.start, v.end, true)?;
            pages::manage(self.space, v.start, v.end)?;
            let taken = self.space.exclusive(v.start..v.end).map_err(|_| Errno::INVAL)?;
            for page in (v.start..v.end).step_by(PAGE_SIZE) {
                if !taken.is_still_exclusive(page) {
                    return Err(Errno::BUSY);
                }
                self.table.insert(page, Pte { access: Access::Exclusive, home: Home::Taken });
            }
            self.taken.retain(|t| t.pages() > 0);
            self.taken.push(taken);
            at = v.end;
        }
        if at < end {
            return Err(Errno::FAULT);
        }
        self.read_out(start, end, false, c)
    }

    fn check_exclusive(&mut self, start: usize, end: usize) -> Result<(), Errno> {
        let mut entries = self.table.range(start..end);
        let held = entries.any(|(&at, p)| p.access == Access::Exclusive && self.taken_by(at).is_some());
        if held { Err(Errno::PERM) } else { Ok(()) }
    }

    fn release(&mut self) -> Result<(), Errno> {
        pages::to_system(self.space, self.minor, 0, farpage::domain::ADDRESS_LIMIT, &mut true)?;
        self.table.retain(|_, p| p.home != Home::Device);
        Ok(())
    }
}

/// Zeros.
fn room(len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Errno::NOMEM)?;
    bytes.resize(len, 0);
    Ok(bytes)
}

const _: () = assert!(HUGE.is_multiple_of(PAGE_SIZE));
