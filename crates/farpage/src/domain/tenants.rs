//! Who has pages on a device that is to go: the page entries of the domain's processes, read where they lie.

use std::collections::HashMap;

use super::Domain;
use super::entry::Entry;
use crate::frame::ledger::HolderKind;
use crate::frame::{Owner, Pfn};
use crate::pagemap::{Holder, Pagemap, Tenants};

/// The processes of a domain as tenants of its devices.
///
/// A page is moved by the process whose it is: `migrate` is called with the frames that have to be left, and may do it
/// for this process or ask others.
#[doc(hidden)]
pub struct DomainTenants<'a, M> {
    /// The domain.
    pub domain: &'a Domain,
    /// Moves what can be moved out of the frames.
    pub migrate: M,
}

impl<M: FnMut(&Pagemap, &[Pfn])> Tenants for DomainTenants<'_, M> {
    fn migrate(&mut self, map: &Pagemap, pfns: &[Pfn]) {
        (self.migrate)(map, pfns);
    }

    fn holders(&mut self, map: &Pagemap, pfns: &[Pfn]) -> Vec<(Pfn, Holder)> {
        let mut refs: HashMap<(Pfn, Owner, HolderKind), u32> = HashMap::new();
        for (owner, _) in self.domain.slots() {
            // A window that cannot be mapped leaves its references unexplained, which the error says.
            let _walked = self.domain.for_entries(owner, |_, entry| {
                let (kind, frame) = match entry {
                    Entry::Away(dev, pfn) => (HolderKind::Entry, (dev, pfn)),
                    Entry::Copied(dev, pfn) => (HolderKind::CleanCopy, (dev, pfn)),
                    Entry::Kernel | Entry::Same(_) | Entry::Lost => return,
                };
                if frame.0 == map.id && pfns.contains(&frame.1) {
                    *refs.entry((frame.1, owner, kind)).or_default() += 1;
                }
            });
        }
        let mut holders: Vec<(Pfn, Holder)> =
            refs.into_iter().map(|((pfn, owner, kind), refs)| (pfn, Holder { owner, kind, refs })).collect();
        holders.sort_by_key(|(pfn, h)| (*pfn, h.owner, h.kind));
        holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::entry::Entries;
    use crate::domain::{Config, Launcher};
    use std::time::Duration;

    const PAGE: usize = crate::PAGE_SIZE;

    #[test]
    fn a_device_in_use_says_who_uses_it_and_goes_when_they_have_left() {
        let domain = Domain::create(&Config::small(&["ram:1M", "ram:1M"])).unwrap();
        let (me, child) = (domain.take_slot(1).unwrap(), domain.take_slot(2).unwrap());
        let map = domain.pagemap(1);
        let windows = [me, child].map(|owner| domain.map_window(owner).unwrap());
        let [mine, theirs] = [0, 1].map(|i| Entries::new(&windows[i]));
        let (a, b) = (map.try_alloc(me).unwrap(), map.try_alloc(me).unwrap());
        mine.set(PAGE, Entry::Away(1, a));
        map.frames.settle(a);
        mine.set(70_000 * PAGE, Entry::Copied(1, b));
        map.frames.settle(b);
        map.get_in_transit(a, child).unwrap();
        theirs.set(9 * PAGE, Entry::Away(1, a));
        map.frames.settle(a);
        // The same frame number of another device is somebody else's.
        theirs.set(10 * PAGE, Entry::Away(0, a));

        let stay = |_: &Pagemap, _: &[Pfn]| {};
        let mut tenants = DomainTenants { domain: &domain, migrate: stay };
        let error = map.unregister(&mut tenants, me, Duration::from_millis(30)).unwrap_err().to_string();
        assert_eq!(
            error,
            "2 frames of ram:1M are still held: frame 0 (2 references: 1 page entry of process slot 1, \
             1 page entry of process slot 2); frame 1 (1 reference: 1 clean copy of process slot 1)"
        );

        // They are moved away, as a space would do it.
        let migrate = |map: &Pagemap, pfns: &[Pfn]| {
            for (owner, entries) in [(me, mine), (child, theirs)] {
                let mut found = Vec::new();
                let note = |addr, e: Entry| {
                    if let Some((1, pfn)) = e.frame() {
                        found.push((addr, pfn));
                    }
                };
                domain.for_entries(owner, note).unwrap();
                for (addr, pfn) in found.into_iter().filter(|(_, pfn)| pfns.contains(pfn)) {
                    map.frames.begin_put(pfn, owner);
                    entries.set(addr, Entry::Kernel);
                    map.put_in_transit(&[pfn], owner);
                }
            }
        };
        let mut tenants = DomainTenants { domain: &domain, migrate };
        map.unregister(&mut tenants, me, Duration::from_secs(20)).unwrap();
        assert_eq!((map.frames.used(), map.try_alloc(me).is_err()), (0, true));
        assert!(domain.pagemap(0).try_alloc(me).is_ok(), "the other device goes on");
        assert_eq!(domain.lookup(1, a, me).err(), Some(crate::pagemap::NotLive::Unregistered.into()));
        assert_eq!(domain.lookup(0, a, me).unwrap().id, 0);
    }

    #[test]
    fn a_launcher_gives_back_what_the_dead_held() {
        let launcher = Launcher::create(&Config::small(&["ram:1M"])).unwrap();
        let domain = Domain::attach(&launcher.env_value()).unwrap();
        // A process that does not exist.
        let dead = domain.take_slot(u32::MAX >> 1).unwrap();
        let map = domain.pagemap(0);
        std::mem::forget(map.alloc_held(dead, HolderKind::Pin, 100, 1).unwrap());
        std::mem::forget(map.live(dead).unwrap());
        // Killed between taking a frame and recording it.
        map.try_alloc(dead).unwrap();
        assert_eq!(map.frames.used(), 101);
        assert_eq!(launcher.reap(), 1);
        assert_eq!((map.frames.used(), map.ledger.iter().count()), (0, 0));
        map.unregister(&mut (), dead, Duration::ZERO).unwrap();
    }
}
