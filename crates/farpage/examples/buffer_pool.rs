//! A buffer pool: a file's blocks cached in a region larger than DRAM, read by io_uring straight into pinned pages.
//!
//! The frames of the pool are pages of an inline region. While a read is in flight its frame is pinned; at other times the
//! frame is memory like any other: cold ones go out compressed, which is cheaper than to read the file again.
//!
//!     cargo run --release --example buffer_pool [-- FILE_SIZE [DRAM]]      (default: 128M within 16M)

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use farpage::size::parse_size;
use farpage::{Domain, Pin, Region};
use io_uring::{IoUring, opcode, types};

const BLOCK: usize = 64 << 10;

struct Pool {
    frames: Region<u8>,
    /// Whether a block has been read: here each block has a frame of its own.
    present: Vec<bool>,
    ring: IoUring,
    reads: usize,
}

impl Pool {
    /// The bytes of a block.
    fn block(&mut self, file: &File, block: usize) -> Result<&[u8], Box<dyn Error>> {
        let bytes = block * BLOCK..(block + 1) * BLOCK;
        if !self.present[block] {
            // In DRAM, at its address, until the read is done.
            let pin = self.frames.space().pin(self.frames.pages(bytes.clone()), Pin::Short, true)?;
            let read = opcode::Read::new(types::Fd(file.as_raw_fd()), pin.addr() as *mut u8, BLOCK as u32)
                .offset((block * BLOCK) as u64)
                .build();
            // SAFETY: the buffer is pinned until the completion has been seen, and nobody looks at it before.
            unsafe { self.ring.submission().push(&read)? };
            self.ring.submit_and_wait(1)?;
            let done = self.ring.completion().next().ok_or("no completion")?;
            if done.result() != BLOCK as i32 {
                return Err(format!("block {block}: read {}", done.result()).into());
            }
            drop(pin);
            self.present[block] = true;
            self.reads += 1;
        }
        Ok(&self.frames[bytes])
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size = parse_size(&args.next().unwrap_or("128M".into()))? as usize / BLOCK * BLOCK;
    let dram = args.next().unwrap_or("16M".into());

    let mut file = tempfile(size)?;
    let space = Domain::builder().dram(&dram).device("ram").build()?.start_inline()?;
    let blocks = size / BLOCK;
    let mut pool =
        Pool { frames: space.region(size)?, present: vec![false; blocks], ring: IoUring::new(8)?, reads: 0 };
    file.flush()?;
    let mut sum = 0u64;
    // Three walks over the file in different orders; only the first reads it.
    for step in [1, 7, 11] {
        for i in 0..blocks {
            let block = i * step % blocks;
            let bytes = pool.block(&file, block)?;
            if bytes.chunks(8).zip(0..).any(|(word, i)| word != (block as u64 * 1000 + i).to_le_bytes()) {
                return Err(format!("block {block} is not what was written").into());
            }
            sum += u64::from(bytes[0]);
        }
    }
    let stats = space.domain.stats();
    println!(
        "{blocks} blocks of 64K, {} reads of the file for {} uses (sum {sum}); DRAM {} at most, {} pages out, {} in",
        pool.reads,
        3 * blocks,
        farpage::size::format_size(stats.dram_peak),
        stats.pages_out,
        stats.pages_in
    );
    Ok(())
}

/// A file of blocks that can be told apart.
fn tempfile(size: usize) -> Result<File, Box<dyn Error>> {
    let mut file = tempfile::tempfile()?;
    for block in 0..size / BLOCK {
        let words: Vec<u8> =
            (0..BLOCK as u64 / 8).flat_map(|i| (block as u64 * 1000 + i).to_le_bytes()).collect();
        file.write_all(&words)?;
    }
    Ok(file)
}
