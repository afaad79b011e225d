//! The agent: one thread for each file that a process has open. It gives up mappings when others cut, takes them back
//! afterwards, and its life is the process's sign of life, at which others look first.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;

use rustix::io::Errno;

use super::table::{ROUND, Table};
use crate::sys::{BlockedSignals, futex_wait, hold_for_life};

/// Starts it; when this returns the life sign is up.
pub fn start(table: &Arc<Table>, life: &'static AtomicU32) -> Result<JoinHandle<()>, Errno> {
    let (up, is_up) = mpsc::channel();
    let event = table.head().event();
    let table = Arc::downgrade(table);
    // The thread inherits the mask: the program's signals are not for it.
    let _blocked = BlockedSignals::new();
    let thread =
        std::thread::Builder::new().name("farpage-dax".into()).stack_size(128 << 10).spawn(move || {
            let _goes_on = OrEnds;
            hold_for_life(life);
            let _who_waits = up.send(());
            run(&table, event);
            crate::sys::end_life();
        });
    let thread = thread.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))?;
    is_up.recv().map_err(|_| Errno::AGAIN)?;
    Ok(thread)
}

/// A panic in the agent (or in a function of the user's that it calls) ends the process: with the life sign gone, others
/// would give back the references of a process that goes on.
struct OrEnds;

impl Drop for OrEnds {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::sys::fatal("the thread that looks after DAX files has panicked");
        }
    }
}

/// Until the table is dropped.
fn run(table: &Weak<Table>, event: &'static AtomicU32) {
    loop {
        // Before it looks: what changes later wakes it.
        let seen = event.load(Ordering::SeqCst);
        let Some(table) = table.upgrade() else { return };
        // Before it serves: a cut that ends then is served once more.
        let cutting = table.cuts().any();
        let leased = table.serve_files();
        table.serve(seen);
        // Whoever cuts may die, which wakes nobody.
        if cutting {
            table.reap();
        }
        let weak = Arc::downgrade(&table);
        drop(table);
        if weak.strong_count() == 0 {
            return; // it was ours to drop, and its words are another's now
        }
        futex_wait(event, seen, (cutting || leased).then_some(ROUND));
    }
}
