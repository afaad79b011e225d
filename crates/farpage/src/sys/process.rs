//! Threads, signals, scheduling, and the last words of a manager that cannot go on.

use std::sync::atomic::{AtomicU32, Ordering};

/// The calling thread's number.
pub fn gettid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

/// This process's number in `/proc`: whoever joins a domain has found it there, so this is the number that its launcher knows,
/// also in a namespace of its own.
pub fn number_in_proc() -> u32 {
    let number = rustix::fs::readlink("/proc/self", Vec::new()).ok();
    let number = number.and_then(|n| n.to_str().ok()?.parse().ok());
    number.unwrap_or_else(std::process::id)
}

/// All signals are blocked in this thread while it lives.
pub struct BlockedSignals {
    old: u64,
}

impl BlockedSignals {
    /// Blocks them.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let all = u64::MAX;
        let mut old = 0u64;
        // SAFETY: the kernel's signal set is 8 bytes; both live across the call.
        unsafe {
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut old, 8usize);
        }
        Self { old }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let old = self.old;
        // SAFETY: as in `new`.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const old,
                std::ptr::null_mut::<u64>(),
                8usize,
            );
        }
    }
}

/// One line on stderr, in one write, whatever state the process is in.
pub fn say(message: &str) {
    let line = format!("farpage: {message}\n");
    // SAFETY: the bytes live across the call. A closed stderr leaves nobody to tell.
    let _written = unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

/// The manager cannot go on: going on would turn absent pages into zeros. Says why and aborts the process.
pub fn fatal(message: &str) -> ! {
    say(message);
    std::process::abort()
}

/// The kernel's `struct robust_list_head`.
#[repr(C)]
struct RobustHead {
    next: *mut RobustHead,
    offset: libc::c_long,
    pending: *mut RobustHead,
}

/// The kernel's mark in a robust futex whose owner died (`linux/futex.h`).
pub const FUTEX_OWNER_DIED: u32 = 0x4000_0000;

/// The owner's word of a robust futex that this thread holds.
fn held_by_me() -> u32 {
    const FUTEX_WAITERS: u32 = 0x8000_0000;
    gettid() | FUTEX_WAITERS
}

/// A list of robust futexes with one futex in it.
type RobustList = Box<[RobustHead; 2]>;

/// Tells the kernel that this thread's robust futexes are `life` and no other. It marks the futex when the thread ends, if the
/// word says then that this thread is its owner.
fn register_life(life: &AtomicU32) -> RobustList {
    // One entry, which points back at the head; the futex is `offset` bytes from the entry.
    let mut list = Box::new(
        [const { RobustHead { next: std::ptr::null_mut(), offset: 0, pending: std::ptr::null_mut() } }; 2],
    );
    let base = list.as_mut_ptr();
    // SAFETY: both elements are in the box; the kernel's view of them is `struct robust_list_head` and, for the entry, its
    // first word.
    unsafe {
        let entry = base.add(1);
        (*entry).next = base;
        (*base).next = entry;
        (*base).offset = life.as_ptr() as libc::c_long - entry as libc::c_long;
        libc::syscall(libc::SYS_set_robust_list, base, size_of::<RobustHead>());
    }
    list
}

/// Makes this thread the owner of a robust futex until it ends: the kernel then sets FUTEX_OWNER_DIED in `life` and wakes
/// a waiter. It ends with the address space: by exit, by a signal, or by `exec`.
pub fn hold_for_life(life: &'static AtomicU32) {
    // Leaked: the kernel reads it when the thread ends. Registered first, as the word alone says whose it is: there is no
    // moment at which it has an owner whose end the kernel would not tell.
    std::mem::forget(register_life(life));
    life.store(held_by_me(), Ordering::SeqCst);
}

/// As [`hold_for_life`], where another thread of this process may hold the futex for the time being ([`lend_life`]): at every
/// moment one of the two does. False: the process is about to die, and may have been taken for dead already.
pub fn take_over_life(life: &'static AtomicU32) -> bool {
    // First, as in `hold_for_life`.
    std::mem::forget(register_life(life));
    // Acquire: whoever marks it dead has done so before.
    let now = life.load(Ordering::Acquire);
    // SeqCst, as in `hold_for_life`. Not a store, which could take the mark away.
    now & FUTEX_OWNER_DIED == 0
        && life.compare_exchange(now, held_by_me(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

/// A thread holds a robust futex while this lives; its own robust futexes do not count meanwhile.
pub struct LentLife {
    own: *mut RobustHead,
    _list: RobustList,
}

/// As [`hold_for_life`], until another thread has taken it over ([`take_over_life`]). For a thread that holds no robust
/// mutex, as in a child that was just forked. `None` if the word is none of `from`.
pub fn lend_life(life: &'static AtomicU32, from: &[u32]) -> Option<LentLife> {
    let (mut own, mut len) = (std::ptr::null_mut::<RobustHead>(), 0usize);
    // SAFETY: both live across the call.
    unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut own, &raw mut len) };
    let lent = LentLife { own, _list: register_life(life) };
    // SeqCst: against others' exchanges, after which it is not ours to take. It may change from one of them to the next.
    let mine = held_by_me();
    let take = |&old: &u32| life.compare_exchange(old, mine, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    from.iter().any(take).then_some(lent)
}

impl Drop for LentLife {
    fn drop(&mut self) {
        // SAFETY: the C library's list of this thread, which it keeps for as long as the thread lives.
        unsafe { libc::syscall(libc::SYS_set_robust_list, self.own, size_of::<RobustHead>()) };
    }
}

/// Ends what [`hold_for_life`] has begun, in the same thread: its end is not a death.
pub fn end_life() {
    // SAFETY: no list, no futex for the kernel to mark.
    unsafe {
        libc::syscall(libc::SYS_set_robust_list, std::ptr::null_mut::<RobustHead>(), size_of::<RobustHead>());
    }
}

/// Gives this thread a descriptor table of its own with nothing in it but `fds`: the program may close what it likes.
pub fn keep_only(fds: &[i32]) {
    let mut sorted: Vec<u32> = fds.iter().map(|&f| f as u32).chain([2]).collect();
    sorted.sort_unstable();
    sorted.dedup();
    // SAFETY: unsharing and closing descriptors of this thread's own table touches nobody else's.
    unsafe {
        if libc::unshare(libc::CLONE_FILES) != 0 {
            return; // shared then; the wrappers of close() still protect ours
        }
        let mut next = 0u32;
        for fd in sorted {
            if fd > next {
                libc::syscall(libc::SYS_close_range, next, fd - 1, 0);
            }
            next = fd + 1;
        }
        libc::syscall(libc::SYS_close_range, next, u32::MAX, 0);
    }
}

/// The CPU on which a thread of this process last ran.
pub fn cpu_of(tid: u32) -> Option<u32> {
    let mut buffer = [0; 512];
    let stat = read_of_task(tid, "stat", &mut buffer)?;
    // The 39th field; the second may contain anything, so count from its closing parenthesis.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()
}

/// Nanoseconds that a thread of this process has waited for a CPU.
pub fn run_delay_ns(tid: u32) -> Option<u64> {
    let mut buffer = [0; 128];
    read_of_task(tid, "schedstat", &mut buffer)?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// A small file of a thread of this process, with as few calls as can be: faults wait for it.
fn read_of_task<'a>(tid: u32, name: &str, buffer: &'a mut [u8]) -> Option<&'a str> {
    use rustix::fs::{Mode, OFlags};
    use std::io::Write;
    let mut path = [0u8; 64];
    write!(&mut path[..63], "/proc/self/task/{tid}/{name}").ok()?;
    let path = std::ffi::CStr::from_bytes_until_nul(&path).ok()?;
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let n = rustix::io::read(&file, &mut *buffer).ok()?;
    std::str::from_utf8(&buffer[..n]).ok()
}

/// Binds a thread of this process (0: the caller) to a CPU. If that fails (a cpuset), it stays where it is.
pub fn bind(tid: u32, cpu: u32) {
    let mut set = rustix::thread::CpuSet::new();
    if (cpu as usize) < rustix::thread::CpuSet::MAX_CPU {
        set.set(cpu as usize);
        let _stays = rustix::thread::sched_setaffinity(rustix::thread::Pid::from_raw(tid as i32), &set);
    }
}

/// How many CPUs this process may use.
pub fn cpus_allowed() -> u32 {
    // The first thread's are the program's own wish.
    rustix::thread::sched_getaffinity(Some(rustix::process::getpid())).map_or(1, |set| set.count())
}

/// Keeps a thread of this process off these CPUs; if no other is left of those that the process may use, it may use all.
pub fn keep_off(tid: u32, cpus: &[u32]) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    // The first thread's are the program's own wish.
    let Ok(all) = sched_getaffinity(Some(rustix::process::getpid())) else { return };
    let mut set = all;
    cpus.iter().map(|&c| c as usize).filter(|&c| c < CpuSet::MAX_CPU).for_each(|c| set.unset(c));
    let set = if set.count() == 0 { all } else { set };
    let _stays = sched_setaffinity(rustix::thread::Pid::from_raw(tid as i32), &set);
}

/// Gives a thread of this process the policy SCHED_IDLE, or SCHED_OTHER. If that fails it stays as it was.
pub fn set_idle_policy(tid: u32, idle: bool) {
    let param = libc::sched_param { sched_priority: 0 };
    let policy = if idle { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    // SAFETY: the parameter lives across the call.
    unsafe {
        libc::sched_setscheduler(tid as i32, policy, &raw const param);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(life: &AtomicU32) -> bool {
        life.load(Ordering::SeqCst) & FUTEX_OWNER_DIED != 0
    }

    /// Until the kernel has seen to the end of a thread that was joined: it may be a moment behind.
    fn dies(life: &'static AtomicU32) -> bool {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !dead(life) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        dead(life)
    }

    #[test]
    fn a_lent_life_ends_with_its_thread() {
        let life: &'static AtomicU32 = Box::leak(Box::default());
        std::thread::spawn(move || std::mem::forget(lend_life(life, &[0]).unwrap())).join().unwrap();
        assert!(dies(life));
        assert!(!std::thread::spawn(move || take_over_life(life)).join().unwrap(), "too late");
        assert!(dead(life));
    }

    #[test]
    fn a_life_that_was_taken_over_is_the_other_threads() {
        let life: &'static AtomicU32 = Box::leak(Box::default());
        let (taken, is_taken) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let lender = std::thread::spawn(move || {
            assert!(lend_life(life, &[1, 2]).is_none());
            let lent = lend_life(life, &[1, 0]).unwrap();
            let worker = std::thread::spawn(move || {
                taken.send(take_over_life(life)).unwrap();
                let _until_dropped = stopped.recv();
            });
            assert!(is_taken.recv().unwrap());
            drop(lent);
            worker
        });
        let worker = lender.join().unwrap();
        assert!(!dead(life), "the lender's end is none");
        drop(stop);
        worker.join().unwrap();
        assert!(dies(life));
    }
}
