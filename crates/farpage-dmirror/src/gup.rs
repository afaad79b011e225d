//! `/sys/kernel/debug/gup_test`: takes and puts references to pages of the process, and says how long that took.

use std::time::Instant;

use farpage::PAGE_SIZE;
use farpage::space::Space;
use farpage::space::pin::{Pin, PinnedRange};
use rustix::io::Errno;

use crate::uapi::{GUP_TEST, GupRequest, is_coherent};
use crate::{pages, user, vma};

const FOLL_WRITE: u32 = 1;
const FOLL_LONGTERM: u32 = 0x100;
/// Of a long-term test.
const USE_WRITE: u32 = 1;

/// One open `gup_test`.
pub struct GupTest {
    space: &'static Space,
    /// What a long-term test has pinned.
    held: Option<Held>,
}

/// Pages that are held.
struct Held {
    ranges: Vec<(usize, usize)>,
    /// Of what farpage manages; the rest nobody of us moves.
    _pins: Vec<PinnedRange<'static>>,
}

impl GupTest {
    /// For this process.
    pub fn new(space: &'static Space) -> Self {
        Self { space, held: None }
    }

    /// Does what is asked, with the structure at `at`.
    pub fn command(&mut self, request: GupRequest, at: usize) -> Result<(), Errno> {
        match request {
            GupRequest::Start => self.start(at),
            GupRequest::Stop => self.held.take().map(drop).ok_or(Errno::INVAL),
            GupRequest::Read => self.read(at),
            _ => self.test(request, at),
        }
    }

    fn test(&mut self, request: GupRequest, at: usize) -> Result<(), Errno> {
        let mut raw = [0u8; GUP_TEST];
        user::read(at, &mut raw)?;
        let long = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| raw[i * 8 + k]));
        let int = |i: usize| u32::from_ne_bytes(std::array::from_fn(|k| raw[32 + i * 4 + k]));
        let (addr, size, per_call, flags) = (long(2) as usize, long(3) as usize, int(0) as usize, int(1));
        let end = addr.checked_add(size).ok_or(Errno::INVAL)?;
        let write = flags & FOLL_WRITE != 0;
        let for_long = request == GupRequest::PinLongTerm || flags & FOLL_LONGTERM != 0;
        let pins = !matches!(request, GupRequest::GetFast | GupRequest::Get);
        let mut held = Vec::new();
        let began = Instant::now();
        let mut next = addr;
        while next < end && per_call > 0 {
            let until = next.saturating_add(per_call.saturating_mul(PAGE_SIZE)).min(end);
            match self.take(next, until, write, pins, for_long) {
                Ok(h) => held.push(h),
                Err(_) => break,
            }
            next = until;
        }
        let got = began.elapsed().as_micros() as u64;
        let began = Instant::now();
        drop(held);
        let put = began.elapsed().as_micros() as u64;
        raw[0..8].copy_from_slice(&got.to_ne_bytes());
        raw[8..16].copy_from_slice(&put.to_ne_bytes());
        raw[24..32].copy_from_slice(&((next - addr) as u64).to_ne_bytes());
        user::write(at, &raw)
    }

    /// Gets the pages of `[start, end)` in as the kernel does for whoever wants references, and pins them.
    fn take(&self, start: usize, end: usize, write: bool, pin: bool, for_long: bool) -> Result<Held, Errno> {
        let (start, end) = (start / PAGE_SIZE * PAGE_SIZE, end.next_multiple_of(PAGE_SIZE));
        let vmas = vma::readable(start, end, Errno::FAULT)?;
        if write && vmas.iter().any(|v| !v.write) {
            return Err(Errno::FAULT);
        }
        if for_long {
            // Memory that its owner must be able to take back is not pinned for long.
            for minor in (0..crate::uapi::MINORS).filter(|&m| is_coherent(m)) {
                pages::to_system(self.space, minor, start, end, &mut true)?;
            }
        }
        user::populate(start, end, write)?;
        let mut pins = Vec::new();
        if pin {
            let kind = if for_long { Pin::LongTerm } else { Pin::Short };
            for (s, e) in self.managed(start, end) {
                pins.push(self.space.pin(s..e, kind, write).map_err(|_| Errno::FAULT)?);
            }
        }
        Ok(Held { ranges: vec![(start, end)], _pins: pins })
    }

    /// What of `[start, end)` farpage manages and has in DRAM.
    fn managed(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let away = self.space.on_devices(start, end);
        let managed = self.space.managed_parts(start, end);
        let parts = managed
            .into_iter()
            .flat_map(|(s, e)| pages::runs(s, e, |at| away.binary_search_by_key(&at, |p| p.addr).is_err()));
        parts.collect()
    }

    fn start(&mut self, at: usize) -> Result<(), Errno> {
        let mut raw = [0u8; 24];
        user::read(at, &mut raw)?;
        let long = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| raw[i * 8 + k])) as usize;
        let flags = u32::from_ne_bytes(std::array::from_fn(|k| raw[16 + k]));
        let (addr, size) = (long(0), long(1));
        if self.held.is_some() || flags & !3 != 0 || size == 0 {
            return Err(Errno::INVAL);
        }
        let end = addr.checked_add(size).ok_or(Errno::INVAL)?;
        if !addr.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        self.held = Some(self.take(addr, end, flags & USE_WRITE != 0, true, true)?);
        Ok(())
    }

    /// The bytes of what is held go to where the number at `at` says.
    fn read(&self, at: usize) -> Result<(), Errno> {
        let mut raw = [0u8; 8];
        user::read(at, &mut raw)?;
        let mut to = u64::from_ne_bytes(raw) as usize;
        let held = self.held.as_ref().ok_or(Errno::INVAL)?;
        let mut page = vec![0u8; PAGE_SIZE];
        for &(start, end) in &held.ranges {
            for at in (start..end).step_by(PAGE_SIZE) {
                user::read(at, &mut page)?;
                user::write(to, &page)?;
                to += PAGE_SIZE;
            }
        }
        Ok(())
    }
}
