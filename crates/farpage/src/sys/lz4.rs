//! LZ4 blocks: the C library, called without any allocation of memory.
//!
//! C `lz4` and not `lz4_flex`: compression costs about the same, but a page with long matches is
//! decompressed 3 to 10 times faster (measured: `cargo bench --bench device`).

use std::ffi::{c_char, c_int, c_void};

use lz4_sys::LZ4_decompress_safe;

/// Bytes of working memory that [`compress`] needs (`sizeof(LZ4_stream_t)` of lz4 1.10).
pub const STATE_LEN: usize = 16416;

unsafe extern "C" {
    // Part of lz4's static library interface, which `lz4_sys` links but does not declare.
    fn LZ4_compress_fast_extState(
        state: *mut c_void,
        source: *const c_char,
        dest: *mut c_char,
        source_size: c_int,
        max_dest_size: c_int,
        acceleration: c_int,
    ) -> c_int;
}

/// Working memory of [`compress`]; any contents will do.
#[repr(C, align(8))]
pub struct State(pub [u8; STATE_LEN]);

/// Compresses `input` into `out`; the compressed length, or `None` if it does not fit there.
pub fn compress(state: &mut State, input: &[u8], out: &mut [u8]) -> Option<usize> {
    let (n, cap) = (c_int::try_from(input.len()).ok()?, c_int::try_from(out.len()).ok()?);
    // SAFETY: state has the size and the alignment of LZ4_stream_t; both buffers have the lengths given.
    let len = unsafe {
        LZ4_compress_fast_extState(
            (&raw mut *state).cast(),
            input.as_ptr().cast(),
            out.as_mut_ptr().cast(),
            n,
            cap,
            1,
        )
    };
    usize::try_from(len).ok().filter(|&len| len > 0)
}

/// Decompresses `input` into `out`; the length, or `None` if `input` is not a valid block that fits.
/// Never reads or writes outside the two, whatever the input.
pub fn decompress(input: &[u8], out: &mut [u8]) -> Option<usize> {
    let (n, cap) = (c_int::try_from(input.len()).ok()?, c_int::try_from(out.len()).ok()?);
    // SAFETY: both buffers have the lengths given; the function checks every access against them.
    let len = unsafe { LZ4_decompress_safe(input.as_ptr().cast(), out.as_mut_ptr().cast(), n, cap) };
    usize::try_from(len).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusal() {
        let mut state = Box::new(State([0xa5; STATE_LEN]));
        let page: Vec<u8> = (0..4096u32).map(|i| (i % 61) as u8).collect();
        let mut out = [0; 4096];
        let len = compress(&mut state, &page, &mut out).unwrap();
        assert!(len < 400, "{len}");
        let mut back = [0; 4096];
        assert_eq!(decompress(&out[..len], &mut back), Some(4096));
        assert_eq!(back[..], page[..]);
        // Too small a target, a cut block, nonsense: refused.
        assert_eq!(compress(&mut state, &page, &mut out[..20]), None);
        assert_eq!(decompress(&out[..len], &mut back[..4000]), None);
        assert_ne!(decompress(&out[..len - 7], &mut back), Some(4096));
        assert_eq!(decompress(&[0xff; 100], &mut back), None);
    }

    #[test]
    fn the_state_is_large_enough() {
        // SAFETY: a null buffer of this size is refused without being touched; a buffer that is too small
        // would be refused too, so ask with a real one.
        let mut state = Box::new(State([0; STATE_LEN]));
        unsafe extern "C" {
            fn LZ4_sizeofState() -> c_int;
        }
        // SAFETY: takes and touches nothing.
        assert_eq!(unsafe { LZ4_sizeofState() }, STATE_LEN as c_int);
        assert!(compress(&mut state, &[0; 4096], &mut [0; 64]).is_some());
    }
}
