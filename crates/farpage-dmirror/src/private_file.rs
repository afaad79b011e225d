//! Pages that a private mapping of a file has for its own: written since they were mapped, they have nothing to do with the
//! file any more. userfaultfd takes no such mapping; so before they move they become what they are, anonymous memory.

use farpage::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};

use crate::user;
use crate::vma::Vma;

/// Replaces `[start, end)` of `vma`, of which every page is this process's own, by anonymous memory with the same bytes.
///
/// # Errors
/// EBUSY while the process has several threads: a write between copy and replacement would be lost.
pub fn make_anonymous(vma: &Vma, start: usize, end: usize) -> Result<(), Errno> {
    // The manager's threads may only just be starting, and not have said yet that they are the manager's.
    let deadline = farpage::sys::now_ms() + 100;
    while program_threads()? > 1 {
        if farpage::sys::now_ms() > deadline {
            return Err(Errno::BUSY);
        }
        farpage::sys::yield_now();
    }
    let len = end - start;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Errno::NOMEM)?;
    bytes.resize(len, 0);
    user::read(start, &mut bytes)?;
    let mut prot = ProtFlags::empty();
    for (has, flag) in
        [(vma.read, ProtFlags::READ), (vma.write, ProtFlags::WRITE), (vma.exec, ProtFlags::EXEC)]
    {
        prot.set(flag, has);
    }
    // SAFETY: the kernel chooses the place of the new mapping, which then takes that of the program's: what the program finds
    // there are the same bytes with the same protection, and no other thread of it looks meanwhile.
    unsafe {
        let new = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )?;
        new.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), len);
        let protected = rustix::mm::mprotect(new, len, to_mprotect(prot));
        let flags = MremapFlags::MAYMOVE;
        if let Err(e) = protected
            .and_then(|()| rustix::mm::mremap_fixed(new, len, len, flags, start as *mut _).map(|_| ()))
        {
            let _gone = rustix::mm::munmap(new, len);
            return Err(e);
        }
    }
    debug_assert!(start.is_multiple_of(PAGE_SIZE));
    Ok(())
}

fn to_mprotect(prot: ProtFlags) -> rustix::mm::MprotectFlags {
    rustix::mm::MprotectFlags::from_bits_retain(prot.bits())
}

/// Threads of the program: all but the manager's.
fn program_threads() -> Result<usize, Errno> {
    use rustix::fs::{Dir, Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = Dir::new(rustix::fs::open("/proc/self/task", flags, Mode::empty())?)?;
    let ids = dir.filter_map(Result::ok).filter_map(|e| e.file_name().to_str().ok()?.parse::<u32>().ok());
    let space = farpage_preload::init::ready();
    Ok(ids.filter(|&tid| space.is_none_or(|s| !s.is_manager_thread(tid))).count())
}
