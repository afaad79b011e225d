//! The few calls for processes and signals that neither the standard library nor rustix has.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal};

/// Signals that mean a bug in this process, and those that cannot be blocked: they are not taken over.
const NOT_TAKEN: &[i32] = &[
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGSYS,
    libc::SIGKILL,
    libc::SIGSTOP,
];

/// A signal as it was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// The kernel sent it (the terminal: Ctrl-C, Ctrl-Z, hang-up), so the whole foreground group got it.
    pub from_kernel: bool,
    /// Who sent it otherwise.
    pub sender: i32,
}

/// All signals of this process, to be read instead of being delivered.
#[derive(Debug)]
pub struct Signals {
    fd: File,
    old_mask: libc::sigset_t,
}

impl Signals {
    /// Blocks the signals of this thread (and those it starts) and opens a descriptor to read them from.
    pub fn take() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        let mut old = MaybeUninit::uninit();
        // SAFETY: the sets are initialised by `sigfillset` and `pthread_sigmask` before they are read.
        unsafe {
            libc::sigfillset(set.as_mut_ptr());
            for &signal in NOT_TAKEN {
                libc::sigdelset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), old.as_mut_ptr());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { fd: File::from(OwnedFd::from_raw_fd(fd)), old_mask: old.assume_init() })
        }
    }

    /// The next signal, or `None` if none is pending.
    pub fn next(&self) -> Option<Received> {
        let mut bytes = [0u8; size_of::<libc::signalfd_siginfo>()];
        (&self.fd).read_exact(&mut bytes).ok()?;
        // SAFETY: the kernel filled the whole structure, which is plain integers.
        let info: libc::signalfd_siginfo = unsafe { std::mem::transmute(bytes) };
        Some(Received {
            signal: info.ssi_signo as i32,
            from_kernel: info.ssi_code > 0,
            sender: info.ssi_pid as i32,
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Page faults of this thread so far.
pub fn faults() -> u64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure lives across the call; zeros are a valid one.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_minflt as u64 + usage.ru_majflt as u64
}

/// Whether this process was given rights by the file it was started from.
pub fn privileged_by_file() -> bool {
    // SAFETY: `getauxval` only reads what the kernel gave at the start.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Whether this process leads its session. (rustix panics if the leader lies outside of the process namespace.)
pub fn leads_session() -> bool {
    // SAFETY: these calls touch no memory.
    unsafe { libc::getsid(0) == libc::getpid() }
}

/// Forks. The child gets `Ok(None)`, the parent the child.
///
/// Must be called while the process has one thread; an error is returned otherwise, for a second thread's locks
/// would stay locked in the child.
pub fn fork() -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("fork with more than one thread"));
    }
    // SAFETY: there is no other thread, so the child finds every lock free and may do whatever it likes.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Runs `work` in a child; its result is an errno, 0 for success. `work` must be async-signal-safe.
pub fn in_child(work: impl FnOnce() -> i32) -> io::Result<()> {
    // SAFETY: the child does only what `work` does, and leaves without running destructors.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: always safe; ends the child.
        0 => unsafe { libc::_exit(work().clamp(0, 255)) },
        pid => Pid::from_raw(pid),
    };
    match rustix::io::retry_on_intr(|| rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()))?
    {
        Some((_, status)) => match status.exit_status() {
            Some(0) => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(io::Error::other("the child was killed")),
        },
        None => Err(io::Error::other("the child was not waited for")),
    }
}

/// Starts the program with the signal mask that this process was started with, to be killed when this thread
/// ends; also if it ended before the program could ask for that. `last` runs in the new process just before the program
/// does; it must be async-signal-safe.
pub fn spawn_bound(
    command: &mut Command,
    signals: &Signals,
    last: impl Fn() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let mask = signals.old_mask;
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // SAFETY: an initialised set; the call is async-signal-safe.
        match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) } {
            0 => last(),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    };
    // SAFETY: `prepare` (and `last`, by contract) makes async-signal-safe system calls only and allocates nothing.
    unsafe { command.pre_exec(prepare) }.spawn()
}

/// Sends a signal by number (also real-time ones). That the receiver is gone is no error.
pub fn send(pid: Pid, signal: i32) -> bool {
    // SAFETY: `kill` touches no memory.
    unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) == 0 }
}

/// Ends this process as if by `signal`, without a core dump.
pub fn die_of(signal: i32) -> ! {
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    // SAFETY: setting the default action and unblocking touch no memory but the set, which is initialised.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::kill(libc::getpid(), signal);
    }
    // Not reached for any signal whose default action ends a process.
    std::process::exit(128 + signal)
}
