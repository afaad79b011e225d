//! Taking a device away from a domain while a space has pages on it.

use std::time::Duration;

use super::{Outcome, Target};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::domain::{ADDRESS_LIMIT, DomainTenants};
use crate::pagemap::{NotLive, Pagemap, UnregisterError};
use crate::reclaim::Hands;
use crate::space::ops::window;
use crate::space::puts::Puts;
use crate::space::range::{Found, GRANULE_PAGES};
use crate::space::{Space, World};

/// One pass over all that this process has on a device.
struct Leaving {
    dev: u8,
    at: usize,
    /// Pages that may come to DRAM in this pass.
    room: usize,
}

impl Space {
    /// Takes device `dev` away: it gives no frames from now on, this process's pages on it move to the other devices, in their order,
    /// and what finds no room there to DRAM, as far as the budget goes. When every frame is free its memory goes
    /// back to the system. Pages may be touched, moved and pinned meanwhile; new ones go to the devices that are left.
    ///
    /// What is not this process's to move (other processes' pages, also those that a forked child shares; pins,
    /// mappings) and what cannot move (no room anywhere, a page that the device does not give) is waited for, at most `timeout`
    /// in all. A process that has died must be reaped for its pages to go.
    ///
    /// After an error the device stays without new frames: call again to go on, or [`Space::keep_device`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").device("ram:16M").build()?.start_inline()?;
    /// let v = space.region_from_fn(1 << 20, |i| (i >> 12) as u8)?;
    /// space.migrate(v.pages(..), Target::Device(0))?;
    /// if let Err(why) = space.remove_device(0, Duration::from_secs(10)) {
    ///     println!("{why}"); // who holds which frames
    ///     assert!(space.keep_device(0), "it goes on");
    /// }
    /// assert_eq!(v[255 << 12], 255);
    /// assert_eq!(space.domain.stats().devices[0].frames, 0);
    /// assert!(!space.keep_device(0), "it has gone");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`UnregisterError`]: who holds which frames; or there is no such device (any more). No page is lost by any of them.
    pub fn remove_device(&self, dev: u8, timeout: Duration) -> Result<(), UnregisterError> {
        let map = self.domain.pagemaps.get(usize::from(dev)).ok_or(NotLive::Unregistered)?;
        let migrate = |map: &Pagemap, _: &[_]| {
            // Errors mean that they stay, and are waited for.
            let _stay = self.leave_in_place(0, ADDRESS_LIMIT, |m| m.id == map.id);
            let all = Leaving { dev: map.id, at: 0, room: self.room_now() };
            self.on_worker(all, Space::leave_next);
        };
        map.unregister(&mut DomainTenants { domain: &self.domain, migrate }, self.me(), timeout)
    }

    /// Has a device go on that [`Space::remove_device`] could not take away. False: there is nothing to go on with.
    ///
    /// See the example of [`Space::remove_device`].
    pub fn keep_device(&self, dev: u8) -> bool {
        self.domain.pagemaps.get(usize::from(dev)).is_some_and(|map| map.resume(self.me()))
    }

    /// Pages that can come to DRAM without others having to leave, which may have nowhere to go.
    fn room_now(&self) -> usize {
        let budget = self.domain.budget();
        let free = (budget + self.slots.free_frames()).saturating_sub(self.domain.charged());
        free.saturating_sub(budget / 8) as usize
    }

    /// One granule's part. True: that was the last.
    fn leave_next(&self, world: &World, hands: &mut Hands, p: &mut Leaving) -> bool {
        let Some(found) = world.ranges.with_entries_from(p.at) else { return true };
        p.at = found.end;
        self.drop_copies_on(&found, p.dev);
        let stay = self.granule_in_place(&found);
        let me = self.me();
        // One that is going as well takes nothing.
        let others = self.domain.pagemaps.iter().filter(|map| map.id != p.dev && map.live(me).is_ok());
        for to in others.map(|map| Target::Device(map.id)).chain([Target::System]) {
            let mut at = found.start;
            while at < found.end {
                let run = self.run_on(&found, at, p.dev, stay);
                if run != 0 {
                    let mut pages = [Outcome::There; GRANULE_PAGES];
                    self.migrate_window(world, at, to, &mut p.room, &mut pages[..run], hands);
                }
                at += run.max(1) * PAGE_SIZE;
            }
        }
        // A fault has brought some in meanwhile, and left them behind on the device.
        self.drop_copies_on(&found, p.dev);
        false
    }

    /// How many pages from `at` on are on the device, and are not among those that `stay`. A look: each may change until its granule is locked.
    fn run_on(&self, found: &Found<'_>, at: usize, dev: u8, stay: u64) -> usize {
        let on = |at: &usize| {
            matches!(self.entries.get(*at), Entry::Away(on, _) if on == dev)
                && stay & window(*at, *at + PAGE_SIZE) == 0
        };
        (at..found.end).step_by(PAGE_SIZE).take_while(on).count()
    }

    /// Gives up the copies on the device of pages that are in DRAM.
    fn drop_copies_on(&self, found: &Found<'_>, dev: u8) {
        let mut puts = Puts::new(&self.domain, self.me());
        let _guard = found.granule.lock();
        for at in (found.start..found.end).step_by(PAGE_SIZE) {
            let entry = self.entries.get(at);
            if matches!(entry, Entry::Copied(on, _) if on == dev) {
                puts.begin(entry);
                self.entries.set(at, Entry::Kernel);
            }
        }
    }
}
