//! What this machine has for DAX files.

use std::fs;
use std::path::Path;

use super::Check;

/// Where files can be DAX, and whether their users can be counted.
pub fn checks() -> Vec<Check> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    vec![files(&dax_mounts(&mounts), &persistent_memory()), users()]
}

fn files(mounts: &[String], memory: &[String]) -> Check {
    const NAME: &str = "DAX files";
    if !mounts.is_empty() {
        return Check::ok(NAME, format!("on {}", mounts.join(", ")));
    }
    match memory.first() {
        Some(device) => Check::warning(
            NAME,
            format!("no file system is mounted with DAX; there is {}", memory.join(", ")),
            format!(
                "`mkfs.ext4 -b 4096 {device}` if it is empty (in fsdax mode), and `mount -o dax=always {device} DIR`"
            ),
        ),
        None => Check::warning(
            NAME,
            "no persistent memory (/dev/pmem*), no file system mounted with DAX",
            "'farpage dax' works on any file with --page-cache, for device-dax there is `--device generic:memfd:SIZE`",
        ),
    }
}

/// Mounted file systems with DAX, as `/mnt (ext4, dax=always)`.
fn dax_mounts(mounts: &str) -> Vec<String> {
    let mount = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (place, kind, options) = (words.next()?, words.next()?, words.next()?);
        let dax = options.split(',').find(|o| *o == "dax" || (o.starts_with("dax=") && *o != "dax=never"))?;
        Some(format!("{} ({kind}, {dax})", place.replace("\\040", " ")))
    };
    mounts.lines().filter_map(mount).collect()
}

/// Block devices that are persistent memory, by path.
fn persistent_memory() -> Vec<String> {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> =
        names.filter(|name| is_persistent_memory(name)).map(|n| format!("/dev/{n}")).collect();
    found.sort();
    found
}

/// `pmem0`, `pmem0.1`; also a partition, `pmem0p1`. Not one in sector mode (`pmem0s`), which has no DAX.
fn is_persistent_memory(name: &str) -> bool {
    name.strip_prefix("pmem").is_some_and(|rest| {
        rest.starts_with(|c: char| c.is_ascii_digit())
            && rest.bytes().all(|b| b.is_ascii_digit() || b == b'.' || b == b'p')
    })
}

fn users() -> Check {
    const NAME: &str = "DAX users";
    let shm = Path::new("/dev/shm");
    match rustix::fs::access(shm, rustix::fs::Access::WRITE_OK) {
        // Their names only: looking into a table is seen by those who use it.
        Ok(()) => {
            let names = fs::read_dir(shm).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let n = names.filter(|name| name.to_string_lossy().starts_with("farpage-dax-")).count();
            Check::ok(NAME, format!("counted in /dev/shm: {n} files in use"))
        }
        Err(e) => Check::warning(
            NAME,
            format!("/dev/shm cannot be used ({e})"),
            "DAX files cannot be opened: `mount -t tmpfs -o mode=1777 tmpfs /dev/shm`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn mounts_with_dax_are_found() {
        let mounts = "/dev/vda / ext4 rw,relatime 0 0\n\
                      /dev/pmem0 /mnt/a\\040b ext4 rw,relatime,dax=always 0 0\n\
                      /dev/pmem1 /x xfs rw,attr2,dax=never 0 0\n\
                      /dev/pmem2 /y xfs rw,dax=inode,inode64 0 0\n\
                      fs /v virtiofs rw,dax 0 0\nshort line\n";
        let found = dax_mounts(mounts);
        assert_eq!(found, ["/mnt/a b (ext4, dax=always)", "/y (xfs, dax=inode)", "/v (virtiofs, dax)"]);
        assert_eq!(files(&found, &[]).outcome, Outcome::Ok);
        let unmounted = files(&[], &["/dev/pmem0".into()]);
        assert!(unmounted.remedy.is_some_and(|r| r.contains("mount -o dax=always /dev/pmem0")));
    }

    #[test]
    fn names_of_persistent_memory() {
        assert!(["pmem0", "pmem12.1", "pmem0p2"].iter().all(|name| is_persistent_memory(name)));
        assert!(!["pmem", "pmem0s", "pmemx", "sda", "xpmem0"].iter().any(|name| is_persistent_memory(name)));
    }
}
