//! The process that the user started: passes signals on to the keeper and ends as the keeper ended.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::tree;
use crate::error::{CliError, system};
use crate::sys::{Received, Signals, die_of, leads_session, send};

/// What the terminal sends to the whole foreground group: the program has it already.
const FROM_TERMINAL: &[i32] = &[
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGHUP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGCONT,
    libc::SIGWINCH,
];

/// Waits for the keeper, ends what it may have left behind, and gives its exit status.
pub fn run(keeper: Pid, signals: &Signals) -> Result<u8, CliError> {
    let leads_session = leads_session();
    let status = loop {
        match waitpid(Some(keeper), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => break status,
            Ok(None) | Err(Errno::INTR) => {}
            Err(e) => return Err(system("waiting for the program failed")(e)),
        }
        // An interrupted or failed poll only means: look again.
        let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], None);
        while let Some(received) = signals.next() {
            if is_for_program(received, keeper, leads_session) {
                send(keeper, received.signal);
            }
        }
    };
    // Nothing is left, unless the keeper was killed.
    tree::kill_all();
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ok(code as u8),
        (None, Some(signal)) => die_of(signal),
        (None, None) => {
            Err(CliError::Other("the program ended in an unknown way: look at the kernel's log".into()))
        }
    }
}

/// Whether the program has to be told of a signal that reached the front.
fn is_for_program(received: Received, keeper: Pid, leads_session: bool) -> bool {
    let Received { signal, from_kernel, sender } = received;
    if signal == libc::SIGCHLD || signal == libc::SIGPIPE {
        return false;
    }
    if from_kernel {
        // A hang-up reaches only the leader of the session.
        return !FROM_TERMINAL.contains(&signal) || (signal == libc::SIGHUP && leads_session);
    }
    // The keeper's SIGCONT says that the program was continued.
    sender != keeper.as_raw_nonzero().get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_gets_each_signal_once() {
        let keeper = Pid::from_raw(7).unwrap();
        let from = |signal, from_kernel, sender| {
            is_for_program(Received { signal, from_kernel, sender }, keeper, false)
        };
        assert!(from(libc::SIGTERM, false, 1));
        assert!(from(libc::SIGINT, false, 1));
        assert!(!from(libc::SIGINT, true, 0));
        assert!(!from(libc::SIGTSTP, true, 0));
        assert!(!from(libc::SIGHUP, true, 0));
        assert!(from(libc::SIGALRM, true, 0));
        assert!(!from(libc::SIGCONT, false, 7));
        assert!(!from(libc::SIGCHLD, false, 1));
        let hangup = Received { signal: libc::SIGHUP, from_kernel: true, sender: 0 };
        assert!(is_for_program(hangup, keeper, true));
    }
}
