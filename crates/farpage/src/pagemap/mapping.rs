//! Mapping device memory: an address range through which the CPU reaches frames, each of which it holds.

use rustix::io::Errno;

use super::{Hold, HoldError, MemoryType, Pagemap};
use crate::PAGE_SIZE;
use crate::device::memory::DeviceMemory;
use crate::frame::ledger::HolderKind;
use crate::frame::{Owner, Pfn};
use crate::sys::SharedMap;

/// Why frames could not be mapped.
///
/// See the example of [`Pagemap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The frames could not be held.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// The type's memory cannot be reached by the CPU.
    #[error("{0:?} memory cannot be mapped")]
    Unreachable(MemoryType),
    /// `P2pDma` memory is mapped only for those who ask for it ([`Pagemap::map_p2p`]).
    #[error("peer-to-peer memory is mapped only on request")]
    OnRequest,
    /// Not a whole number of the memory's frames, or none.
    #[error("{0} bytes are not a whole number of frames of {1} bytes")]
    Length(usize, u64),
    /// The mapping could not be made, or there is no memory for it.
    #[error("cannot map device memory: {0}")]
    Sys(Errno),
}

/// Mapped frames of `Generic`, `Coherent` or `P2pDma` memory; each has one reference for it.
///
/// Dropping it unmaps; the last mapping of a frame gives it back. Mappings of the same frames see the same bytes. A
/// forked child does not inherit it: there it is a range without memory, and its drop does nothing.
///
/// ```
/// use farpage::device::memory::MemorySpec;
/// use farpage::pagemap::{Owner, Pagemap, Registration, SharedArea};
///
/// const ME: Owner = 1;
/// let memory = "coherent:memfd:1M".parse::<MemorySpec>()?.create()?;
/// let counts = SharedArea::anonymous(Pagemap::shared_len(memory.frames()))?;
/// let map = Pagemap::register(Registration::memory(0, memory), counts, true)?;
///
/// let one = map.map_new(ME, 8192, 4096)?;
/// let two = map.map(ME, one.hold().pfn(), 4096)?;
/// assert_eq!((one.len(), two.len(), two.is_empty()), (8192, 4096, false));
/// assert!(one.write(100, b"hello") && !one.write(8190, b"hello"));
/// let mut bytes = [0; 5];
/// assert!(two.read(100, &mut bytes));
/// assert_eq!(&bytes, b"hello");
/// // SAFETY: inside the mapping; nobody writes it meanwhile.
/// assert_eq!(unsafe { two.as_ptr().add(100).read_volatile() }, b'h');
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Mapping<'m> {
    hold: Hold<'m>,
    memory: SharedMap,
}

impl Pagemap {
    /// Allocates `len` bytes of zeros at an offset that is a multiple of `align` bytes (2 MiB for huge pages), and maps
    /// them.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map_new(&self, owner: Owner, len: usize, align: usize) -> Result<Mapping<'_>, MapError> {
        let memory = self.mappable(false)?;
        let frames = frames(memory, len)?;
        let align = (align as u64).div_ceil(memory.frame_size()).clamp(1, 1 << 31) as u32;
        let mapping = map(memory, self.alloc_held(owner, HolderKind::Mapping, frames, align)?)?;
        if memory.must_clear() {
            mapping.clear();
        }
        Ok(mapping)
    }

    /// Maps `len` bytes of frames that are in use, from `pfn` on: one more reference each.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map(&self, owner: Owner, pfn: Pfn, len: usize) -> Result<Mapping<'_>, MapError> {
        let memory = self.mappable(false)?;
        map(memory, self.hold(owner, HolderKind::Mapping, pfn, frames(memory, len)?)?)
    }

    /// As [`Self::map`], also for `P2pDma` memory: for those who know that other devices write it.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map_p2p(&self, owner: Owner, pfn: Pfn, len: usize) -> Result<Mapping<'_>, MapError> {
        let memory = self.mappable(true)?;
        map(memory, self.hold(owner, HolderKind::Mapping, pfn, frames(memory, len)?)?)
    }

    fn mappable(&self, p2p: bool) -> Result<&DeviceMemory, MapError> {
        match self.memory_type {
            MemoryType::P2pDma if !p2p => Err(MapError::OnRequest),
            memory_type => self.device.ops().memory().ok_or(MapError::Unreachable(memory_type)),
        }
    }
}

fn frames(memory: &DeviceMemory, len: usize) -> Result<u32, MapError> {
    let size = memory.frame_size();
    let whole = len > 0 && (len as u64).is_multiple_of(size);
    let frames = whole.then(|| u32::try_from(len as u64 / size).ok()).flatten();
    frames.ok_or(MapError::Length(len, size))
}

/// What is held is given back by `hold` if this fails.
fn map<'m>(memory: &DeviceMemory, hold: Hold<'m>) -> Result<Mapping<'m>, MapError> {
    let size = memory.frame_size();
    let len = hold.len() as usize * size as usize;
    let file = memory.file().get().map_err(MapError::Sys)?;
    let map = SharedMap::new(file, u64::from(hold.pfn()) * size, len).map_err(MapError::Sys)?;
    // Now, and not at the first touch: there it would be a SIGBUS.
    let ready = map.keep_from_children().and_then(|()| map.area(0, len).populate(0, len));
    match ready {
        Ok(()) => Ok(Mapping { hold, memory: map }),
        Err(e) => {
            map.unmap();
            Err(MapError::Sys(e))
        }
    }
}

impl Mapping<'_> {
    /// The first byte. Others may map the same frames: the bytes can change at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.addr() as *mut u8
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether it maps nothing (it never does).
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// What it holds.
    pub fn hold(&self) -> &Hold<'_> {
        &self.hold
    }

    /// Copies bytes out. False: `[offset, offset + out.len())` is not in the mapping, or this is a forked child.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        let inside = self.inside(offset, out.len());
        if inside {
            self.memory.area(0, self.memory.len()).read(offset, out);
        }
        inside
    }

    /// Copies bytes in, as [`Self::read`].
    pub fn write(&self, offset: usize, data: &[u8]) -> bool {
        let inside = self.inside(offset, data.len());
        if inside {
            self.memory.area(0, self.memory.len()).write(offset, data);
        }
        inside
    }

    fn inside(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.memory.len()) && self.hold.is_ours()
    }

    fn clear(&self) {
        (0..self.len()).step_by(PAGE_SIZE).for_each(|at| _ = self.write(at, &[0; PAGE_SIZE]));
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        // Before the references go: nobody reaches a frame without one.
        if self.hold.is_ours() {
            self.memory.unmap();
        }
    }
}
