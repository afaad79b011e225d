//! What is tested in the virtual machine.

use super::machine::Nvdimm;
use std::path::Path;

/// Bytes in a mebibyte.
const MIB: u64 = 1 << 20;

/// Something that is tested.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    /// How it is run.
    pub kind: Kind,
}

/// How a scenario is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Commands for the shell of the virtual machine, with the functions of `init.sh`. All of these share one boot.
    Script(&'static str),
    /// The same, as they were given on the command line.
    Commands(String),
    /// Its own boots: one that is cut off, and one that looks what is left.
    PowerLoss,
}

use Kind::{PowerLoss, Script};

/// All of them, in the order in which they are run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "ext4-dax",
        about: "ext4 mounted with -o dax=always",
        kind: Script("file_system ext4 '-b 4096' dax=always dax"),
    },
    Scenario {
        name: "xfs-dax",
        about: "xfs mounted with -o dax=always",
        kind: Script("file_system xfs '-m reflink=0' dax=always dax"),
    },
    Scenario {
        name: "ext4-nodax",
        about: "ext4 mounted with -o dax=never: the page cache is used",
        kind: Script("briefly file_system ext4 '-b 4096' dax=never page-cache"),
    },
    Scenario {
        name: "xfs-nodax",
        about: "xfs mounted with -o dax=never: the page cache is used",
        kind: Script("briefly file_system xfs '-m reflink=0' dax=never page-cache"),
    },
    Scenario {
        name: "ext4-blocksize",
        about: "ext4 with blocks of 1 KiB: the kernel refuses DAX, and so does farpage",
        kind: Script("refuses_dax ext4 '-b 1024'\nfile_system ext4 '-b 1024' defaults refused"),
    },
    Scenario {
        name: "xfs-blocksize",
        about: "xfs with blocks of 1 KiB: the kernel mounts without DAX, farpage refuses",
        kind: Script("file_system xfs '-m reflink=0 -b size=1024' dax=always refused"),
    },
    Scenario { name: "devdax", about: "device-dax, pages of 2 MiB", kind: Script("device_dax dev 2097152") },
    Scenario {
        name: "devdax-4k",
        about: "device-dax, pages of 4 KiB",
        kind: Script("device_dax dev-4k 4096"),
    },
    Scenario {
        name: "devdax-1g",
        about: "device-dax, pages of 1 GiB",
        kind: Script("device_dax dev-1g 1073741824"),
    },
    Scenario {
        name: "powerloss",
        about: "the machine is killed while ext4 and xfs with DAX are written; what was flushed is there",
        kind: PowerLoss,
    },
];

/// The persistent memory for the scripts, by its name.
pub fn nvdimms(folder: &Path) -> Vec<Nvdimm> {
    // A page of 1 GiB needs room for aligning it.
    [("main", 512), ("dev", 256), ("dev-4k", 64), ("dev-1g", 3 * 1024)]
        .map(|(name, mib)| Nvdimm::new(folder, name, mib * MIB))
        .into()
}

/// The persistent memory for power losses.
pub fn power_nvdimms(folder: &Path) -> Vec<Nvdimm> {
    ["power-ext4", "power-xfs"].map(|name| Nvdimm::new(folder, name, 384 * MIB)).into()
}
