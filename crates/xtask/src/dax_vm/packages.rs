//! Debian packages that are downloaded and unpacked below `target/dax-vm/`, never installed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{VmError, output};

/// Where packages come from.
#[derive(Debug)]
pub struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// The package sources of this machine.
    pub fn of_this_machine() -> Result<Self, VmError> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if !have(program) {
                return Err(VmError::Missing(format!("`{program}` is missing: the bench needs a Debian")));
            }
        }
        let options = ["Acquire::http::Timeout=20", "Acquire::Retries=1", "APT::Sandbox::User="];
        Ok(Self { options: options.map(str::to_owned).to_vec() })
    }

    /// Another suite (`sid`, `trixie-backports`) of the distribution that this machine's packages come from; its
    /// lists are kept in `folder`.
    pub fn of_suite(suite: &str, folder: &Path) -> Result<Self, VmError> {
        let mut apt = Self::of_this_machine()?;
        let format = "$(ORIGIN) $(REPO_URI) $(SUITE)";
        let targets = output(apt.command("apt-get").args(["indextargets", "--format", format]))?;
        let uri = targets.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (origin, uri, suite) = (words.next()?, words.next()?, words.next()?);
            (origin == "Debian" && !suite.contains("security")).then_some(uri)
        });
        let Some(uri) = uri else {
            return Err(VmError::Missing("apt knows no Debian archive (apt-get update)".to_owned()));
        };
        let lists = folder.join("lists");
        fs::create_dir_all(lists.join("partial")).map_err(VmError::file(&lists))?;
        let sources = folder.join("sources.list");
        let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = format!("deb [signed-by={key}] {uri} {suite} main\n");
        fs::write(&sources, line).map_err(VmError::file(&sources))?;
        apt.options.extend([
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", lists.display()),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
        ]);
        Ok(apt)
    }

    /// What `package` must have beside it. Fetches the lists of packages if apt does not know it.
    pub fn depends(&self, package: &str) -> Result<Vec<String>, VmError> {
        let ask = || {
            output(self.command("apt-cache").args(["depends", "--important", package])).unwrap_or_default()
        };
        let mut answer = ask();
        if answer.is_empty() {
            self.update()?;
            answer = ask();
        }
        if answer.is_empty() {
            return Err(VmError::Missing(format!("apt knows no package {package} (apt-get update)")));
        }
        Ok(dependencies(&answer))
    }

    /// Downloads packages into `folder`.
    fn download(&self, packages: &BTreeSet<String>, folder: &Path) -> Result<(), VmError> {
        let get =
            || output(self.command("apt-get").arg("download").args(packages).current_dir(folder)).map(drop);
        // The list may be older than the archive.
        get().or_else(|_| self.update().and_then(|()| get())).map_err(|e| {
            let names: Vec<&str> = packages.iter().map(String::as_str).collect();
            VmError::Missing(format!("cannot download {}: {e}", names.join(", ")))
        })
    }

    fn update(&self) -> Result<(), VmError> {
        output(self.command("apt-get").args(["update", "-qq"]))
            .map(drop)
            .map_err(|e| VmError::Missing(format!("apt's lists of packages cannot be had: {e}")))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The packages named in what `apt-cache depends --important` prints; alternatives and virtual ones are left out.
fn dependencies(answer: &str) -> Vec<String> {
    let names = answer.lines().filter_map(|line| {
        let line = line.strip_prefix("  ")?;
        let name = line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("PreDepends: "))?;
        (!name.starts_with('<')).then(|| name.to_owned())
    });
    names.collect()
}

/// Unpacks `packages` below `folder/root`, unless just these are there already.
pub fn unpacked(apt: &Apt, packages: &BTreeSet<String>, folder: &Path) -> Result<PathBuf, VmError> {
    let root = folder.join("root");
    // Says what lies in `root`; written last, so that what was cut short is not taken for whole.
    let stamp = folder.join("packages");
    let wanted: String = packages.iter().map(|p| format!("{p}\n")).collect();
    if fs::read_to_string(&stamp).is_ok_and(|there| there == wanted) {
        return Ok(root);
    }
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(VmError::file(folder))?;
    }
    fs::create_dir_all(&root).map_err(VmError::file(&root))?;
    println!("downloading {}", packages.iter().map(String::as_str).collect::<Vec<_>>().join(" "));
    apt.download(packages, folder)?;
    for entry in fs::read_dir(folder).map_err(VmError::file(folder))? {
        let path = entry.map_err(VmError::file(folder))?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            output(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(&root))?;
            fs::remove_file(&path).map_err(VmError::file(&path))?;
        }
    }
    fs::write(&stamp, wanted).map_err(VmError::file(&stamp))?;
    Ok(root)
}

/// Is there a program of this name on the search path?
pub fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternatives_and_virtual_packages_are_left_out() {
        let answer = "linux-image-7\n  PreDepends: linux-base\n |Depends: dracut\n |Depends: initramfs-tools\n  \
                      Depends: <linux-initramfs-tool>\n    dracut\n  Depends: linux-modules-7\n";
        assert_eq!(dependencies(answer), ["linux-base", "linux-modules-7"]);
    }
}
