//! What a new thread reads before its first function runs, which may be managed memory.
//!
//! In a forked child nobody answers faults until the manager's first thread runs. On its way there the C library reads what the
//! program's heap holds: the data of the locale (since glibc 2.35 that of `C.UTF-8`, too), and how the libraries that have
//! thread-local variables and were loaded by `dlopen` are linked. These pages are held while the program forks, so that they are
//! in DRAM, in parent and child. (Of more than 62 such libraries the loader has a further list in the heap, whose place nobody tells.)

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use farpage::PAGE_SIZE;
use farpage::space::range::GRANULE;
use farpage::space::{Hold, Space};

/// Granules in which such places lie, at most; what a program has beyond these is not seen to. (Libraries are linked by small blocks of
/// the heap, which lie side by side.)
const PLACES: usize = 64;
/// Bytes of the C library's structures that are held, from their beginning: more than any of its versions has.
const LOCALE_BYTES: usize = 1024;
const LINK_BYTES: usize = 2048;
/// `LC_GLOBAL_LOCALE` of `locale.h`.
const GLOBAL: libc::locale_t = ptr::without_provenance_mut(usize::MAX);

/// What is held.
pub struct Held {
    _holds: [Option<Hold<'static>>; PLACES],
}

/// Stretches of address space, each in one granule or in a few that lie side by side.
struct Places {
    at: [(usize, usize); PLACES],
    n: usize,
}

impl Places {
    /// What is evicted is evicted by the granule: places in the same one are one.
    fn add(&mut self, at: usize, len: usize) {
        let (start, end) = (at / PAGE_SIZE * PAGE_SIZE, (at + len).next_multiple_of(PAGE_SIZE));
        let near = |(s, e): &(usize, usize)| {
            start / GRANULE <= (e - 1) / GRANULE && s / GRANULE <= (end - 1) / GRANULE
        };
        if let Some(place) = self.at[..self.n].iter_mut().find(|place| near(place)) {
            *place = (place.0.min(start), place.1.max(end));
        } else if self.n < PLACES {
            self.at[self.n] = (start, end);
            self.n += 1;
        }
    }
}

/// As `link.h` has it, and every debugger relies on.
#[repr(C)]
struct LinkMap {
    addr: usize,
    name: *const c_char,
    dynamic: *const c_void,
    next: *const LinkMap,
    previous: *const LinkMap,
}

#[repr(C)]
struct Debug {
    version: c_int,
    first: *const LinkMap,
}

unsafe extern "C" {
    static _r_debug: Debug;
}

/// Called for each library, with the loader's lock held: no library comes or goes.
unsafe extern "C" fn library(info: *mut libc::dl_phdr_info, size: usize, places: *mut c_void) -> c_int {
    // SAFETY: the C library gives a valid structure of `size` bytes, and what `hold` has passed on; the list of
    // libraries changes only under the lock that is held.
    unsafe {
        let (info, places) = (&*info, &mut *places.cast::<Places>());
        let known = std::mem::offset_of!(libc::dl_phdr_info, dlpi_tls_data);
        if size < known || info.dlpi_tls_modid == 0 {
            return 0;
        }
        let mut link = _r_debug.first;
        while let Some(map) = link.as_ref() {
            if map.name == info.dlpi_name && map.addr == info.dlpi_addr as usize {
                places.add(link as usize, LINK_BYTES);
                break;
            }
            link = map.next;
        }
    }
    0
}

/// The data of the locale's character types.
fn locale() -> Option<usize> {
    // SAFETY: a copy of what the process has set, which is our own; its first member is the pointer that is asked for
    // (`bits/types/__locale_t.h`, LC_CTYPE is 0).
    unsafe {
        let copy = libc::duplocale(GLOBAL);
        if copy.is_null() {
            return None;
        }
        let data = *copy.cast::<*const c_void>();
        libc::freelocale(copy);
        Some(data as usize)
    }
}

/// Brings it into DRAM and keeps it there as long as what is returned lives. Without any lock of ours.
pub fn hold(space: &'static Space) -> Held {
    let mut places = Places { at: [(0, 0); PLACES], n: 0 };
    if let Some(data) = locale().filter(|data| *data != 0) {
        places.add(data, LOCALE_BYTES);
    }
    // SAFETY: `places` lives across the call, in which `library` alone uses it.
    unsafe { libc::dl_iterate_phdr(Some(library), ptr::from_mut(&mut places).cast()) };
    let place = |i: usize| {
        let (start, end) = *places.at[..places.n].get(i)?;
        space.manages(start, end).then(|| {
            let hold = space.hold(start, end);
            // One by one: there may be holes between places.
            (start..end).step_by(PAGE_SIZE).for_each(|page| farpage::sys::read_fault(page, PAGE_SIZE));
            hold
        })
    };
    Held { _holds: std::array::from_fn(place) }
}
