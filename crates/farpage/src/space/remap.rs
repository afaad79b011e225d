//! Moving and resizing mappings: `mremap`.

use rustix::io::Errno;

use super::range::{GRANULE, Range, STRETCH, flag};
use super::{Space, World};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;

impl Space {
    /// `mremap`, with the kernel's part in `call` (old address and length, new length, and where to if fixed).
    /// `keep_old`: `MREMAP_DONTUNMAP`.
    #[doc(hidden)]
    pub fn remap(
        &self,
        world: &mut World,
        old: (usize, usize),
        new_len: usize,
        target: Option<usize>,
        keep_old: bool,
        call: impl Fn(usize, usize, usize, Option<usize>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let (from, old_len) = old;
        // One kernel mapping as the program believes it to be one, and nothing staged that knows its old place.
        let founds: Vec<usize> = world.ranges.granules(from, from + old_len).map(|(f, ..)| f.start).collect();
        for &at in &founds {
            if let Some(f) = world.ranges.granule(at) {
                if f.granule.has(flag::GRANTED) {
                    self.revoke(world, &f)?;
                }
                self.unstage(world, &f);
            }
        }
        let kept = old_len.min(new_len);
        let target_charge = target.map_or(0, |t| self.charge_of(world, t, t + new_len));
        let tail_charge = self.charge_of(world, from + kept, from + old_len);
        // What goes away goes without events; the move itself brings one, which is known to be ours.
        self.faults.expect(from, from + old_len);
        if let Some(t) = target {
            self.leave(world, t, t + new_len);
        }
        self.leave(world, from + kept, from + old_len);
        let whole = match call(from, old_len, new_len, target) {
            // We cut the mapping in two by registering part of it, and the kernel could not join them again.
            Err(Errno::FAULT) => self.remap_pieces(world, from, old_len, new_len, target, &call),
            r => r,
        };
        let to = match whole {
            Ok(to) => to,
            Err(e) => {
                if let Some(t) = target {
                    self.come_back(world, t, t + new_len)?;
                }
                self.come_back(world, from + kept, from + old_len)?;
                return Err(e);
            }
        };
        if let Some(t) = target {
            self.forget(world, t, t + new_len);
            self.domain.uncharge(self.me(), target_charge);
        }
        if kept < old_len {
            self.forget(world, from + kept, from + old_len);
            self.domain.uncharge(self.me(), tail_charge);
        }
        if founds.is_empty() {
            return Ok(to); // not ours before, and not afterwards
        }
        // What was said of the mapping is true of what the kernel makes of it.
        let secret = |world: &World, at| world.ranges.find(at).is_some_and(|r| r.not_for_children);
        let (first_secret, last_secret) =
            (secret(world, from), secret(world, from + kept.saturating_sub(PAGE_SIZE)));
        if to != from {
            self.move_entries(world, from, to, kept)?;
            if keep_old {
                let _not_registered = world.uffd.unregister(from, old_len);
                self.add(world, from, from + old_len)?;
                if first_secret {
                    self.set_fork(world, from, from + old_len, true);
                }
            }
        }
        if new_len > old_len {
            // The kernel grew the registered mapping; `add` decides anew, and says so to the kernel.
            let _not_registered = world.uffd.unregister(to + kept, new_len - kept);
            self.add(world, to + kept, to + new_len)?;
            if last_secret {
                self.set_fork(world, to + kept, to + new_len, true);
            }
        }
        Ok(to)
    }

    /// Moves a mapping that the kernel sees as several, piece by piece, into a place reserved for the whole. If a piece
    /// cannot be moved, those before it have been (as in a call of the kernel's on several mappings).
    fn remap_pieces(
        &self,
        world: &mut World,
        from: usize,
        old_len: usize,
        new_len: usize,
        target: Option<usize>,
        call: &impl Fn(usize, usize, usize, Option<usize>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let pieces = crate::sys::mappings_in(from, from + old_len)?;
        if pieces.len() < 2 || pieces.iter().map(|p| p.1 - p.0).sum::<usize>() != old_len {
            return Err(Errno::FAULT);
        }
        let to = crate::sys::reserve(target, new_len)?;
        for (i, &(s, e)) in pieces.iter().enumerate() {
            let grown = if i + 1 == pieces.len() { new_len - (s - from) } else { e - s };
            if let Err(error) = call(s, e - s, grown, Some(to + (s - from))) {
                self.move_entries(world, from, to, s - from)?;
                return Err(error);
            }
        }
        Ok(to)
    }

    /// The pages of `[from, from+len)` are at `to` now: so are their entries.
    pub(super) fn move_entries(
        &self,
        world: &mut World,
        from: usize,
        to: usize,
        len: usize,
    ) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        let had_entries: Vec<(usize, usize)> = world
            .ranges
            .granules(from, from + len)
            .filter(|(f, ..)| f.granule.has(flag::ENTRIES))
            .map(|(_, s, e)| (s, e))
            .collect();
        let moving = world.ranges.granules(from, from + len).filter(|(f, ..)| f.granule.has(flag::HUGE));
        let huge: Vec<usize> = moving.map(|(_, s, _)| s - from + to).collect();
        for &(s, e) in &had_entries {
            for addr in (s..e).step_by(PAGE_SIZE) {
                let entry = self.entries.get(addr);
                if entry == Entry::Kernel {
                    continue;
                }
                // The mark says to a reaper, should we die between the two, that one of them counts.
                let mark = entry.frame().map(|(dev, pfn)| (self.domain.pagemap(dev), pfn));
                if let Some((map, pfn)) = mark {
                    map.frames.begin_put(pfn, self.me());
                }
                self.entries.set(addr, Entry::Kernel);
                self.entries.set(addr - from + to, entry);
                if let Some((map, pfn)) = mark {
                    map.frames.settle(pfn);
                }
            }
        }
        let parts = world.ranges.take(from, from + len);
        let secret: Vec<(usize, usize)> = parts
            .iter()
            .filter(|r| r.not_for_children)
            .map(|r| (r.start - from + to, r.end - from + to))
            .collect();
        let range = Range::new(to, to + len, if had_entries.is_empty() { 0 } else { flag::ENTRIES });
        // A huge page on a device stays one where the place for it is as good.
        for at in huge.into_iter().filter(|at| at.is_multiple_of(STRETCH * GRANULE)) {
            range.granule(at).granule.set(flag::HUGE);
        }
        world.uffd.register(to, len)?;
        for f in range.iter() {
            self.enqueue(&f);
        }
        world.ranges.insert(range);
        for (start, end) in secret {
            world.ranges.cut(start, end).for_each(|r| r.not_for_children = true);
        }
        Ok(())
    }
}
