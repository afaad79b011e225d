//! Copies of many pages that nobody looks at soon: past the caches.
//!
//! An ordinary copy first reads each line that it is about to overwrite, which is a third of the traffic to memory. The C
//! library leaves that out for copies of many megabytes; this does for many single pages.

use crate::{PAGE_SIZE, Page};

use super::SharedArea;

/// A batch of page copies. Dropping it orders them before whatever the thread does next.
pub struct Streaming(());

impl Streaming {
    /// A batch, if so many pages are worth it here: a few are rather left in the caches.
    pub fn of(pages: usize) -> Option<Self> {
        const WORTH_IT: usize = 16;
        (pages >= WORTH_IT && cfg!(target_arch = "x86_64")).then_some(Self(()))
    }

    /// As [`SharedArea::write`], of a page to a multiple of the page size.
    pub fn write(&self, area: SharedArea, offset: usize, page: &Page) {
        assert!(offset.checked_add(PAGE_SIZE).is_some_and(|end| end <= area.len()));
        let to = area.addr() + offset;
        assert!(to.is_multiple_of(16));
        // SAFETY: inside the area and aligned; the rest as in `SharedArea::write`.
        unsafe { copy(page.0.as_ptr(), to as *mut u8) }
    }

    /// As [`SharedArea::read`], of a page.
    pub fn read(&self, area: SharedArea, offset: usize, page: &mut Page) {
        assert!(offset.checked_add(PAGE_SIZE).is_some_and(|end| end <= area.len()));
        // SAFETY: inside the area, a `Page` is aligned to its size; the rest as in `SharedArea::read`.
        unsafe { copy((area.addr() + offset) as *const u8, page.0.as_mut_ptr()) }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86_64 has SSE.
        unsafe {
            std::arch::x86_64::_mm_sfence()
        };
    }
}

/// # Safety
/// A page can be read at `from` and written at `to`, which is a multiple of 16; they do not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn copy(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for line in (0..PAGE_SIZE).step_by(64) {
        // SAFETY: within the page; the target is aligned as the caller promises.
        unsafe {
            let from = from.add(line).cast::<__m128i>();
            let to = to.add(line).cast::<__m128i>();
            let words = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            (0..4).for_each(|i| _mm_stream_si128(to.add(i), words[i]));
        }
    }
}

/// # Safety
/// As above.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(from: *const u8, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE_SIZE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_arrive_whole() {
        let area = SharedArea::anonymous(4 * PAGE_SIZE).unwrap();
        let page = Page(std::array::from_fn(|i| (i * 7 % 251) as u8));
        let mut back = Page([0; PAGE_SIZE]);
        let Some(streaming) = Streaming::of(64) else { return };
        streaming.write(area, 2 * PAGE_SIZE, &page);
        streaming.read(area, 2 * PAGE_SIZE, &mut back);
        drop(streaming);
        assert_eq!(back.0, page.0);
        let mut around = Page([1; PAGE_SIZE]);
        area.read(PAGE_SIZE, &mut around.0);
        assert_eq!(around.0, [0; PAGE_SIZE]);
        assert!(Streaming::of(1).is_none());
    }
}
