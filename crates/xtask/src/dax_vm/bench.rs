//! Everything that a boot needs, and a boot.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::console;
use super::cpio::Archive;
use super::error::VmError;
use super::kernel::Kernel;
use super::machine::{Accel, End, Nvdimm, Said, Setup};
use super::modules;
use super::results::{Boot, Outcome, Results};
use super::suite;
use super::tools::Tools;

/// So much of the kernel's log is shown when something went wrong.
const LAST_LINES: usize = 30;

/// What all boots have in common.
#[derive(Debug)]
pub struct Bench {
    /// `target/dax-vm`.
    pub folder: PathBuf,
    pub kernel: Kernel,
    pub accel: Accel,
    /// The system of the virtual machine, without scenarios.
    pub system: Archive,
    /// Seconds for each test that goes on for a while.
    pub seconds: u32,
    /// Only cases with this in their names, on file systems.
    pub only: String,
    /// Seconds after which a run of the test program is killed.
    pub limit: u32,
    /// How long a boot may take.
    pub timeout: Duration,
}

/// One boot.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The name of its logs.
    pub name: &'a str,
    /// What the shell of the machine runs, scenario by scenario.
    pub scripts: Vec<(String, String)>,
    /// More files for it: path and content.
    pub files: Vec<(String, String)>,
    pub nvdimms: &'a [Nvdimm],
}

/// The system of the virtual machine: programs, modules, the test program, the scripts.
pub fn system(kernel: &Kernel, tools: &Tools, suite: &Path) -> Result<Archive, VmError> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "tmp", "mnt"] {
        archive.folder(folder);
    }
    tools.add_to(&mut archive)?;
    for (n, module) in modules::ordered(&kernel.modules)?.iter().enumerate() {
        archive.file(&format!("lib/modules/{n:02}-{}.ko", module.name), &module.code);
    }
    archive.copy(&format!("bin/{}", suite::NAME), suite)?;
    archive.file("etc/dax-vm/functions", include_bytes!("functions.sh"));
    archive.program("init", include_bytes!("init.sh"));
    Ok(archive)
}

impl Bench {
    /// Boots, runs the plan, and adds what came out to `results`. `told` sees each line that starts with `::power`, and
    /// may say when the machine is to be cut off. Gives how the machine ended.
    pub fn boot(
        &self,
        plan: &Plan<'_>,
        results: &mut Results,
        mut told: impl FnMut(&str) -> Option<Instant>,
    ) -> Result<End, VmError> {
        let began = Instant::now();
        let initramfs = self.initramfs(plan)?;
        let console = self.log(plan.name, "console");
        let said_path = self.log(plan.name, "said");
        let mut said_log = fs::File::create(&said_path).map_err(VmError::file(&said_path))?;
        let setup = Setup {
            accel: self.accel,
            kernel: &self.kernel.image,
            initramfs: &initramfs,
            nvdimms: plan.nvdimms,
        };
        let mut boot = Boot::new(results, plan.scripts.iter().map(|(name, _)| name.clone()));
        let mut complaint = String::new();
        let end = setup.start(&console)?.watch(self.timeout, |said| {
            let line = match said {
                Said::Program(line) => line,
                Said::Qemu(line) => {
                    println!("   qemu| {line}");
                    complaint = format!(": {line}");
                    return None;
                }
            };
            // The log is for people; a full disk shows in what matters.
            let _ = writeln!(said_log, "[{:8.3}] {line}", began.elapsed().as_secs_f32());
            if let Some(line) = line.strip_prefix("::power ") {
                return told(line);
            }
            boot.line(&line);
            None
        })?;
        let sound = match &end {
            End::Cut => boot.cut(),
            End::TimedOut => boot.ended(&format!("killed after {} s", self.timeout.as_secs())),
            End::Off(status) if status.success() => boot.ended("the machine went off"),
            End::Off(status) => boot.ended(&format!("QEMU: {status}{complaint}")),
        };
        self.look_at_console(plan, &console, sound, results)?;
        println!("=== boot {}: {:.1} s", plan.name, began.elapsed().as_secs_f32());
        Ok(end)
    }

    /// A kernel that complains is a failure, whatever the test program says.
    fn look_at_console(
        &self,
        plan: &Plan<'_>,
        path: &Path,
        sound: bool,
        results: &mut Results,
    ) -> Result<(), VmError> {
        let text = fs::read(path).map_err(VmError::file(path))?;
        let text = String::from_utf8_lossy(&text);
        let trouble = console::trouble(&text);
        for (scenario, line) in &trouble {
            let scenario = if scenario.is_empty() { plan.name } else { scenario };
            results.add(scenario, "the kernel is well", Outcome::Failed(line.clone()));
        }
        if trouble.is_empty() {
            results.add(&format!("boot {}", plan.name), "the kernel is well", Outcome::Passed);
        }
        if !trouble.is_empty() || !sound {
            // The log may be out of reach, as in CI.
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
                println!("   kernel| {line}");
            }
        }
        for (scenario, _) in &plan.scripts {
            let lines = console::about_dax(&text, scenario);
            results.notes.extend(lines.into_iter().map(|line| (scenario.clone(), format!("kernel: {line}"))));
        }
        Ok(())
    }

    /// Gives the user a shell in the machine.
    pub fn shell(&self, nvdimms: &[Nvdimm]) -> Result<(), VmError> {
        let files = vec![("etc/dax-vm/shell".to_owned(), String::new())];
        let initramfs = self.initramfs(&Plan { name: "shell", scripts: Vec::new(), files, nvdimms })?;
        let kernel = &self.kernel.image;
        Setup { accel: self.accel, kernel, initramfs: &initramfs, nvdimms }.interactive().map(drop)
    }

    fn initramfs(&self, plan: &Plan<'_>) -> Result<PathBuf, VmError> {
        let mut script = format!("seconds={}\nlimit={}\nonly='{}'\n", self.seconds, self.limit, self.only);
        for (name, commands) in &plan.scripts {
            // Writing to a String does not fail.
            let _ = writeln!(script, "begin {name}\n{commands}\nend {name}");
        }
        let mut archive = self.system.clone();
        archive.file("etc/dax-vm/scenarios", script.as_bytes());
        let memory: String = plan.nvdimms.iter().map(|nvdimm| format!("{}\n", nvdimm.name)).collect();
        archive.file("etc/dax-vm/memory", memory.as_bytes());
        for (path, content) in &plan.files {
            archive.file(path, content.as_bytes());
        }
        write_initramfs(&self.folder, plan.name, archive)
    }

    fn log(&self, name: &str, kind: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.{kind}"))
    }
}

/// Writes the archive where QEMU can read it.
pub fn write_initramfs(folder: &Path, name: &str, archive: Archive) -> Result<PathBuf, VmError> {
    let path = folder.join("boot").join(format!("{name}.cpio"));
    fs::write(&path, archive.finish()).map_err(VmError::file(&path))?;
    Ok(path)
}
