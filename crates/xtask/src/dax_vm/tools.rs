//! The programs of the virtual machine's own system: busybox and what makes and checks file systems.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::error::{VmError, output};
use super::packages::{Apt, unpacked};

const PROGRAMS: [&str; 4] = ["mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"];
const LIBRARIES: &str = "x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Unpacked packages with the programs and their libraries.
#[derive(Debug)]
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    /// Gets the packages; `folder` keeps them.
    pub fn get(folder: &Path) -> Result<Self, VmError> {
        let apt = Apt::of_this_machine()?;
        let packages = match packages(&apt) {
            Ok(packages) => packages,
            Err(e) => match fs::read_to_string(folder.join("packages")) {
                Ok(list) => list.lines().map(str::to_owned).collect(),
                Err(_) => return Err(e),
            },
        };
        Ok(Self { root: unpacked(&apt, &packages, folder)? })
    }

    /// Puts the programs, and the libraries that they need, into the archive.
    pub fn add_to(&self, archive: &mut Archive) -> Result<(), VmError> {
        archive.copy("bin/busybox", &self.program("busybox")?)?;
        archive.folder("sbin");
        let loader = self.loader()?;
        archive.copy(&format!("lib64/{LOADER}"), &loader)?;
        let mut added = BTreeSet::new();
        for name in PROGRAMS {
            let program = self.program(name)?;
            for library in self.libraries_of(&program, "")? {
                let file = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if added.insert(file.clone()) {
                    archive.copy(&format!("lib/{LIBRARIES}/{file}"), &library)?;
                }
            }
            archive.copy(&format!("sbin/{name}"), &program)?;
        }
        let settings = self.root.join("etc/mke2fs.conf");
        archive.file("etc/mke2fs.conf", &fs::read(&settings).map_err(VmError::file(&settings))?);
        Ok(())
    }

    /// Puts a program of this machine into the archive, with libraries of this machine.
    pub fn add_program(&self, archive: &mut Archive, program: &Path) -> Result<(), VmError> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for library in
            self.libraries_of(program, ":/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu:/lib64")?
        {
            let file = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
            archive.copy(&format!("lib/{LIBRARIES}/{file}"), &library)?;
        }
        archive.copy(&format!("bin/{name}"), program)
    }

    /// The libraries that a program needs, of those of the packages, or of the folders in `more`.
    fn libraries_of(&self, program: &Path, more: &str) -> Result<Vec<PathBuf>, VmError> {
        let path = self.folders().map(|folder| folder.to_string_lossy().into_owned()).join(":");
        let mut list = Command::new(self.loader()?);
        list.args(["--library-path", &(path + more), "--list"]).arg(program);
        libraries(&output(&mut list)?).map_err(|library| {
            VmError::Wrong(format!("{} needs {library}, which is not there", program.display()))
        })
    }

    fn folders(&self) -> [PathBuf; 2] {
        [self.root.join("lib").join(LIBRARIES), self.root.join("usr/lib").join(LIBRARIES)]
    }

    fn loader(&self) -> Result<PathBuf, VmError> {
        self.first(self.folders().iter().map(|folder| folder.join(LOADER)), LOADER)
    }

    fn program(&self, name: &str) -> Result<PathBuf, VmError> {
        let folders = ["sbin", "usr/sbin", "bin", "usr/bin"];
        self.first(folders.iter().map(|folder| self.root.join(folder).join(name)), name)
    }

    fn first(&self, mut paths: impl Iterator<Item = PathBuf>, name: &str) -> Result<PathBuf, VmError> {
        paths
            .find(|path| path.is_file())
            .ok_or_else(|| VmError::Wrong(format!("no {name} in {}", self.root.display())))
    }
}

/// The packages with the programs, and those of the libraries that they need.
fn packages(apt: &Apt) -> Result<BTreeSet<String>, VmError> {
    let mut packages = BTreeSet::from(["busybox-static".to_owned()]);
    for package in ["e2fsprogs", "xfsprogs"] {
        packages.insert(package.to_owned());
        for needed in apt.depends(package)? {
            // Unicode's tables are for xfs_scrub only, and large.
            if needed.starts_with("lib") && !needed.starts_with("libicu") {
                packages.insert(needed);
            }
        }
    }
    Ok(packages)
}

/// The files named in what the loader's `--list` prints, or the name of one that it did not find.
fn libraries(list: &str) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for line in list.lines() {
        let Some((name, file)) = line.split_once(" => ") else { continue };
        if file.trim() == "not found" {
            return Err(name.trim().to_owned());
        }
        let file = file.rsplit_once(" (").map_or(file, |(file, _)| file).trim();
        if !file.ends_with(LOADER) {
            files.push(PathBuf::from(file));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_loaders_list() {
        let list = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibuuid.so.1 => /r/lib/libuuid.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /r/lib/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(libraries(list), Ok(vec![PathBuf::from("/r/lib/libuuid.so.1")]));
        assert_eq!(libraries("\tlibx.so.1 => not found\n"), Err("libx.so.1".to_owned()));
    }
}
