//! The handler thread: reads messages, resolves faults, keeps up with events.

use std::time::Duration;

use super::Change;
use super::follow::Idler;
use crate::reclaim::Hands;
use crate::space::{Space, World};
use crate::sys::uffd::{self, MSG_BATCH, Msg};

/// How often what was put aside is looked at again, should nobody ring.
const AGAIN: Duration = Duration::from_millis(1);

/// Reads messages and resolves faults until the space is told to stop ([`Space::stop`]). `index`: which handler this is; 0
/// always listens.
pub fn run(space: &Space, index: usize) {
    // Not by way of the world: its holder may be forking, and wait for us to read the announcement of that.
    let fd = space.descriptors()[0];
    space.faults.add_manager(crate::sys::gettid());
    space.faults.follow.started(index);
    let mut hands = Hands::new();
    let mut messages = [Msg::Unknown(0); MSG_BATCH];
    let mut looked = false;
    let mut idler = Idler::default();
    let (follow, mail) = (&space.faults.follow, &space.faults.mail);
    mail.wake(index);
    while !space.stopping() {
        let alone = follow.is_alone();
        // Where there are several handlers, what another's thread waits for is left to him.
        let batch = if alone { MSG_BATCH } else { 1 };
        // A thread that was woken has run in our place; when we get our turn again, its next fault is there already.
        let n = match space.faults.read(fd, &mut messages[..batch], |m| space.event(m)) {
            Ok(n) => n,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => 0,
            // Absent pages would turn into zeros if we went on.
            Err(e) => crate::sys::fatal(&format!("cannot read page faults: {e}")),
        };
        let mut resolve = |addr, tid| {
            let began = crate::sys::now_ns();
            if let Some(ns) = space.fault(addr, tid, &mut hands) {
                follow.resolved(tid, crate::sys::now_ns().saturating_sub(began + ns));
                follow.woke(index, &mut idler, tid, ns);
            }
        };
        if n == 0
            && let Some((addr, tid)) = mail.mine(index, alone)
        {
            resolve(addr, tid);
            continue;
        }
        if n == 0 && !looked {
            if let Some((addr, tid)) = mail.sleep(index) {
                resolve(addr, tid);
                continue;
            }
            follow.nothing_to_do(space, index, &mut idler);
            let turn = follow.turn(space, index);
            uffd::wait(fd, space.stop_fd(), if space.faults.waits() { Some(AGAIN) } else { turn });
            mail.wake(index);
            // What was put aside is looked at after each wait, whatever ended it.
            looked = true;
            continue;
        }
        looked = false;
        if space.faults.has_changes() {
            space.try_apply_changes();
        }
        for m in &messages[..n] {
            if let Msg::Fault { addr, tid } = *m {
                follow.fault(space, index, tid);
                let sent = !alone && follow.home(index, tid).is_some_and(|home| mail.send(home, addr, tid));
                if !sent {
                    resolve(addr, tid);
                }
            }
        }
        // One round: what has to be put aside again waits for the next message or the bell.
        for _ in 0..64 {
            if space.world.try_read().is_none() {
                break;
            }
            let Some((addr, tid)) = space.faults.next_fault() else { break };
            resolve(addr, tid);
        }
    }
}

impl Space {
    /// A message that is not a fault.
    fn event(&self, m: &Msg) {
        match *m {
            Msg::Fork(child) => self.forked_event(child),
            // The bell: what was put aside is looked at after every batch.
            Msg::Remove { start, .. } if start == self.faults.bell() => {}
            Msg::Remove { start, end } => self.announced(Change::Removed(start, end)),
            Msg::Unmap { start, end } => self.announced(Change::Unmapped(start, end)),
            Msg::Remap { from, to, len } => self.announced(Change::Moved(from, to, len)),
            Msg::Fault { .. } | Msg::Unknown(_) => {}
        }
    }

    /// An announcement is pending, and until it is read no page of the program can be moved: reads it, in whatever thread
    /// this is. Faults that come with it are put aside.
    pub(crate) fn hear(&self, world: &World) {
        let mut messages = [Msg::Unknown(0); MSG_BATCH];
        if let Ok(n) = self.faults.read(world.uffd.raw(), &mut messages, |m| self.event(m)) {
            for m in &messages[..n] {
                if let Msg::Fault { addr, tid } = *m {
                    self.faults.defer(addr, tid);
                }
            }
        }
        // Whose announcement it was has to run before the kernel moves pages again.
        crate::sys::yield_now();
    }

    /// Sees to the changes that went past us, unless somebody changes the world, who may be waiting for us to read another
    /// announcement; or somebody who is in it does not leave, who may be waiting for a page.
    fn try_apply_changes(&self) {
        if let Some(mut world) = self.world.try_write_for(2 * AGAIN) {
            self.apply_changes(&mut world);
        }
    }
}
