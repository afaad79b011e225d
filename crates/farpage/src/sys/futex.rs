//! Futexes on shared words.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::thread::futex::{self, Flags, Timespec};

/// Sleeps while `*word == expected`, at most `timeout`. Returns early on a wake, a signal or a change;
/// the caller looks again. The futex is keyed by the memory, so it works across processes.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
    if super::point::yielded() {
        return; // in a model: a wake that nobody meant
    }
    let ts = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
    // Every outcome (woken, changed, timed out, interrupted) means the same to the caller: look again.
    let _outcome = futex::wait(word, Flags::empty(), expected, ts.as_ref());
}

/// Wakes at most `n` sleepers on `word`.
pub fn futex_wake(word: &AtomicU32, n: i32) {
    // Waking cannot fail on a word that is mapped.
    let _woken = futex::wake(word, Flags::empty(), n as u32);
}

#[repr(C)]
struct Waitv {
    val: u64,
    uaddr: u64,
    flags: u32,
    reserved: u32,
}
/// FUTEX2_SIZE_U32: 32-bit words, shared between processes.
const FUTEX2_SIZE_U32: u32 = 2;
/// The kernel's limit of words for one call.
const FUTEX_WAITV_MAX: usize = 128;

/// Sleeps until one of the words (at most the first 128 are watched) is woken or has changed, at most `timeout`.
pub fn futex_wait_any(words: &[(&AtomicU32, u32)], timeout: Duration) {
    let waits: Vec<Waitv> = words
        .iter()
        .take(FUTEX_WAITV_MAX)
        .map(|(w, val)| Waitv {
            val: u64::from(*val),
            uaddr: std::ptr::from_ref(*w) as u64,
            flags: FUTEX2_SIZE_U32,
            reserved: 0,
        })
        .collect();
    // The call takes a point in time, not a duration.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let nanos = now.tv_nsec + i64::from(timeout.subsec_nanos());
    let until = libc::timespec {
        tv_sec: now.tv_sec + timeout.as_secs() as i64 + nanos / 1_000_000_000,
        tv_nsec: nanos % 1_000_000_000,
    };
    // SAFETY: array, length and timespec live across the call; the words are only read.
    unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            waits.as_ptr(),
            waits.len() as libc::c_uint,
            0 as libc::c_uint,
            &raw const until,
            libc::CLOCK_MONOTONIC,
        );
    }
}
