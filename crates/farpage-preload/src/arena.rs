//! The manager's own memory: stacks of its threads and its heap, in one reserved stretch of address space, so that
//! one comparison tells whether a pointer, or the thread that runs, is the manager's.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// Bytes of a manager thread's stack.
pub const STACK: usize = 256 << 10;
/// Manager threads at most.
const STACKS: usize = 16;
/// Address space reserved. Takes no memory.
const RESERVED: usize = 16 << 30;
/// The heap grows by this.
const GROW: usize = 1 << 20;

static BASE: AtomicUsize = AtomicUsize::new(0);
static BRK: AtomicUsize = AtomicUsize::new(0);
static NEXT_STACK: AtomicUsize = AtomicUsize::new(0);
/// While the manager starts a thread: what the C library allocates for it comes from here.
static STARTING: AtomicU32 = AtomicU32::new(0);

/// Reserves the arena on first use.
fn base() -> usize {
    let base = BASE.load(Ordering::Acquire);
    if base != 0 {
        return base;
    }
    // SAFETY: the kernel chooses the address.
    let new = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            RESERVED,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    let Ok(new) = new else {
        farpage::sys::fatal("cannot reserve address space (is a limit set? see `ulimit -v`)")
    };
    match BASE.compare_exchange(0, new as usize, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            BRK.store(new as usize + STACKS * STACK, Ordering::Release);
            new as usize
        }
        Err(other) => {
            // SAFETY: ours, and nobody else has seen it.
            let _unmapped = unsafe { rustix::mm::munmap(new, RESERVED) };
            // The winner publishes the break right after the base.
            while BRK.load(Ordering::Acquire) == 0 {
                std::hint::spin_loop();
            }
            other
        }
    }
}

/// Whether a pointer is into the arena.
pub fn holds(p: usize) -> bool {
    p.wrapping_sub(BASE.load(Ordering::Relaxed)) < RESERVED
}

/// Whether the calling thread is the manager's, or acts for it: its allocations are then the arena's.
pub fn is_manager() -> bool {
    let here = 0u8;
    let sp = std::ptr::from_ref(&here) as usize;
    sp.wrapping_sub(BASE.load(Ordering::Relaxed)) < STACKS * STACK || STARTING.load(Ordering::Relaxed) != 0
}

/// Runs `f` as the manager. Only while the process has one thread, or on a manager thread.
pub fn as_manager<R>(f: impl FnOnce() -> R) -> R {
    base();
    STARTING.fetch_add(1, Ordering::SeqCst);
    let r = f();
    STARTING.fetch_sub(1, Ordering::SeqCst);
    r
}

/// A stack for a manager thread: lowest address.
pub fn stack() -> Option<usize> {
    let i = NEXT_STACK.fetch_add(1, Ordering::Relaxed);
    if i >= STACKS {
        return None;
    }
    let at = base() + i * STACK;
    // The lowest page stays inaccessible: a guard.
    open(at + 4096, STACK - 4096).then_some(at + 4096)
}

fn open(at: usize, len: usize) -> bool {
    // SAFETY: within the reservation, which is ours.
    unsafe { rustix::mm::mprotect(at as *mut _, len, MprotectFlags::READ | MprotectFlags::WRITE) }.is_ok()
}

/// Where dlmalloc gets memory: the arena, upwards.
struct Grow;

// SAFETY: hands out disjoint, zeroed, readable and writable ranges that are never reused for anything else.
unsafe impl dlmalloc::Allocator for Grow {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let end = base() + RESERVED;
        // What does not fit takes nothing away from what does.
        let fits = |at: usize| {
            let size = size.checked_next_multiple_of(GROW)?;
            at.checked_add(size).filter(|&next| next <= end)
        };
        let Ok(at) = BRK.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) else {
            return (std::ptr::null_mut(), 0, 0);
        };
        let size = size.next_multiple_of(GROW);
        if !open(at, size) {
            return (std::ptr::null_mut(), 0, 0);
        }
        (at as *mut u8, size, 0)
    }
    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        std::ptr::null_mut()
    }
    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }
    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }
    fn can_release_part(&self, _: u32) -> bool {
        false
    }
    fn allocates_zeros(&self) -> bool {
        true
    }
    fn page_size(&self) -> usize {
        4096
    }
}

/// The manager's heap. A forked child begins a new one above its parent's ([`renew`]) instead of having the parent's
/// locked across the fork: the parent's handler has to read the kernel's announcement of that very fork, and must not
/// wait for the heap before it does.
pub struct Heap {
    lock: AtomicU32,
    heap: UnsafeCell<dlmalloc::Dlmalloc<Grow>>,
    /// Blocks below this are of a process that this one was forked from: read and written, never freed.
    floor: AtomicUsize,
}

// SAFETY: the heap is touched only under the lock.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap {
    lock: AtomicU32::new(0),
    heap: UnsafeCell::new(dlmalloc::Dlmalloc::new_with_allocator(Grow)),
    floor: AtomicUsize::new(0),
};

impl Heap {
    fn with<R>(&self, f: impl FnOnce(&mut dlmalloc::Dlmalloc<Grow>) -> R) -> R {
        // Acquire pairs with the Release below.
        while self.lock.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            farpage::sys::yield_now();
        }
        // SAFETY: we hold the lock.
        let r = f(unsafe { &mut *self.heap.get() });
        self.lock.store(0, Ordering::Release);
        r
    }

    fn inherited(&self, p: *mut u8) -> bool {
        (p as usize) < self.floor.load(Ordering::Relaxed)
    }
}

/// In a forked child, before anything is allocated: a new heap, and the stacks of the parent's threads are free.
///
/// # Safety
/// The caller is the only thread of the process.
pub unsafe fn renew() {
    NEXT_STACK.store(0, Ordering::Relaxed);
    HEAP.floor.store(BRK.load(Ordering::Relaxed), Ordering::Relaxed);
    // SAFETY: no other thread. The parent's heap may have been in the middle of a change: it is not looked at.
    unsafe { HEAP.heap.get().write(dlmalloc::Dlmalloc::new_with_allocator(Grow)) };
    HEAP.lock.store(0, Ordering::Release);
}

// SAFETY: dlmalloc does what `GlobalAlloc` asks for; the lock makes it safe for threads.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is dlmalloc's.
        self.with(|h| unsafe { h.malloc(l.size(), l.align()) })
    }
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        if self.inherited(p) {
            return;
        }
        // SAFETY: as above.
        self.with(|h| unsafe { h.free(p, l.size(), l.align()) });
    }
    unsafe fn alloc_zeroed(&self, l: Layout) -> *mut u8 {
        // SAFETY: as above.
        self.with(|h| unsafe { h.calloc(l.size(), l.align()) })
    }
    unsafe fn realloc(&self, p: *mut u8, l: Layout, new: usize) -> *mut u8 {
        if self.inherited(p) {
            // SAFETY: `new` is not 0, as the caller's contract says, and both blocks have what is copied.
            unsafe {
                let q = self.alloc(Layout::from_size_align_unchecked(new, l.align()));
                if !q.is_null() {
                    q.copy_from_nonoverlapping(p, l.size().min(new));
                }
                return q;
            }
        }
        // SAFETY: as above.
        self.with(|h| unsafe { h.realloc(p, l.size(), l.align(), new) })
    }
}

/// Bytes before a block that C code asked for: its size and what it is aligned to.
const HEADER: usize = 16;

/// `malloc` for the C library on a manager thread.
pub fn c_alloc(size: usize, align: usize, zeroed: bool) -> *mut libc::c_void {
    let align = align.max(HEADER);
    let Ok(layout) = Layout::from_size_align(size.saturating_add(align), align) else {
        return std::ptr::null_mut();
    };
    // SAFETY: the layout is valid and not empty; the header lies in the first `align` bytes of the block.
    unsafe {
        let p = if zeroed { HEAP.alloc_zeroed(layout) } else { HEAP.alloc(layout) };
        if p.is_null() {
            return p.cast();
        }
        let user = p.add(align);
        user.sub(HEADER).cast::<usize>().write(size);
        user.sub(8).cast::<usize>().write(align);
        user.cast()
    }
}

/// What was asked for.
///
/// # Safety
/// `p` is from [`c_alloc`].
pub unsafe fn c_size(p: *mut libc::c_void) -> usize {
    // SAFETY: the header is there.
    unsafe { p.cast::<u8>().sub(HEADER).cast::<usize>().read() }
}

/// # Safety
/// `p` is from [`c_alloc`] and not used again.
pub unsafe fn c_free(p: *mut libc::c_void) {
    // SAFETY: the header is there, and describes the block.
    unsafe {
        let (size, align) = (c_size(p), p.cast::<u8>().sub(8).cast::<usize>().read());
        let layout = Layout::from_size_align_unchecked(size + align, align);
        HEAP.dealloc(p.cast::<u8>().sub(align), layout);
    }
}
