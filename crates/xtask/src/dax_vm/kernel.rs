//! A stock Debian kernel, unpacked.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::VmError;
use super::packages::{Apt, unpacked};

/// A kernel that can be booted.
#[derive(Debug)]
pub struct Kernel {
    /// The compressed kernel.
    pub image: PathBuf,
    /// The folder of its modules.
    pub modules: PathBuf,
    /// As `uname -r` says it.
    pub version: String,
}

/// The kernel that `linux-image-amd64` stands for, on this machine or in another suite; below `target`.
pub fn stock(target: &Path, suite: Option<&str>) -> Result<Kernel, VmError> {
    let (apt, folder) = match suite {
        None => (Apt::of_this_machine()?, target.join("kernel")),
        Some(suite) => {
            (Apt::of_suite(suite, &target.join("apt").join(suite))?, target.join(format!("kernel-{suite}")))
        }
    };
    let packages = match packages(&apt) {
        Ok(packages) => packages,
        // Without a network: what an earlier run has left.
        Err(e) => match fs::read_to_string(folder.join("packages")) {
            Ok(list) => list.lines().map(str::to_owned).collect(),
            Err(_) => return Err(e),
        },
    };
    find(&unpacked(&apt, &packages, &folder)?)
}

/// The packages of the kernel itself. Debian splits it differently from release to release.
fn packages(apt: &Apt) -> Result<BTreeSet<String>, VmError> {
    const PARTS: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];
    let mut found = BTreeSet::new();
    let mut to_ask = vec!["linux-image-amd64".to_owned()];
    while let Some(package) = to_ask.pop() {
        for needed in apt.depends(&package)? {
            // Those for any version (`linux-modules-amd64`) hold nothing.
            let part = PARTS.iter().find_map(|part| needed.strip_prefix(part));
            if part.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
                && found.insert(needed.clone())
            {
                to_ask.push(needed);
            }
        }
    }
    if found.is_empty() {
        return Err(VmError::Missing("apt knows no kernel for linux-image-amd64".to_owned()));
    }
    Ok(found)
}

/// The kernel below `root`. Older packages keep it in `boot`, newer ones beside its modules.
fn find(root: &Path) -> Result<Kernel, VmError> {
    for folder in ["lib/modules", "usr/lib/modules"] {
        let Ok(versions) = fs::read_dir(root.join(folder)) else { continue };
        for version in versions.flatten() {
            let modules = version.path();
            let version = version.file_name().to_string_lossy().into_owned();
            let images = [root.join("boot").join(format!("vmlinuz-{version}")), modules.join("vmlinuz")];
            if let Some(image) = images.into_iter().find(|image| image.is_file()) {
                return Ok(Kernel { image, modules, version });
            }
        }
    }
    Err(VmError::Wrong(format!("no kernel with its modules in {}", root.display())))
}
