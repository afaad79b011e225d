//! Knowing for certain which processes may have left plain references to their pages with the kernel.
//!
//! A page that the kernel holds without a pin can be moved out of a program's memory all the same; if its frame then
//! got another page's bytes, the holder (a pipe, a socket) would see those. So frames are recycled only in processes
//! that never made such a call. To know that also of raw system calls, a seccomp filter stops these rare calls and
//! the keeper marks the process before it lets the call run. All other calls run at full speed.

mod direct;
mod filter;
mod listener;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use farpage::domain::Launcher;
use farpage::sys::Ring;

use crate::say;
pub use direct::inherited_carrier;
use filter::Kind;
pub use listener::Installer;
use listener::{Call, Listener, Receiver};

/// `IORING_SETUP_CQSIZE`.
const CQSIZE: u32 = 1 << 3;

/// Starts the watch; the installer is for the program's process, and is to be dropped after it was started.
pub fn watch(launcher: Arc<Launcher>, verbose: bool) -> io::Result<Installer> {
    let (installer, receiver) = listener::pair()?;
    let watch = Watch { launcher, verbose };
    std::thread::Builder::new().name("farpage-watch".into()).spawn(move || {
        if let Err(e) = watch.run(receiver) {
            // Calls would wait for ever for an answer; the tree ends with this process.
            say(&format!("the watch over the program's system calls failed ({e}): the program is ended"));
            std::process::abort();
        }
    })?;
    Ok(installer)
}

struct Watch {
    launcher: Arc<Launcher>,
    verbose: bool,
}

impl Watch {
    fn run(&self, receiver: Receiver) -> io::Result<()> {
        let Some(listener) = receiver.receive()? else { return Ok(()) };
        match listener {
            Ok(listener) => {
                receiver.go_on()?;
                drop(receiver);
                while let Some(call) = listener.next()? {
                    self.look(&listener, &call);
                    listener.go_on(&call)?;
                }
                Ok(())
            }
            Err(error) => {
                self.launcher.mark_all();
                if self.verbose {
                    say(&format!(
                        "page frames are not recycled: the program's system calls cannot be watched ({error}); \
                         it takes CAP_SYS_ADMIN, and no other seccomp listener"
                    ));
                }
                receiver.go_on()
            }
        }
    }

    /// Marks what has to be marked before the call runs.
    fn look(&self, listener: &Listener, call: &Call) {
        let process = Process::of(call.tid);
        let Some(process) = process else {
            // It is gone, or not visible from here.
            if listener.waits(call) {
                self.launcher.mark_all();
            }
            return;
        };
        let carries = match filter::kind(call.arch, call.nr) {
            Kind::Pages => false,
            Kind::Carrier => true,
            Kind::Ring if is_managers_ring(call) => return,
            Kind::Ring => true,
            Kind::Direct if self.opens_safely(call, libc::AT_FDCWD, call.args[0]) => return,
            Kind::DirectAt if self.opens_safely(call, call.args[0] as i32, call.args[1]) => return,
            Kind::DirectHow if !asks_direct(call) => return,
            Kind::DirectHow if self.opens_safely(call, call.args[0] as i32, call.args[1]) => return,
            Kind::DirectSet if direct::descriptor_pins(call.tid, call.args[0] as i32) => return,
            Kind::Direct | Kind::DirectAt | Kind::DirectHow | Kind::DirectSet => true,
        };
        let mut marked = process.numbers.iter().map(|&n| self.launcher.mark_plain_refs(n)).sum::<usize>();
        // A process of its own in the memory of another (vfork): the other's pages are meant.
        for other in self.launcher.processes() {
            if !process.numbers.contains(&other)
                && listener::share_memory(process.tgid, other).unwrap_or(true)
            {
                marked += self.launcher.mark_plain_refs(other);
            }
        }
        if carries {
            self.launcher.mark_all();
        }
        if self.verbose {
            let whose = if carries { "in no process any more" } else { "not in this process" };
            let tgid = process.tgid;
            say(&format!(
                "process {tgid} made system call {}: page frames are recycled {whose} ({marked} marked)",
                call.nr
            ));
        }
    }

    /// Whether O_DIRECT on this path leaves no plain references. In doubt it does.
    fn opens_safely(&self, call: &Call, dir: i32, path: u64) -> bool {
        let mut buffer = [0; libc::PATH_MAX as usize];
        let Ok(len) = listener::read_memory(call.tid, path, &mut buffer) else { return false };
        let Some(path) = buffer[..len].split(|&b| b == 0).next().filter(|p| p.len() < len) else {
            return false;
        };
        // The manager's own device: its buffers are not the program's.
        let own = format!("/proc/{}/fd/", std::process::id());
        path.starts_with(own.as_bytes())
            || direct::path_pins(call.tid, dir, Path::new(OsStr::from_bytes(path)))
    }
}

/// Who makes a call.
struct Process {
    tgid: u32,
    /// Its number here and in the namespaces below, where its slot has that number.
    numbers: Vec<u32>,
}

impl Process {
    fn of(tid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name));
        let tgid = field("Tgid:")?.trim().parse().ok()?;
        let numbers = field("NStgid:")?.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        Some(Self { tgid, numbers })
    }
}

/// Whether the ring that is being made is the manager's, for its devices.
fn is_managers_ring(call: &Call) -> bool {
    let mut params = [0; 12];
    if call.args[0] as u32 != Ring::SIGN.0 {
        return false;
    }
    match listener::read_memory(call.tid, call.args[1], &mut params) {
        // `struct io_uring_params`: sq_entries, cq_entries, flags, …
        Ok(12) => {
            let word =
                |i: usize| u32::from_ne_bytes([params[i], params[i + 1], params[i + 2], params[i + 3]]);
            word(4) == Ring::SIGN.1 && word(8) & CQSIZE != 0
        }
        _ => false,
    }
}

/// Whether the `struct open_how` of an openat2 has O_DIRECT. In doubt it has.
fn asks_direct(call: &Call) -> bool {
    let mut flags = [0; 8];
    match listener::read_memory(call.tid, call.args[2], &mut flags) {
        Ok(8) => u64::from_ne_bytes(flags) & libc::O_DIRECT as u64 != 0,
        _ => true,
    }
}
