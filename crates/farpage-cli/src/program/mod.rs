//! The program to run: where it is, and whether a library can be preloaded into it.

mod elf;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

pub use elf::Refusal;

use crate::error::{EXIT_CANNOT_RUN, EXIT_NOT_FOUND};

/// Interpreters of interpreters that are followed, like the kernel does.
const MAX_SCRIPT_DEPTH: usize = 4;
/// Bytes of a `#!` line that the kernel reads.
const SCRIPT_LINE: usize = 256;
/// Where programs are looked for when `PATH` is not set (glibc's `_CS_PATH`).
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// What runs a text file without `#!`, as `execvp` does.
const SHELL: &str = "/bin/sh";

/// Why a program is not started.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// There is no such program.
    #[error("{}: program not found: give its path, or add its directory to PATH", .0.display())]
    NotFound(OsString),
    /// There is a file, but it may not be executed.
    #[error("{}: not an executable file: check its type and permissions (chmod +x)", .0.display())]
    NotExecutable(PathBuf),
    /// The script's `#!` line names an interpreter that is not there.
    #[error("{}: its interpreter {} was not found: install it or correct the first line", script.display(), interpreter.display())]
    NoInterpreter {
        /// The script.
        script: PathBuf,
        /// What its first line names.
        interpreter: PathBuf,
    },
    /// Interpreters that are scripts themselves, without end.
    #[error("{}: more than {MAX_SCRIPT_DEPTH} interpreters, one run by the next: name a real program in its first line", .0.display())]
    TooDeep(PathBuf),
    /// It could run, but not under farpage, and running it unmanaged in silence would be wrong.
    #[error("{}: {reason}", program.display())]
    Refused {
        /// The program or the interpreter of the script.
        program: PathBuf,
        /// Why.
        reason: Refusal,
    },
    /// It could not be read.
    #[error("{}: cannot be examined ({source}): farpage must be able to read the program that it runs", program.display())]
    Unreadable {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `exec` failed for another reason.
    #[error("{}: cannot be run ({source})", program.display())]
    Exec {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ProgramError {
    /// 127 if something was not found, else 126.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) | Self::NoInterpreter { .. } => EXIT_NOT_FOUND,
            _ => EXIT_CANNOT_RUN,
        }
    }
}

/// A program that can be preloaded.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// What is executed.
    pub path: PathBuf,
    /// A text file without `#!`: `/bin/sh` is to run it, as `execvp` has it.
    pub through_shell: bool,
}

/// Finds `name` as `execvp` does, with `path` as the value of `PATH`, and checks that it can be preloaded.
pub fn resolve(name: &OsStr, path: Option<&OsStr>) -> Result<Program, ProgramError> {
    let path = find(name, path)?;
    let through_shell = check(&path, &path, 0)?;
    Ok(Program { path, through_shell })
}

/// What has to be executed to run `program`.
impl Program {
    /// The file to execute and, if it differs from the command line, what precedes the program's arguments.
    pub fn command(&self) -> (&Path, Option<&Path>) {
        if self.through_shell { (Path::new(SHELL), Some(&self.path)) } else { (&self.path, None) }
    }
}

/// Looks `name` up in `PATH`, or takes it as a path if it has a slash.
fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, ProgramError> {
    let not_found = || ProgramError::NotFound(name.to_owned());
    if name.is_empty() {
        return Err(not_found());
    }
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return match executable(&file) {
            Found::Yes => Ok(file),
            Found::Denied => Err(ProgramError::NotExecutable(file)),
            Found::No => Err(not_found()),
        };
    }
    let mut denied = None;
    for dir in path.unwrap_or(OsStr::new(DEFAULT_PATH)).as_bytes().split(|&b| b == b':') {
        let dir = if dir.is_empty() { Path::new(".") } else { Path::new(OsStr::from_bytes(dir)) };
        let file = dir.join(name);
        match executable(&file) {
            Found::Yes => return Ok(file),
            Found::Denied => denied = denied.or(Some(file)),
            Found::No => {}
        }
    }
    Err(denied.map_or_else(not_found, ProgramError::NotExecutable))
}

enum Found {
    Yes,
    Denied,
    No,
}

/// Whether the file is there and this process may execute it.
fn executable(file: &Path) -> Found {
    match file.metadata() {
        Ok(meta) if meta.is_file() => {
            match rustix::fs::accessat(CWD, file, Access::EXEC_OK, AtFlags::EACCESS) {
                Ok(()) => Found::Yes,
                Err(_) => Found::Denied,
            }
        }
        Ok(_) => Found::Denied,
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Found::Denied,
        Err(_) => Found::No,
    }
}

/// Checks the file and, for a script, its interpreter. `script` is what the user named. True if it is text
/// without `#!` that the shell has to run.
fn check(file: &Path, script: &Path, depth: usize) -> Result<bool, ProgramError> {
    if depth > MAX_SCRIPT_DEPTH {
        return Err(ProgramError::TooDeep(script.into()));
    }
    let unreadable = |source| ProgramError::Unreadable { program: file.into(), source };
    let open = File::open(file).map_err(unreadable)?;
    let mut head = Vec::new();
    (&open).take(SCRIPT_LINE as u64).read_to_end(&mut head).map_err(unreadable)?;

    if head.starts_with(b"#!") {
        let interpreter = interpreter(&head).ok_or_else(|| ProgramError::NotExecutable(file.into()))?;
        return match executable(&interpreter) {
            Found::Yes => check(&interpreter, script, depth + 1).map(|_| false),
            Found::Denied => Err(ProgramError::NotExecutable(interpreter)),
            Found::No => Err(ProgramError::NoInterpreter { script: file.into(), interpreter }),
        };
    }
    if head.starts_with(elf::MAGIC) {
        let refused = |reason| ProgramError::Refused { program: file.into(), reason };
        let read_at = |buf: &mut [u8], at| open.read_exact_at(buf, at);
        elf::check(&read_at).map_err(refused)?;
        if let Some(reason) = changes_privileges(file, &open).map_err(unreadable)? {
            return Err(refused(reason));
        }
        return Ok(false);
    }
    // `execvp` hands what the kernel does not know to the shell; a shell can do nothing with binary data.
    if head.contains(&0) || depth > 0 {
        return Err(ProgramError::Refused { program: file.into(), reason: Refusal::UnknownFormat });
    }
    check(Path::new(SHELL), script, depth + 1).map(|_| true)
}

/// The path in a `#!` line, as the kernel reads it.
fn interpreter(head: &[u8]) -> Option<PathBuf> {
    let line = head[2..].split(|&b| b == b'\n').next()?;
    let name = line.split(|b| matches!(b, b' ' | b'\t' | 0)).find(|word| !word.is_empty())?;
    Some(OsString::from_vec(name.to_vec()).into())
}

/// Whether executing the file gives it other rights than this process has: the loader ignores LD_PRELOAD then.
fn changes_privileges(file: &Path, open: &File) -> io::Result<Option<Refusal>> {
    use rustix::process::{getgid, getuid};
    let no_new_privileges = rustix::thread::no_new_privs().unwrap_or(false);
    let nosuid =
        rustix::fs::fstatvfs(open).is_ok_and(|fs| fs.f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID));
    if no_new_privileges || nosuid {
        return Ok(None);
    }
    let meta = file.metadata()?;
    let mode = meta.permissions().mode();
    if mode & libc::S_ISUID != 0 && meta.uid() != getuid().as_raw() {
        return Ok(Some(Refusal::SetUser(meta.uid())));
    }
    if mode & libc::S_ISGID != 0 && mode & libc::S_IXGRP != 0 && meta.gid() != getgid().as_raw() {
        return Ok(Some(Refusal::SetGroup(meta.gid())));
    }
    let mut capabilities = [0u8; 64];
    let has = rustix::fs::fgetxattr(open, c"security.capability", &mut capabilities[..]).is_ok_and(|n| n > 0);
    Ok((has && !getuid().is_root()).then_some(Refusal::FileCapabilities))
}

#[cfg(test)]
mod tests;
