//! The test program of `cargo xtask dax-vm` (docs/dax-vm.md): is a file reached directly, and is what was flushed there
//! after a power loss?

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run {
        #[arg(long)]
        dir: std::path::PathBuf,
        #[arg(long)]
        expect: String,
        #[arg(long, default_value_t = 1)]
        seconds: u32,
        #[arg(long)]
        phase: Option<String>,
    },
    Devdax {
        #[arg(long)]
        device: std::path::PathBuf,
    },
    Powerloss {
        #[command(subcommand)]
        what: Power,
    },
}

#[derive(Debug, Subcommand)]
enum Power {
    Write {
        #[arg(long)]
        dir: std::path::PathBuf,
    },
    Check {
        #[arg(long)]
        dir: std::path::PathBuf,
        #[arg(long)]
        acked: u64,
    },
}

fn main() -> ExitCode {
    let cases: Vec<(&str, Result<(), String>)> = match Cli::parse().command {
        Command::Run { dir, expect, .. } => {
            let dax = expect == "dax";
            vec![("statx", attribute(&dir, dax)), ("MAP_SYNC", map_sync(&dir, dax))]
        }
        Command::Devdax { device } => vec![("map", map_device(&device))],
        Command::Powerloss { what: Power::Write { dir } } => match write(&dir) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(e) => vec![("write", Err(e))],
        },
        Command::Powerloss { what: Power::Check { dir, acked } } => {
            vec![("flushed", check(&dir, acked))]
        }
    };
    let failed = cases.iter().filter(|(_, outcome)| outcome.is_err()).count();
    for (name, outcome) in &cases {
        match outcome {
            Ok(()) => println!("ok {name}"),
            Err(why) => println!("FAILED {name}: {why}"),
        }
    }
    println!("suite: {} passed, {failed} failed, 0 skipped", cases.len() - failed);
    ExitCode::from(u8::from(failed > 0))
}

fn text(e: impl ToString) -> String {
    e.to_string()
}

fn same(what: &str, is: bool, expected: bool) -> Result<(), String> {
    if is == expected { Ok(()) } else { Err(format!("{what} is {is}")) }
}

fn file(dir: &Path) -> Result<File, String> {
    let path = dir.join("file");
    let file =
        File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(text)?;
    file.set_len(1 << 21).map_err(text)?;
    Ok(file)
}

fn attribute(dir: &Path, dax: bool) -> Result<(), String> {
    const STATX_ATTR_DAX: u64 = 0x20_0000;
    let file = file(dir)?;
    let stat = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map_err(text)?;
    same("STATX_ATTR_DAX", stat.stx_attributes.bits() & STATX_ATTR_DAX != 0, dax)
}

fn map_sync(dir: &Path, dax: bool) -> Result<(), String> {
    let granted = match map(&file(dir)?, MapFlags::SHARED_VALIDATE | MapFlags::SYNC) {
        Ok(()) => true,
        Err(Errno::OPNOTSUPP) => false,
        Err(e) => return Err(text(e)),
    };
    same("MAP_SYNC", granted, dax)
}

fn map_device(device: &Path) -> Result<(), String> {
    let file = File::options().read(true).write(true).open(device).map_err(text)?;
    let align = format!("/sys/bus/dax/devices/{}/align", device.file_name().unwrap_or_default().display());
    let align = std::fs::read_to_string(align).map_err(text)?.trim().parse().map_err(text)?;
    map_len(&file, MapFlags::SHARED, align).map_err(text)
}

fn map(file: &File, flags: MapFlags) -> Result<(), Errno> {
    map_len(file, flags, 1 << 21)
}

/// Maps, writes and reads back.
fn map_len(file: &File, flags: MapFlags, len: usize) -> Result<(), Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at a place that the kernel chooses, of at least one page of a file that nobody else cuts;
    // it is written, read and unmapped here.
    unsafe {
        let at = mmap(std::ptr::null_mut(), len, prot, flags, file, 0)?;
        at.cast::<u64>().write_volatile(42);
        let back = at.cast::<u64>().read_volatile();
        munmap(at, len)?;
        if back == 42 { Ok(()) } else { Err(Errno::IO) }
    }
}

fn write(dir: &Path) -> Result<(), String> {
    let file = File::create(dir.join("numbers")).map_err(text)?;
    for n in 0u64.. {
        file.write_all_at(&n.to_le_bytes(), n * 4096).map_err(text)?;
        file.sync_data().map_err(text)?;
        println!("flushed {n}");
    }
    Ok(())
}

fn check(dir: &Path, last: u64) -> Result<(), String> {
    let file = File::open(dir.join("numbers")).map_err(text)?;
    for n in 0..=last {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, n * 4096).map_err(text)?;
        same(&format!("number {n} is there"), u64::from_le_bytes(bytes) == n, true)?;
    }
    Ok(())
}
