//! Regions: owned ranges of a space, larger than DRAM, used like a slice.

mod adopted;

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, RangeBounds};
use std::ptr::NonNull;

use bytemuck::Zeroable;
use rustix::io::Errno;

use crate::PAGE_SIZE;
use crate::fault::inline;
use crate::space::{FaultMode, Running};
use crate::sys;

pub use adopted::Adopted;

/// Why there is no region, or not one of that length.
///
/// ```
/// let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
/// let error = space.region::<u64>(usize::MAX).unwrap_err();
/// assert!(matches!(error, farpage::RegionError::TooLong(_)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// The length in bytes does not fit the address space.
    #[error("{0} elements are more than the address space holds")]
    TooLong(usize),
    /// The kernel gives no address space, or does not let it be managed.
    #[error("cannot {what} {bytes} bytes: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// The reason.
        source: Errno,
    },
}

/// A range of `len` elements that lives in its space: in DRAM as far as the budget goes, on devices beyond. It is a slice;
/// touching a page brings it in. Elements begin as zeros.
///
/// A forked child does not have it.
///
/// ```
/// let space = farpage::Domain::builder().dram("8M").device("ram:64M").build()?.start_inline()?;
/// let mut v = space.region::<u64>(4 << 20)?; // 32 MiB
/// v.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
/// assert_eq!(v[2 << 20], 2 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Region<T> {
    space: Running,
    start: usize,
    /// Bytes mapped: whole pages.
    mapped: usize,
    len: usize,
    _owns: PhantomData<T>,
}

impl Running {
    /// A region of `len` zeros. Nothing of it takes memory before it is touched.
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
    /// let pixels = space.region::<[f32; 4]>(1 << 16)?;
    /// assert!(pixels.iter().all(|p| *p == [0.0; 4]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn region<T: Zeroable + Copy>(&self, len: usize) -> Result<Region<T>, RegionError> {
        Region::new(self, len)
    }

    /// A region with the elements `f(0)`, `f(1)`, ….
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
    /// let squares = space.region_from_fn(1000, |i| (i * i) as u32)?;
    /// assert_eq!(squares[31], 961);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn region_from_fn<T: Zeroable + Copy>(
        &self,
        len: usize,
        f: impl FnMut(usize) -> T,
    ) -> Result<Region<T>, RegionError> {
        let mut region = Region::new(self, len)?;
        let mut f = f;
        region.iter_mut().enumerate().for_each(|(i, x)| *x = f(i));
        Ok(region)
    }
}

impl<T: Zeroable + Copy> Region<T> {
    const FITS: () = assert!(align_of::<T>() <= PAGE_SIZE && size_of::<T>() > 0);

    fn new(space: &Running, len: usize) -> Result<Self, RegionError> {
        let () = Self::FITS;
        let mapped = bytes::<T>(len)?;
        let start = sys::map_anonymous(mapped).map_err(failed("map", mapped))?;
        let region = Self { space: space.clone(), start, mapped, len, _owns: PhantomData };
        // From here on dropping the region unmaps it.
        sys::keep_from_children(start, mapped).map_err(failed("keep from children", mapped))?;
        region.manage(start, start + mapped)?;
        region.serve()?;
        Ok(region)
    }

    fn manage(&self, start: usize, end: usize) -> Result<(), RegionError> {
        self.space.change(|world| self.space.add(world, start, end)).map_err(failed("manage", end - start))
    }

    fn serve(&self) -> Result<(), RegionError> {
        match self.space.mode() {
            FaultMode::Threaded => Ok(()),
            FaultMode::Inline => inline::serve(self.start, self.start + self.mapped, self.space.shared())
                .map_err(failed("handle the faults of", self.mapped)),
        }
    }

    /// Makes it longer or shorter; new elements are zeros. It may move: it is a new slice afterwards.
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
    /// let mut v = space.region_from_fn(1000, |_| 7u16)?;
    /// v.resize(1 << 20)?;
    /// assert_eq!((v[999], v[1000], v.len()), (7, 0, 1 << 20));
    /// v.resize(10)?;
    /// assert_eq!(v[..], [7; 10]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`RegionError`]; the region is as it was then.
    pub fn resize(&mut self, len: usize) -> Result<(), RegionError> {
        let mapped = bytes::<T>(len)?;
        if len < self.len {
            // What stays mapped of the part that is cut off begins as zeros, should it come back.
            let n = (mapped - len * size_of::<T>()).div_ceil(size_of::<T>());
            let end = (len + n).min(self.len);
            self[len..end].fill(T::zeroed());
        }
        if mapped != self.mapped {
            self.remap(mapped)?;
        }
        self.len = len;
        Ok(())
    }

    fn remap(&mut self, mapped: usize) -> Result<(), RegionError> {
        let old = (self.start, self.mapped);
        if self.space.mode() == FaultMode::Inline {
            inline::unserve(self.start);
        }
        let moved = self.space.change(|world| {
            self.space.remap(world, old, mapped, None, false, |from, len, new_len, to| {
                sys::remap(from, len, new_len, to)
            })
        });
        if let Ok(to) = moved {
            (self.start, self.mapped) = (to, mapped);
        }
        self.serve()?;
        moved.map(drop).map_err(failed("resize to", mapped))
    }
}

impl<T> Region<T> {
    /// The space it lives in.
    ///
    /// ```
    /// # let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
    /// let v = space.region::<u8>(1)?;
    /// drop(space); // the region keeps it alive
    /// let other = v.space().region::<u8>(1)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn space(&self) -> &Running {
        &self.space
    }

    /// The addresses of the whole pages that hold these elements: what [`Space::pin`](crate::space::Space::pin),
    /// [`Space::migrate`](crate::space::Space::migrate) and the like are given. Panics, as slices do, where there are no such elements.
    ///
    /// ```
    /// let space = farpage::Domain::builder().dram("8M").device("ram:64M").build()?.start_inline()?;
    /// let region = space.region::<u64>(4096)?;
    /// assert_eq!(region.pages(..).len(), 8 * 4096);
    /// assert_eq!(region.pages(511..513).len(), 2 * 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pages(&self, elements: impl RangeBounds<usize>) -> std::ops::Range<usize> {
        let (from, to) = (elements.start_bound().cloned(), elements.end_bound().cloned());
        let elements = &self[(from, to)];
        let start = elements.as_ptr() as usize;
        let end = start + size_of_val(elements);
        start / PAGE_SIZE * PAGE_SIZE..end.next_multiple_of(PAGE_SIZE)
    }

    /// The addresses it occupies: whole pages.
    ///
    /// ```
    /// # let space = farpage::Domain::builder().dram("8M").build()?.start_inline()?;
    /// let v = space.region::<u8>(5000)?;
    /// assert_eq!((v.addresses().start, v.addresses().len()), (v.as_ptr() as usize, 8192));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn addresses(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.mapped
    }
}

fn bytes<T>(len: usize) -> Result<usize, RegionError> {
    let bytes = len.checked_mul(size_of::<T>()).and_then(|b| b.checked_next_multiple_of(PAGE_SIZE));
    let bytes = bytes.filter(|&b| b < crate::domain::ADDRESS_LIMIT).ok_or(RegionError::TooLong(len))?;
    Ok(bytes.max(PAGE_SIZE))
}

fn failed(what: &'static str, bytes: usize) -> impl FnOnce(Errno) -> RegionError {
    move |source| RegionError::Kernel { what, bytes, source }
}

impl<T> Deref for Region<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping has room for `len` elements, is aligned to a page and is ours alone; its bytes are zeros or
        // what was stored through `deref_mut`, either of which is a valid `T: Zeroable + Copy`. Whether a page is in DRAM
        // cannot be told from here.
        unsafe { std::slice::from_raw_parts(self.start as *const T, self.len) }
    }
}

impl<T> DerefMut for Region<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; `&mut self` keeps others away.
        unsafe {
            NonNull::slice_from_raw_parts(NonNull::new_unchecked(self.start as *mut T), self.len).as_mut()
        }
    }
}

impl<T> Drop for Region<T> {
    fn drop(&mut self) {
        if !self.space.is_mine() {
            return; // in a forked child it is not here
        }
        if self.space.mode() == FaultMode::Inline {
            inline::unserve(self.start);
        }
        let (start, end) = (self.start, self.start + self.mapped);
        let unmapped =
            self.space.change(|world| self.space.unmap(world, start, end, || sys::unmap(start, end - start)));
        debug_assert!(unmapped.is_ok());
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Region<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("addresses", &self.addresses()).field("len", &self.len).finish()
    }
}
