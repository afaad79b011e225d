//! Which kernel modules have to be loaded, and in which order.
//!
//! A kernel package that is only unpacked has no `modules.dep`; but each module says itself what it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{VmError, output};

/// What the tests need. Loading these loads what they depend on first.
const NEEDED: [&str; 7] = ["nfit", "nd_pmem", "dax_pmem", "device_dax", "ext4", "xfs", "fuse"];
/// The checksum of ext4 and xfs: asked for by name at run time, so no module lists it. Newer kernels have it built in.
const IF_THERE: [&str; 3] = ["crc32c_intel", "crc32c_generic", "crc32c_cryptoapi"];

/// A module, ready to be loaded.
#[derive(Debug)]
pub struct Module {
    /// With underscores, as the kernel names it.
    pub name: String,
    /// Its code, not compressed.
    pub code: Vec<u8>,
}

/// The modules under `folder` (`…/lib/modules/VERSION`) that the tests need, those first that others depend on.
pub fn ordered(folder: &Path) -> Result<Vec<Module>, VmError> {
    let mut files = BTreeMap::new();
    find(folder, &mut files)?;
    let built_in = built_in(folder);
    let mut order = Order { files, built_in, done: BTreeSet::new(), modules: Vec::new() };
    for name in IF_THERE {
        if order.files.contains_key(name) {
            order.add(name)?;
        }
    }
    for name in NEEDED {
        order.add(name)?;
    }
    Ok(order.modules)
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    done: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn add(&mut self, name: &str) -> Result<(), VmError> {
        if self.built_in.contains(name) || !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            return Err(VmError::Wrong(format!("the kernel's packages have no module `{name}`")));
        };
        let code = code(path)?;
        for needed in depends(&code) {
            self.add(&needed)?;
        }
        self.modules.push(Module { name: name.to_owned(), code });
        Ok(())
    }
}

/// Every module file under `folder`, by the kernel's name of the module.
fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), VmError> {
    for entry in fs::read_dir(folder).map_err(VmError::file(folder))? {
        let entry = entry.map_err(VmError::file(folder))?;
        let path = entry.path();
        if entry.file_type().map_err(VmError::file(&path))?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `…/crc32c-intel.ko.xz` is `crc32c_intel`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// What is no module because the kernel has it anyway.
fn built_in(folder: &Path) -> BTreeSet<String> {
    let list = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    list.lines().filter_map(|line| module_name(Path::new(line))).collect()
}

/// The code of the module at `path`.
fn code(path: &Path) -> Result<Vec<u8>, VmError> {
    if path.extension().is_some_and(|e| e == "xz") {
        // Beside the compressed one, which stays; the kernel's own decompression may not be built in.
        let plain = path.with_extension("");
        if !plain.exists() {
            output(Command::new("xz").args(["--decompress", "--keep"]).arg(path))?;
        }
        return fs::read(&plain).map_err(VmError::file(&plain));
    }
    fs::read(path).map_err(VmError::file(path))
}

/// The modules that a module says it depends on: the text `depends=a,b` between two NULs.
fn depends(code: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = code.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = &code[at + KEY.len()..];
    let end = list.iter().position(|byte| *byte == 0).unwrap_or(list.len());
    let list = String::from_utf8_lossy(&list[..end]);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Result<Vec<String>, VmError> {
        ordered(folder).map(|modules| modules.into_iter().map(|m| m.name).collect())
    }

    #[test]
    fn what_others_depend_on_comes_first_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, depends: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("code\0license=x\0depends={depends}\0name=y\0")).unwrap();
        };
        put("kernel/a/nfit.ko", "libnvdimm");
        put("kernel/a/nd_pmem.ko", "libnvdimm,nd_btt");
        put("kernel/a/nd_btt.ko", "libnvdimm");
        put("kernel/a/libnvdimm.ko", "");
        put("kernel/b/dax_pmem.ko", "libnvdimm");
        put("kernel/b/device_dax.ko", "");
        put("kernel/c/ext4.ko", "jbd2,crc-x");
        put("kernel/c/jbd2.ko", "");
        put("kernel/c/crc-x.ko", "");
        put("kernel/c/crc32c-intel.ko", "");
        put("kernel/c/xfs.ko", "libcrc32c");
        let error = names(folder.path()).unwrap_err().to_string();
        assert!(error.contains("libcrc32c"), "{error}");
        fs::write(folder.path().join("modules.builtin"), "kernel/lib/libcrc32c.ko\nkernel/fs/fuse/fuse.ko\n")
            .unwrap();
        let names = names(folder.path()).unwrap();
        let expected = "crc32c_intel libnvdimm nfit nd_btt nd_pmem dax_pmem device_dax jbd2 crc_x ext4 xfs";
        assert_eq!(names.join(" "), expected);
    }
}
