//! `farpage dax map`: maps a file and says how.

use std::fmt::Write as _;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use farpage::Pin;
use farpage::dax::{Access, DaxError, DaxFile, DaxMapping};
use farpage::size::format_size;

use super::hold::range_of;
use super::look::{HUGE, Huge, huge_pages};
use super::parse::{Part, show};
use super::stay::For;
use super::{DaxCommandError, Opening, extents, open};
use crate::error::{CliError, system};

/// Arguments of `farpage dax map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file.
    file: PathBuf,
    /// Which bytes (each with K, M, G, T), for example 4M:64K; all of them by default.
    #[arg(long, value_name = "OFFSET:LENGTH")]
    range: Option<Part>,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    stay: For,
}

/// Maps it, says how, stays if it is to; the exit status.
pub fn run(args: &Args) -> Result<u8, CliError> {
    // Why it is not DAX is said also where that is accepted.
    let strictly = args.opening.to_look().page_cache(false);
    let (file, why) = match open(&strictly, &args.file) {
        Err(DaxCommandError::NotDax(why)) if args.opening.page_cache => {
            (open(&args.opening.to_look(), &args.file)?, Some(reason(&why)))
        }
        opened => (opened?, None),
    };
    let range = range_of(args.range, &file, "map")?;
    let map = file.map(range).map_err(DaxCommandError::from)?;
    let text = describe(&file, &map, why.as_deref())?;
    // Who closed the output still has it mapped for as long as he asked.
    let _ = std::io::stdout().write_all(text.as_bytes());
    if !args.stay.is_given() {
        return Ok(0);
    }
    let end = args.stay.stay(None);
    drop(map);
    drop(file);
    Ok(end?.exit())
}

/// Why a file is not DAX, without its name and without what was accepted already.
fn reason(why: &DaxError) -> String {
    let why = match why {
        DaxError::NotDax { missing, .. } => missing.to_string(),
        why => why.to_string(),
    };
    why.trim_end_matches(", or accept the page cache").to_owned()
}

fn describe(file: &DaxFile, map: &DaxMapping, why: Option<&str>) -> Result<String, CliError> {
    let range = map.range();
    let len = file.len().map_err(DaxCommandError::from)?;
    // Touched pages stay while they are looked at.
    let _pin = map.pin(0..map.len(), Pin::Short).map_err(DaxCommandError::from)?;
    let stat = rustix::fs::fstat(file.as_fd()).map_err(system("looking at the file failed"))?;
    let data = extents::data(file.as_fd(), range.start..range.end.min(len));
    let data = data.map_err(system("looking for holes failed"))?;
    let addr = map.as_ptr() as usize;
    let mut text = format!("{}\n", file.path().display());
    let mut line = |name: &str, what: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<9} {what}");
    };
    line("length", format_size(len));
    line("access", access(file.access(), why));
    line("blocks", blocks(&range, len, stat.st_blocks as u64 * 512, &data));
    line(
        "mapped",
        format!(
            "{} at {addr:#x}, aligned to {} in the file and {} in memory",
            show(&range),
            alignment(range.start),
            alignment(addr as u64)
        ),
    );
    line("2M pages", huge(huge_pages(addr, range.start, &data)));
    Ok(text)
}

fn access(access: Access, why: Option<&str>) -> String {
    match access {
        Access::Direct { map_sync: true } => {
            "direct (DAX), MAP_SYNC granted: durable when the CPU's caches are written back".into()
        }
        Access::Direct { map_sync: false } => {
            "direct (DAX), MAP_SYNC not granted: making it durable takes a system call".into()
        }
        Access::PageCache => {
            format!("page cache{}", why.map(|why| format!(": {why}")).unwrap_or_default())
        }
    }
}

fn blocks(range: &Range<u64>, len: u64, allocated: u64, data: &[Range<u64>]) -> String {
    let (bytes, of) = (extents::len(data), range.end.min(len) - range.start);
    let parts = match data.len() {
        1 => "1 part".to_owned(),
        n => format!("{n} parts"),
    };
    let holes = if bytes < of { format!("{} of holes", format_size(of - bytes)) } else { "no holes".into() };
    format!(
        "{} of data in {parts}, {holes}; the whole file has {} allocated",
        format_size(bytes),
        format_size(allocated)
    )
}

fn huge(huge: Huge) -> String {
    match huge {
        Huge { possible: 0, .. } => "none: no aligned 2M of data are mapped".into(),
        Huge { possible, mapped } => {
            let why = if mapped == 0 {
                ": the blocks are not aligned to 2M, or the file system has none"
            } else {
                ""
            };
            format!("{} of the {} that could be{why}", format_size(mapped), format_size(possible))
        }
    }
}

/// The largest power of two that divides it, at most 2 MiB.
fn alignment(at: u64) -> String {
    format_size(if at == 0 { HUGE } else { (1 << at.trailing_zeros()).min(HUGE) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_file() {
        assert_eq!(
            blocks(&(0..10 << 20), 10 << 20, 3 << 20, &[0..1 << 20, 4 << 20..6 << 20]),
            "3M of data in 2 parts, 7M of holes; the whole file has 3M allocated"
        );
        assert_eq!(
            blocks(&(4096..8192), 8000, 8192, std::slice::from_ref(&(4096..8000))),
            "3904 of data in 1 part, no holes; the whole file has 8K allocated"
        );
        assert_eq!(
            (alignment(0), alignment(8192), alignment(6 << 20)),
            ("2M".into(), "8K".into(), "2M".into())
        );
        assert_eq!(huge(Huge { possible: 4 << 20, mapped: 2 << 20 }), "2M of the 4M that could be");
    }
}
