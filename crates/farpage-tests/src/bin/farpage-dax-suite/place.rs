//! Where a case runs, and what it may expect there.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use farpage::dax::{DaxFile, DaxOptions, Wait};

use crate::{Outcome, pages};

/// What a file system is expected to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Expect {
    /// DAX: files are opened with the default options.
    Dax,
    /// Not DAX, and the page cache is accepted.
    PageCache,
    /// Not DAX: files are refused, with the reason.
    Refused,
    /// Not a file system, but a device.
    Device,
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dax => "dax",
            Self::PageCache => "page-cache",
            Self::Refused => "refused",
            Self::Device => "device",
        })
    }
}

/// Where a case runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// A directory of its own, empty when it begins.
    pub dir: PathBuf,
    pub expect: Expect,
    /// How long it tries random moments.
    pub seconds: u64,
    pub tables: PathBuf,
    /// Where FUSE is to be mounted, if that matters.
    pub mount: Option<PathBuf>,
    /// A device-dax device.
    pub device: Option<PathBuf>,
}

/// Too short for anybody who holds pages to give them up.
pub fn soon() -> Wait<'static> {
    Wait { timeout: Duration::from_millis(200), stop: None }
}

/// Long enough for anybody who gives pages up at all, also where the CPU is emulated.
pub fn long() -> Wait<'static> {
    Wait { timeout: LONG, stop: None }
}

/// See [`long`].
pub const LONG: Duration = Duration::from_secs(40);

impl Place {
    pub fn options(&self) -> DaxOptions {
        DaxOptions::new().page_cache(self.expect == Expect::PageCache).tables(&self.tables).wait(LONG)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A file of so many pages, filled with [`pages::fill`] of generation 1.
    pub fn file(&self, pages: u64) -> Outcome<DaxFile> {
        let file = self.options().create(self.path("file"))?;
        pages::write(&file, 0..pages, 1)?;
        Ok(file)
    }

    /// The arguments with which another process finds the same place.
    pub fn args(&self) -> Vec<std::ffi::OsString> {
        let mut args = vec![
            "--dir".into(),
            self.dir.clone().into(),
            "--expect".into(),
            self.expect.to_string().into(),
            "--seconds".into(),
            self.seconds.to_string().into(),
            "--tables".into(),
            self.tables.clone().into(),
        ];
        if let Some(mount) = &self.mount {
            args.extend(["--mount".into(), mount.clone().into()]);
        }
        if let Some(device) = &self.device {
            args.extend(["--device".into(), device.clone().into()]);
        }
        args
    }
}
