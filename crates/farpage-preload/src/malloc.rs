//! malloc and its family: mimalloc over managed ranges; for the manager's own threads, the arena.

use std::ptr::null_mut;

use libc::{c_int, c_void, size_t};
use libmimalloc_sys as mi;

use crate::arena;

fn enomem(p: *mut c_void) -> *mut c_void {
    if p.is_null() {
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
    }
    p
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: size_t) -> *mut c_void {
    if arena::is_manager() {
        return arena::c_alloc(size, 16, false);
    }
    // SAFETY: mimalloc's contract is C's; so below.
    unsafe { mi::mi_malloc(size) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(n: size_t, size: size_t) -> *mut c_void {
    if arena::is_manager() {
        return n.checked_mul(size).map_or(null_mut(), |s| arena::c_alloc(s, 16, true));
    }
    // SAFETY: as in `malloc`.
    unsafe { mi::mi_calloc(n, size) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(p: *mut c_void) {
    // SAFETY: a pointer into the arena is from `c_alloc`, any other from mimalloc.
    unsafe {
        if arena::holds(p as usize) {
            arena::c_free(p);
        } else {
            mi::mi_free(p);
        }
    }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(p: *mut c_void, size: size_t) -> *mut c_void {
    let manager = arena::is_manager();
    if !manager && !arena::holds(p as usize) {
        // SAFETY: as in `malloc`.
        return unsafe { mi::mi_realloc(p, size) };
    }
    // Between arena and heap, or within the arena: by hand.
    // SAFETY: sizes are those of the blocks; old and new do not overlap.
    unsafe {
        let new = malloc(size);
        if !new.is_null() && !p.is_null() {
            std::ptr::copy_nonoverlapping(p.cast::<u8>(), new.cast::<u8>(), malloc_usable_size(p).min(size));
            free(p);
        }
        new
    }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(p: *mut c_void, n: size_t, size: size_t) -> *mut c_void {
    match n.checked_mul(size) {
        // SAFETY: the caller's contract.
        Some(s) => unsafe { realloc(p, s) },
        None => enomem(null_mut()),
    }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    if arena::is_manager() {
        return arena::c_alloc(size, align, false);
    }
    // SAFETY: as in `malloc`.
    unsafe { mi::mi_malloc_aligned(size, align) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    // SAFETY: the caller's contract.
    enomem(unsafe { memalign(align, size) })
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: size_t, size: size_t) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    // SAFETY: the caller's contract.
    unsafe {
        let p = memalign(align, size);
        if p.is_null() {
            return libc::ENOMEM;
        }
        *out = p;
    }
    0
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn valloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe { memalign(farpage::PAGE_SIZE, size) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvalloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe { memalign(farpage::PAGE_SIZE, size.next_multiple_of(farpage::PAGE_SIZE)) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(p: *mut c_void) -> size_t {
    // SAFETY: as in `free`.
    unsafe {
        if p.is_null() {
            0
        } else if arena::holds(p as usize) {
            arena::c_size(p)
        } else {
            mi::mi_usable_size(p)
        }
    }
}
