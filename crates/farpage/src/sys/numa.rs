//! Memory nodes: which there are, and where memory lies.

use rustix::io::Errno;

const MPOL_BIND: libc::c_int = 2;
/// Bits of the node masks that are handed to the kernel.
const MAX_NODES: u32 = 1024;

/// The nodes that have memory.
pub fn memory_nodes() -> Vec<u32> {
    let text = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let mut nodes = Vec::new();
    for part in text.trim().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.parse::<u32>(), to.parse::<u32>()) {
            nodes.extend(from..=to.min(MAX_NODES));
        }
    }
    nodes
}

/// Bytes of memory that `node` has in all, if the kernel says so.
pub fn memory_of(node: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo")).ok()?;
    let rest = text.lines().find_map(|line| line.split_once("MemTotal:"))?.1;
    rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory for `[addr, addr + len)`, a shared mapping, comes from `node` and from nowhere else; for every process that
/// maps the same file.
pub fn bind_memory(addr: usize, len: usize, node: u32) -> Result<(), Errno> {
    if node >= MAX_NODES {
        return Err(Errno::INVAL);
    }
    let mut mask = [0u64; MAX_NODES as usize / 64];
    mask[node as usize / 64] = 1 << (node % 64);
    // SAFETY: the mask lives across the call; the call changes where memory comes from, not what is in it.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, addr, len, MPOL_BIND, mask.as_ptr(), u64::from(MAX_NODES) + 1, 0)
    };
    if result == 0 { Ok(()) } else { Err(super::last_error()) }
}

/// The node where the page at `addr` lies.
pub fn node_of(addr: usize) -> Result<u32, Errno> {
    let pages = [addr];
    let mut status = [0 as libc::c_int];
    // SAFETY: one page asked about, one answer; without target nodes nothing is moved.
    let result = unsafe {
        libc::syscall(libc::SYS_move_pages, 0, 1usize, pages.as_ptr(), 0usize, status.as_mut_ptr(), 0)
    };
    if result < 0 {
        return Err(super::last_error());
    }
    u32::try_from(status[0]).map_err(|_| Errno::from_raw_os_error(-status[0]))
}
