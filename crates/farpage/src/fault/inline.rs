//! Inline: the thread that faults resolves the fault itself, in a SIGBUS handler.
//!
//! There are no messages and no thread to switch to, which is what most of a fault's time goes to. In return a system call
//! that meets an absent page fails with EFAULT instead of waiting.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::domain::entry::Entry;
use crate::reclaim::Hands;
use crate::space::Space;
use crate::space::range::flag;

use super::resolve::Outcome;

/// Ranges that are served so: first byte, end, and whose they are. Signals leave no other way to get from an address to
/// its space than by state of the whole process. Whoever holds the lock touches none of these ranges.
static SERVED: RwLock<BTreeMap<usize, (usize, Arc<Space>)>> = RwLock::new(BTreeMap::new());

thread_local! {
    static HANDS: RefCell<Option<Hands>> = const { RefCell::new(None) };
}

/// Faults in `[start, end)` are resolved by the threads that make them, until [`unserve`].
///
/// # Errors
/// The SIGBUS handler cannot be installed.
pub(crate) fn serve(start: usize, end: usize, space: &Arc<Space>) -> rustix::io::Result<()> {
    crate::sys::on_sigbus(resolve)?;
    SERVED.write().unwrap_or_else(PoisonError::into_inner).insert(start, (end, space.clone()));
    Ok(())
}

/// The range that begins at `start` is served no longer.
pub(crate) fn unserve(start: usize) {
    SERVED.write().unwrap_or_else(PoisonError::into_inner).remove(&start);
}

fn resolve(addr: usize) -> bool {
    let space = {
        let served = SERVED.read().unwrap_or_else(PoisonError::into_inner);
        let Some((_, (end, space))) = served.range(..=addr).next_back() else { return false };
        if addr >= *end || !space.is_mine() {
            return false;
        }
        space.clone()
    };
    let addr = addr / crate::PAGE_SIZE * crate::PAGE_SIZE;
    let borrowed = HANDS.try_with(|hands| {
        let mut hands = hands.try_borrow_mut().ok()?;
        Some(space.fault_here(addr, hands.get_or_insert_default()))
    });
    match borrowed {
        Ok(Some(resolved)) => resolved,
        // The thread is ending, and its buffers have gone already.
        _ => space.fault_here(addr, &mut Hands::new()),
    }
}

impl Space {
    /// Resolves a fault of the calling thread, or says that there is none (any more). False: the page is lost, or not ours.
    pub(crate) fn fault_here(&self, addr: usize, hands: &mut Hands) -> bool {
        loop {
            {
                let world = self.world.read();
                let Some(found) = world.ranges.granule(addr) else { return false };
                if found.granule.has(flag::ENTRIES) && self.entries.get(addr) == Entry::Lost {
                    return false;
                }
                if self.resolve(&world, addr, hands) == Outcome::Wake {
                    return true;
                }
            }
            crate::sys::yield_now();
        }
    }
}
