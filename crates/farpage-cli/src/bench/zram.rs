//! The kernel's swap on a compressed RAM disk with LZ4, set up for a benchmark and always undone.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};

use super::sys;

/// Why there is no swap to compare with.
#[derive(Debug, thiserror::Error)]
pub enum ZramError {
    /// Somebody's swap is active, and would be measured or disturbed.
    #[error(
        "swap is already configured ({0}), which the benchmark must not disturb: turn it off for the time (swapoff {0})"
    )]
    SwapInUse(String),
    /// No zram driver.
    #[error("the kernel has no zram: load it (modprobe zram) or use a kernel built with CONFIG_ZRAM")]
    NoZram,
    /// A device is there but used by somebody else.
    #[error("{0} is in use by somebody else and no other zram device can be added")]
    Busy(PathBuf),
    /// The driver has no LZ4.
    #[error("zram has no lz4 here, only: {0}")]
    NoLz4(String),
    /// A step failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// An active swap device on zram; undone when dropped, also where setting up ends half-way.
pub struct ZramSwap {
    sys: PathBuf,
    node: PathBuf,
    /// The number to give to `hot_remove`, where the device was added for us.
    added: Option<String>,
    /// The node was created by us, on a system that does not create nodes itself.
    made_node: bool,
    old_algorithm: Option<String>,
    configured: bool,
    swapping: bool,
}

impl ZramSwap {
    /// A swap device of `bytes`, with LZ4. Needs root and a system without other swap.
    pub fn new(bytes: u64) -> Result<ZramSwap, ZramError> {
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if let Some(line) = swaps.lines().nth(1) {
            let name = line.split_whitespace().next().unwrap_or(line);
            return Err(ZramError::SwapInUse(name.to_string()));
        }
        let mut zram = find()?;
        zram.start(bytes)?;
        Ok(zram)
    }

    fn start(&mut self, bytes: u64) -> Result<(), ZramError> {
        let algorithms = read(&self.sys.join("comp_algorithm"))?;
        if !algorithms.split_whitespace().any(|a| a.trim_matches(['[', ']']) == "lz4") {
            return Err(ZramError::NoLz4(algorithms.trim().to_string()));
        }
        self.old_algorithm =
            algorithms.split(['[', ']']).nth(1).filter(|_| self.added.is_none()).map(str::to_string);
        self.configured = true;
        write(&self.sys.join("comp_algorithm"), "lz4")?;
        write(&self.sys.join("disksize"), &bytes.to_string())?;
        self.find_node()?;
        write_signature(&self.node, bytes).map_err(io(format!("write to {}", self.node.display())))?;
        sys::swapon(&self.node).map_err(io(format!("swap on {}", self.node.display())))?;
        self.swapping = true;
        Ok(())
    }

    /// Makes the device node, where neither devtmpfs nor udev did.
    fn find_node(&mut self) -> Result<(), ZramError> {
        if fs::metadata(&self.node).is_ok_and(|m| m.file_type().is_block_device()) {
            return Ok(());
        }
        let dev = read(&self.sys.join("dev"))?;
        let (major, minor) = dev.trim().split_once(':').unwrap_or_default();
        let dev = rustix::fs::makedev(major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
        rustix::fs::mknodat(rustix::fs::CWD, &self.node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, dev)
            .map_err(|e| io(format!("make {}", self.node.display()))(e.into()))?;
        self.made_node = true;
        Ok(())
    }

    /// What the device is, in words.
    pub fn describe(&self) -> String {
        format!("{} with lz4", self.node.display())
    }
}

impl Drop for ZramSwap {
    fn drop(&mut self) {
        let mut failures = Vec::new();
        let mut keep =
            |result: Result<(), ZramError>| result.inspect_err(|e| failures.push(e.to_string())).is_ok();
        if self.swapping {
            let off = sys::swapoff(&self.node).map_err(io(format!("swapoff {}", self.node.display())));
            if !keep(off) {
                // Whatever else we did would harm the swap that is still in use.
                let _ = writeln!(io::stderr(), "farpage: {}", failures.join("; "));
                return;
            }
        }
        if self.configured {
            keep(write(&self.sys.join("reset"), "1"));
        }
        if let Some(algorithm) = &self.old_algorithm {
            keep(write(&self.sys.join("comp_algorithm"), algorithm));
        }
        if let Some(number) = &self.added {
            keep(write(Path::new("/sys/class/zram-control/hot_remove"), number));
        }
        if self.made_node {
            let _ = fs::remove_file(&self.node);
        }
        if !failures.is_empty() {
            let _ = writeln!(io::stderr(), "farpage: {}", failures.join("; "));
        }
    }
}

/// A zram device of our own, else the first one if nobody uses it.
fn find() -> Result<ZramSwap, ZramError> {
    let device = |name: &str, added: Option<String>| ZramSwap {
        sys: Path::new("/sys/block").join(name),
        node: Path::new("/dev").join(name),
        added,
        made_node: false,
        old_algorithm: None,
        configured: false,
        swapping: false,
    };
    if let Ok(number) = fs::read_to_string("/sys/class/zram-control/hot_add") {
        let number = number.trim().to_string();
        return Ok(device(&format!("zram{number}"), Some(number)));
    }
    let zram = device("zram0", None);
    if !zram.sys.exists() {
        return Err(ZramError::NoZram);
    }
    match read(&zram.sys.join("disksize"))?.trim() {
        "0" => Ok(zram),
        _ => Err(ZramError::Busy(zram.node.clone())),
    }
}

/// Writes the header that `swapon` looks for (what mkswap writes).
fn write_signature(node: &Path, bytes: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(node)?;
    if !file.metadata()?.file_type().is_block_device() || file.metadata()?.rdev() == 0 {
        return Err(io::Error::other("it is no block device"));
    }
    file.write_all(&signature(bytes))?;
    file.sync_all()
}

/// The first page of a swap area of `bytes`.
fn signature(bytes: u64) -> [u8; 4096] {
    let last_page = u32::try_from(bytes / 4096).unwrap_or(u32::MAX).saturating_sub(1);
    let mut page = [0; 4096];
    page[1024..1028].copy_from_slice(&1u32.to_ne_bytes()); // version
    page[1028..1032].copy_from_slice(&last_page.to_ne_bytes());
    page[1052..1065].copy_from_slice(b"farpage-bench"); // label
    page[4086..].copy_from_slice(b"SWAPSPACE2");
    page
}

fn io(what: String) -> impl FnOnce(io::Error) -> ZramError {
    move |source| ZramError::Io { what, source }
}

fn read(path: &Path) -> Result<String, ZramError> {
    fs::read_to_string(path).map_err(io(format!("read {}", path.display())))
}

fn write(path: &Path, text: &str) -> Result<(), ZramError> {
    fs::write(path, text).map_err(io(format!("write '{text}' to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_where_swapon_looks() {
        let page = signature(1 << 30);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert_eq!(page[1024..1032], [1, 0, 0, 0, 0xff, 0xff, 3, 0]);
    }
}
