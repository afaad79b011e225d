//! A virtual machine: how it is started, what it says, and how it ends.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::error::{VmError, output};
use super::packages::have;

const QEMU: &str = "qemu-system-x86_64";
/// Room for the virtual machine's memory beside its persistent memory.
const MEMORY: &str = "1G,slots=8,maxmem=16G";
/// What every kernel is told. Nothing is to slow it down that the tests do not need; a stalled emulator is no bug of
/// the kernel; `panic=-1` ends the machine.
const KERNEL_OPTIONS: &str = "panic=-1 printk.devkmsg=on mitigations=off no5lvl nosoftlockup \
                              rcupdate.rcu_cpu_stall_suppress=1 audit=0 apparmor=0";

/// Who executes the instructions of the virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor.
    Kvm,
    /// Software.
    Tcg,
}

impl Accel {
    /// As QEMU names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A piece of persistent memory: a file on this machine.
#[derive(Debug)]
pub struct Nvdimm {
    /// What the scripts call it.
    pub name: &'static str,
    pub image: PathBuf,
    /// Bytes.
    pub size: u64,
}

impl Nvdimm {
    /// The memory `name`, of `size` bytes, with its image in `folder`.
    pub fn new(folder: &Path, name: &'static str, size: u64) -> Self {
        Self { name, image: folder.join(name), size }
    }

    /// Makes the image anew: all zeros, without taking space for them.
    pub fn create(&self) -> Result<(), VmError> {
        let file = File::create(&self.image).map_err(VmError::file(&self.image))?;
        file.set_len(self.size).map_err(VmError::file(&self.image))
    }
}

/// What a machine is started from.
#[derive(Debug)]
pub struct Setup<'a> {
    pub accel: Accel,
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    /// The first one is in slot 0, and so on.
    pub nvdimms: &'a [Nvdimm],
}

impl Setup<'_> {
    fn command(&self) -> Command {
        // The machine must not outlive us, however we end.
        let mut command = if have("setpriv") {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", QEMU]);
            command
        } else {
            Command::new(QEMU)
        };
        command.args(["-machine", "q35,nvdimm=on", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
        command.args(["-accel", if self.accel == Accel::Kvm { "kvm" } else { "tcg,thread=multi" }]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        for (n, nvdimm) in self.nvdimms.iter().enumerate() {
            let path = nvdimm.image.display();
            command.args([
                "-object".to_owned(),
                format!("memory-backend-file,id=m{n},size={},mem-path={path},share=on", nvdimm.size),
                "-device".to_owned(),
                format!("nvdimm,memdev=m{n},id=nv{n},slot={n}"),
            ]);
        }
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initramfs);
        command
    }

    /// Starts the machine. What its kernel says goes to the file `console`; what its programs say (on the second serial
    /// port) comes line by line.
    pub fn start(&self, console: &Path) -> Result<Running, VmError> {
        let mut command = self.command();
        command.arg("-append").arg(format!("console=ttyS0 {KERNEL_OPTIONS}"));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-chardev", "stdio,id=said,signal=off", "-serial", "chardev:said"]);
        let failed = |why: &str| VmError::Command { command: QEMU.to_owned(), why: why.to_owned() };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failed(&e.to_string()))?;
        let (Some(said), Some(complaints)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed("its output cannot be read"));
        };
        let (sender, lines) = channel();
        for (from, qemu) in
            [(Box::new(said) as Box<dyn std::io::Read + Send>, false), (Box::new(complaints), true)]
        {
            let sender = sender.clone();
            thread::spawn(move || {
                // A line that the end of the machine has cut short is no line.
                let mut from = BufReader::new(from);
                let mut line = Vec::new();
                while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) && line.ends_with(b"\n") {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    let said = if qemu { Said::Qemu(text) } else { Said::Program(text) };
                    if sender.send(said).is_err() {
                        break;
                    }
                    line.clear();
                }
            });
        }
        Ok(Running { child, lines })
    }

    /// Starts the machine with this terminal as its console, and waits for its end.
    pub fn interactive(&self) -> Result<ExitStatus, VmError> {
        let mut command = self.command();
        command.arg("-append").arg(format!("console=ttyS0 quiet {KERNEL_OPTIONS}"));
        command.args(["-serial", "mon:stdio", "-serial", "null"]);
        command.status().map_err(|e| VmError::Command { command: QEMU.to_owned(), why: e.to_string() })
    }
}

/// A line that somebody said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// A program in the machine.
    Program(String),
    /// QEMU itself, on standard error.
    Qemu(String),
}

/// How a machine ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// It powered off, or QEMU failed.
    Off(ExitStatus),
    /// It was killed because the watcher wanted it so.
    Cut,
    /// It was killed because its time was over.
    TimedOut,
}

/// A machine that runs; it is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<Said>,
}

impl Running {
    /// Shows every line to `watch` until the machine ends, its `limit` is over, or the time comes at which `watch`
    /// wants it to be cut off. `watch` sees, after a cut, what was still on its way.
    pub fn watch(
        mut self,
        limit: Duration,
        mut watch: impl FnMut(Said) -> Option<Instant>,
    ) -> Result<End, VmError> {
        let last = Instant::now() + limit;
        let mut cut_at = None;
        loop {
            let now = Instant::now();
            let until = cut_at.unwrap_or(last).min(last);
            match self.lines.recv_timeout(until.saturating_duration_since(now)) {
                Ok(said) => {
                    let wish = watch(said);
                    cut_at = cut_at.or(wish);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().map_err(VmError::file(Path::new(QEMU)))?;
                    return Ok(End::Off(status));
                }
                Err(RecvTimeoutError::Timeout) => {
                    // SIGKILL: nothing is written back, nothing is said.
                    self.stop();
                    for said in self.lines.iter() {
                        watch(said);
                    }
                    return Ok(if cut_at.is_some_and(|at| at <= last) { End::Cut } else { End::TimedOut });
                }
            }
        }
    }

    fn stop(&mut self) {
        // Either can only fail because the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// QEMU's version, or why there is none.
pub fn qemu() -> Result<String, VmError> {
    if !have(QEMU) {
        return Err(VmError::Missing(format!("`{QEMU}` is missing (apt-get install qemu-system-x86)")));
    }
    let text = output(Command::new(QEMU).arg("--version"))?;
    let version = text.split_whitespace().nth(3);
    version.map(str::to_owned).ok_or_else(|| VmError::Wrong(format!("unknown version of QEMU: {text}")))
}

/// KVM if a machine really boots with it: `/dev/kvm` may be there and refuse, or accept and never run anything. The
/// `initramfs` powers the machine off at once.
pub fn accel(kernel: &Path, initramfs: &Path, console: &Path) -> Result<(Accel, String), VmError> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok((Accel::Tcg, "no /dev/kvm that can be opened".to_owned()));
    }
    let setup = Setup { accel: Accel::Kvm, kernel, initramfs, nvdimms: &[] };
    let mut complaint = String::new();
    let end = setup.start(console)?.watch(Duration::from_secs(20), |said| {
        match said {
            // The first one is the reason.
            Said::Qemu(line) if complaint.is_empty() => complaint = line,
            _ => {}
        }
        None
    })?;
    let text = std::fs::read_to_string(console).unwrap_or_default();
    Ok(match end {
        End::Off(status) if status.success() && text.contains("Power down") => (Accel::Kvm, String::new()),
        End::Off(_) if !complaint.is_empty() => (Accel::Tcg, format!("KVM does not work: {complaint}")),
        End::Off(status) => (Accel::Tcg, format!("KVM does not work: {status}")),
        _ => (Accel::Tcg, "KVM does not work: a machine does not boot within 20 s".to_owned()),
    })
}
