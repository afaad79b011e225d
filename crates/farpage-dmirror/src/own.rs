//! The domain of a process that was started without one: made when the first device is opened.

use farpage::device::spec::Spec;
use farpage::domain::{Config, Domain};
use farpage::space::Space;
use farpage_preload::init;
use rustix::io::Errno;

use crate::uapi::MINORS;

/// No budget: nothing leaves DRAM but what the program migrates.
const DRAM: u64 = 1 << 46;
/// Bytes of a device, at most; it takes memory only for what is on it.
const DEVICE: u64 = 64 << 30;

/// Bytes of each device, if not as many as the machine has: `64M`.
const ENV_SIZE: &str = "FARPAGE_DMIRROR_SIZE";

fn device() -> Result<Spec, Errno> {
    let Ok(size) = std::env::var(ENV_SIZE) else {
        return Ok(Spec::Mem { size: memory().clamp(1 << 30, DEVICE) });
    };
    format!("mem:{size}").parse().map_err(|e| {
        farpage::sys::say(&format!("no HMM test device: {ENV_SIZE}: {e}"));
        Errno::INVAL
    })
}

/// The manager of this process's memory, whose domain has our devices.
///
/// # Errors
/// ENODEV where the domain is somebody else's (`farpage run`), EINVAL for a size that is none, ENOMEM where none can be made:
/// stderr says why.
pub fn space() -> Result<&'static Space, Errno> {
    if let Some(space) = init::ready().filter(|space| is_ours(space)) {
        return Ok(space);
    }
    let device = device()?;
    let make = || {
        let config = Config {
            dram: DRAM,
            // Only what is migrated is managed.
            min_size: u64::MAX,
            strict: false,
            verbose: false,
            // Nobody watches for calls that take plain references.
            recycle: false,
            max_pinned: None,
            devices: vec![device; usize::from(MINORS)],
        };
        let space = Domain::create(&config).and_then(Space::new)?;
        space.set_fault_around(false);
        Ok(space)
    };
    match init::begin(make) {
        Ok(Some(space)) if is_ours(space) => Ok(space),
        Ok(_) => Err(Errno::NODEV),
        Err(e) => {
            farpage::sys::say(&format!("no HMM test device: {e}"));
            Err(Errno::NOMEM)
        }
    }
}

fn is_ours(space: &Space) -> bool {
    let c = &space.domain.config;
    c.dram == DRAM && c.devices.len() == usize::from(MINORS)
}

/// Bytes of memory in the machine.
fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// Gives back what processes held that were killed; returns how many there were.
pub fn reap(space: &Space) -> usize {
    space.domain.reap(space.me())
}
