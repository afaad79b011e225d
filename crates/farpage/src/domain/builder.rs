//! A domain for one process, made in it: what an embedding program uses.

use rustix::fs::statvfs;

use super::{Config, Domain, DomainError};
use crate::PAGE_SIZE;
use crate::device::Device;
use crate::device::spec::{Spec, SpecError};
use crate::size::{SizeError, format_size, parse_size};

/// The smallest budget that a space works with: a few granules, a stock of free frames and what is being staged.
const MIN_DRAM: u64 = 4 << 20;
/// The most devices: what page entries can name.
const MAX_DEVICES: usize = 16;

/// Why a domain could not be built.
///
/// ```
/// use farpage::{BuildError, Domain};
///
/// assert!(matches!(Domain::builder().dram("1M").build(), Err(BuildError::TooLittle(_))));
/// let error = Domain::builder().device("tape:1G").build().err().unwrap();
/// assert!(error.to_string().starts_with("unknown device `tape:1G` (there are `ram[:SIZE]`, "));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A device's specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The budget is not a size.
    #[error("dram: {0}")]
    Size(#[from] SizeError),
    /// The budget is below the smallest that works.
    #[error("a DRAM budget of {given} is too small: the smallest that works is {min}", given = format_size(*.0), min = format_size(MIN_DRAM))]
    TooLittle(u64),
    /// Too many devices.
    #[error("{0} devices are too many: there can be {MAX_DEVICES}")]
    TooManyDevices(usize),
    /// The domain itself, or a space in it.
    #[error(transparent)]
    Domain(#[from] DomainError),
}

/// Makes a [`Domain`]; see [`Domain::builder`].
///
/// ```
/// let domain = farpage::Domain::builder()
///     .dram_bytes(16 << 20)      // or .dram("16M")
///     .device("ram:32M")         // first choice ...
///     .device("file:/tmp:64M")   // ... and what does not fit there
///     .recycle(false)
///     .max_pinned(4 << 20)
///     .build()?;
/// assert_eq!(domain.pagemaps.len(), 2);
/// assert!(!domain.config.recycle);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Builder {
    dram: Result<u64, SizeError>,
    devices: Vec<Result<Spec, SpecError>>,
    own: Vec<Box<dyn Device>>,
    recycle: bool,
    max_pinned: Option<u64>,
}

impl Domain {
    /// A domain of this process alone. Without further words it has half of the free memory as its budget and one `ram`
    /// device.
    ///
    /// ```
    /// let domain = farpage::Domain::builder().dram("64M").device("ram:256M").build()?;
    /// assert_eq!(domain.config.dram, 64 << 20);
    /// # Ok::<(), farpage::BuildError>(())
    /// ```
    pub fn builder() -> Builder {
        Builder {
            dram: Ok(free_memory() / 2),
            devices: Vec::new(),
            own: Vec::new(),
            recycle: true,
            max_pinned: None,
        }
    }
}

impl Builder {
    /// The most DRAM that the managed memory may occupy: a size such as `64M`.
    #[must_use]
    pub fn dram(mut self, size: &str) -> Self {
        self.dram = parse_size(size);
        self
    }

    /// The same in bytes.
    #[must_use]
    pub fn dram_bytes(mut self, bytes: u64) -> Self {
        self.dram = Ok(bytes);
        self
    }

    /// A device by its specification (`ram:1G`, `file:/scratch`); in order of preference: when one is full the next takes over.
    #[must_use]
    pub fn device(mut self, spec: &str) -> Self {
        self.devices.push(spec.parse());
        self
    }

    /// A device of the program's own, after those by specification.
    ///
    /// See the example of [`Device`].
    #[must_use]
    pub fn own_device(mut self, device: impl Device + 'static) -> Self {
        self.own.push(Box::new(device));
        self
    }

    /// Whether frames of DRAM circulate (the default), which is three times as fast as giving each back to the kernel. What
    /// the kernel is to keep beyond the end of a call (`vmsplice`, `MSG_ZEROCOPY`, io_uring zero-copy sends) must then be
    /// pinned: it takes references that nobody can see, and would deliver what the frame holds later.
    #[must_use]
    pub fn recycle(mut self, recycle: bool) -> Self {
        self.recycle = recycle;
        self
    }

    /// The most bytes that may be pinned at once (default: half of the budget). What is pinned cannot leave DRAM.
    #[must_use]
    pub fn max_pinned(mut self, bytes: u64) -> Self {
        self.max_pinned = Some(bytes);
        self
    }

    /// The domain.
    ///
    /// # Errors
    /// The first word that was wrong, or what could not be set up.
    pub fn build(self) -> Result<Domain, BuildError> {
        let dram = self.dram? / PAGE_SIZE as u64 * PAGE_SIZE as u64;
        if dram < MIN_DRAM {
            return Err(BuildError::TooLittle(dram));
        }
        let mut devices = self.devices.into_iter().collect::<Result<Vec<Spec>, _>>()?;
        if devices.is_empty() && self.own.is_empty() {
            devices.push(Spec::Ram { size: None });
        }
        let n = devices.len() + self.own.len();
        if n > MAX_DEVICES {
            return Err(BuildError::TooManyDevices(n));
        }
        let devices = devices.into_iter().map(sized).collect();
        let max_pinned = self.max_pinned;
        let config = Config {
            dram,
            min_size: 0,
            strict: false,
            verbose: false,
            recycle: self.recycle,
            max_pinned,
            devices,
        };
        Ok(Domain::create_with(&config, self.own)?)
    }
}

/// A device that was given no size gets half of what there is; one that has its memory has its size as well.
fn sized(spec: Spec) -> Spec {
    if spec.size().is_some() {
        return spec;
    }
    let room = match spec.base() {
        Spec::Memory(_) => return spec,
        Spec::File { dir, .. } => statvfs(dir).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize)),
        _ => free_memory(),
    };
    spec.with_size(room / 2)
}

/// Bytes of memory that programs can have without others being swapped out; 1 GiB if the kernel does not say.
fn free_memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(1 << 30, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said() {
        let error = |b: Builder| b.build().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error(Domain::builder().dram("lots")).contains("`lots` is not a size"));
        assert!(error(Domain::builder().dram("1M")).contains("too small"));
        assert!(error(Domain::builder().device("tape:1G")).contains("unknown device `tape"));
        let many = (0..17).fold(Domain::builder(), |b, _| b.device("ram:1M"));
        assert!(error(many).contains("17 devices"));
    }
}
