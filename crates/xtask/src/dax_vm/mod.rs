//! `cargo xtask dax-vm`: real DAX on a machine without persistent memory.
//!
//! A stock Debian kernel boots in QEMU with persistent memory that is a file of this machine. Its only programs are
//! busybox, what makes and checks file systems, and our test program. See `docs/dax-vm.md`.

mod bench;
mod console;
mod cpio;
mod error;
mod kernel;
mod machine;
mod modules;
mod packages;
mod power;
mod results;
mod scenarios;
mod suite;
mod tools;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bench::{Bench, Plan};
use error::VmError;
use results::Results;
use scenarios::{Kind, SCENARIOS, Scenario};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Runs this scenario only; may be given more than once.
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Runs these shell commands as a scenario of their own; the functions of the scenarios are at hand.
    #[arg(long, value_name = "COMMANDS", conflicts_with = "scenario")]
    run: Option<String>,
    /// Measures `farpage bench dax` there, on ext4 and on xfs, instead of testing.
    #[arg(long, conflicts_with_all = ["scenario", "run"])]
    bench: bool,
    /// On file systems, runs only the test program's cases with this in their names, as `fuse-`.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
    /// Lists the scenarios.
    #[arg(long)]
    list: bool,
    /// Boots into a shell, with the test program in /bin and the functions of the scenarios at hand.
    #[arg(long)]
    shell: bool,
    /// Keeps the images of the persistent memory (target/dax-vm/images).
    #[arg(long)]
    keep: bool,
    /// Takes the kernel from another suite of the distribution, as sid or trixie-backports.
    #[arg(long, value_name = "SUITE")]
    kernel_from: Option<String>,
    /// Seconds for each test that goes on for a while, such as races.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// How often the power is cut.
    #[arg(long, default_value_t = 2)]
    cuts: u32,
    /// Seconds after which one run of the test program is killed [default: 300 and 10 times --seconds].
    #[arg(long)]
    limit: Option<u32>,
    /// Seconds after which a machine is killed [default: 3 times --limit].
    #[arg(long)]
    timeout: Option<u32>,
}

/// Runs what `args` ask for.
pub fn run(args: &Args) -> ExitCode {
    if args.list {
        for Scenario { name, about, .. } in SCENARIOS {
            println!("{name:15} {about}");
        }
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    let scenarios = match chosen(args) {
        Ok(scenarios) => scenarios,
        Err(unknown) => {
            eprintln!("dax-vm: there is no scenario `{unknown}` (--list shows them)");
            return ExitCode::from(2);
        }
    };
    let mut results = Results::default();
    let outcome = test(args, &scenarios, &mut results);
    let seconds = began.elapsed().as_secs();
    let (passed, failed, skipped) = results.count();
    match outcome {
        Ok(Some(machine)) => {
            println!(
                "dax-vm: {passed} passed, {failed} failed, {skipped} skipped in {seconds} s ({machine})"
            );
            ExitCode::from(u8::from(failed > 0))
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(VmError::Missing(why)) => {
            println!("SKIPPED: dax-vm: {why}");
            println!("dax-vm: 0 passed, 0 failed, {} skipped in {seconds} s", scenarios.len());
            ExitCode::SUCCESS
        }
        Err(e) => {
            println!("FAILED dax-vm: {e}");
            println!("dax-vm: {passed} passed, {} failed, {skipped} skipped in {seconds} s", failed + 1);
            ExitCode::FAILURE
        }
    }
}

/// The scenarios that are asked for, or all; else the name that there is not.
fn chosen(args: &Args) -> Result<Vec<Scenario>, String> {
    if let Some(commands) = args.run.clone() {
        return Ok(vec![Scenario { name: "run", about: "", kind: Kind::Commands(commands) }]);
    }
    if args.bench {
        let measure = |name, fs, options| Scenario {
            name,
            about: "",
            kind: Kind::Commands(format!("measure {fs} '{options}'")),
        };
        return Ok(vec![
            measure("bench-ext4", "ext4", "-b 4096"),
            // Blocks in pieces of 2 MiB, which are mapped by huge pages.
            measure("bench-ext4-2m", "ext4", "-b 4096 -E stride=512,stripe_width=512"),
            measure("bench-xfs", "xfs", "-m reflink=0"),
        ]);
    }
    let names = &args.scenario;
    if let Some(unknown) = names.iter().find(|name| SCENARIOS.iter().all(|s| s.name != **name)) {
        return Err(unknown.clone());
    }
    let wanted = |s: &&Scenario| names.is_empty() || names.iter().any(|name| name == s.name);
    Ok(SCENARIOS.iter().filter(wanted).cloned().collect())
}

/// Tests; says with what machine, or nothing if there was only a shell.
fn test(args: &Args, scenarios: &[Scenario], results: &mut Results) -> Result<Option<String>, VmError> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err(VmError::Missing("the bench is for Linux on x86-64".to_owned()));
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/dax-vm");
    fs::create_dir_all(&folder).map_err(VmError::file(&folder))?;
    let folder = folder.canonicalize().map_err(VmError::file(&folder))?;
    // Until this process ends: the images and the logs are one run's.
    let lock = folder.join("lock");
    let lock_file = fs::File::create(&lock).map_err(VmError::file(&lock))?;
    if lock_file.try_lock().is_err() {
        return Err(VmError::Wrong(format!("another run of the bench uses {}", folder.display())));
    }
    let qemu = machine::qemu()?;
    fs::remove_dir_all(folder.join("logs")).or_else(not_there).map_err(VmError::file(&folder))?;
    for below in ["images", "logs", "boot"] {
        let below = folder.join(below);
        fs::create_dir_all(&below).map_err(VmError::file(&below))?;
    }
    let bench = prepare(args, folder)?;
    let kernel = &bench.kernel.version;
    let machine = format!("kernel {kernel}, qemu {qemu}, {}", bench.accel.name());
    println!("dax-vm: {machine}");
    if args.shell {
        let nvdimms = images(&bench.folder, args.keep)?;
        bench.shell(&nvdimms)?;
        return Ok(None);
    }
    let scripts: Vec<(String, String)> = scenarios
        .iter()
        .filter_map(|s| match &s.kind {
            Kind::Script(script) => Some((s.name.to_owned(), (*script).to_owned())),
            Kind::Commands(commands) => Some((s.name.to_owned(), commands.clone())),
            Kind::PowerLoss => None,
        })
        .collect();
    if !scripts.is_empty() {
        let nvdimms = images(&bench.folder, false)?;
        let plan = Plan { name: "main", scripts, files: Vec::new(), nvdimms: &nvdimms };
        bench.boot(&plan, results, |_| None)?;
    }
    if scenarios.iter().any(|s| s.kind == Kind::PowerLoss) {
        power::run(&bench, args.cuts, results)?;
    }
    summary(&bench.folder, &machine, results)?;
    if !args.keep {
        let images = bench.folder.join("images");
        fs::remove_dir_all(&images).map_err(VmError::file(&images))?;
    }
    Ok(Some(machine))
}

fn not_there(e: io::Error) -> io::Result<()> {
    if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }
}

/// Gets and builds everything that a machine needs.
fn prepare(args: &Args, folder: PathBuf) -> Result<Bench, VmError> {
    let kernel = kernel::stock(&folder, args.kernel_from.as_deref())?;
    let tools = tools::Tools::get(&folder.join("tools"))?;
    let suite = suite::build(&folder)?;
    let mut system = bench::system(&kernel, &tools, &suite)?;
    if args.bench {
        tools.add_program(&mut system, &suite::command()?)?;
    }
    let probe = bench::write_initramfs(&folder, "probe", system.clone())?;
    let (accel, why) = machine::accel(&kernel.image, &probe, &folder.join("logs/probe.console"))?;
    if !why.is_empty() {
        println!("software emulation: {why}");
    }
    let limit = args.limit.unwrap_or_else(|| args.seconds.saturating_mul(10).saturating_add(300));
    let timeout = Duration::from_secs(args.timeout.unwrap_or(limit.saturating_mul(3)).into());
    Ok(Bench {
        folder,
        kernel,
        accel,
        system,
        seconds: args.seconds,
        only: args.only.replace('\'', ""),
        limit,
        timeout,
    })
}

/// The persistent memory, empty unless `kept` and there.
fn images(folder: &Path, kept: bool) -> Result<Vec<machine::Nvdimm>, VmError> {
    let nvdimms = scenarios::nvdimms(&folder.join("images"));
    for nvdimm in &nvdimms {
        if !(kept && nvdimm.image.exists()) {
            nvdimm.create()?;
        }
    }
    Ok(nvdimms)
}

/// Writes the cases, the mount options and what the kernel said to `logs/summary`, and shows the latter two.
fn summary(folder: &Path, machine: &str, results: &Results) -> Result<(), VmError> {
    let mut text = format!("{machine}\n");
    for case in &results.cases {
        text += &format!("{case}\n");
    }
    println!("\n--- what was mounted, and what the kernel said about it");
    for (scenario, note) in &results.notes {
        println!("{scenario}: {note}");
        text += &format!("{scenario}: {note}\n");
    }
    let path = folder.join("logs/summary");
    println!("logs: {}\n", path.with_file_name("").display());
    fs::write(&path, text).map_err(VmError::file(&path))
}
