//! Children that never come, and one that comes late.

mod managed;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage::PAGE_SIZE;
use farpage::domain::state;
use managed::{Managed, ended_well};

/// Slots that were prepared and whose children have not come.
fn waiting(managed: &Managed) -> usize {
    let waits = |s: &farpage::domain::Slot| {
        s.state.load(Ordering::SeqCst) == state::FORMING && s.pid.load(Ordering::SeqCst) == 0
    };
    managed.space.domain.slots().filter(|(_, s)| waits(s)).count()
}

fn wait_until_none_waits(managed: &Managed) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while waiting(managed) > 0 {
        assert!(Instant::now() < deadline, "still prepared for a child that does not come");
        managed.reap();
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_child_that_never_comes_leaves_nothing() {
    if !managed::alone("a_child_that_never_comes_leaves_nothing") {
        return;
    }
    let managed = Managed::new(8 << 20, &["mem:16M"]);
    let memory = managed.map(4 << 20);
    managed.space.page_out(memory.addr, memory.addr + (4 << 20), true);
    let charged = managed.space.domain.charged();
    // Its parent is killed before it forks.
    let parent = managed.fork(|| {
        std::mem::forget(managed.space.before_fork().unwrap());
        // SAFETY: ends this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    });
    assert!(!ended_well(parent));
    wait_until_none_waits(&managed);
    // It is killed before its first step.
    let forking = managed.space.before_fork().unwrap();
    // SAFETY: the child does nothing.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe { libc::_exit(7) };
    }
    managed.space.after_fork_in_parent(forking);
    assert!(!ended_well(child));
    wait_until_none_waits(&managed);
    // The fork fails.
    let forking = managed.space.before_fork().unwrap();
    let child = managed.space.after_fork_in_parent(forking);
    managed.space.fork_failed(child);
    managed.reap();
    assert_eq!(waiting(&managed), 0);
    assert!(managed.space.domain.charged() <= charged + 64, "charged: {}", managed.space.domain.charged());
    drop(memory);
    managed.assert_all_free();
}

#[test]
fn a_child_that_comes_late_has_everything() {
    if !managed::alone("a_child_that_comes_late_has_everything") {
        return;
    }
    let managed = Managed::new(8 << 20, &["mem:16M"]);
    let memory = managed.map(1 << 20);
    // SAFETY: our own memory.
    unsafe { std::ptr::write_bytes(memory.addr as *mut u8, 7, 1 << 20) };
    managed.space.page_out(memory.addr, memory.addr + (1 << 20), true);
    let child = managed.fork_and(
        // As a debugger does.
        // SAFETY: stops this process.
        || unsafe { assert_eq!(libc::kill(libc::getpid(), libc::SIGSTOP), 0) },
        || assert_eq!(memory.bytes(5), [7; PAGE_SIZE]),
    );
    // It is looked for again and again, and there.
    let until = Instant::now() + Duration::from_millis(3500);
    while Instant::now() < until {
        managed.reap();
        assert_eq!(waiting(&managed), 1);
        std::thread::sleep(Duration::from_millis(50));
    }
    // SAFETY: our child.
    unsafe { libc::kill(child, libc::SIGCONT) };
    assert!(ended_well(child));
    drop(memory);
    managed.assert_all_free();
}
