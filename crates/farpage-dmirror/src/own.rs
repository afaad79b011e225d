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

/// The manager of this process's memory, whose domain has our devices.
///
/// # Errors
/// ENODEV where the domain is somebody else's (`farpage run`), ENOMEM where none can be made: stderr says why.
pub fn space() -> Result<&'static Space, Errno> {
    let make = || {
        let size = memory().clamp(1 << 30, DEVICE);
        let config = Config {
            dram: DRAM,
            // Only what is migrated is managed.
            min_size: u64::MAX,
            strict: false,
            verbose: false,
            // Nobody watches for calls that take plain references.
            recycle: false,
            max_pinned: None,
            devices: vec![Spec::Mem { size }; usize::from(MINORS)],
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

/// Gives back what processes held that were killed.
pub fn reap(space: &Space) {
    space.domain.reap(space.me());
}
