//! An archive in the "newc" format of cpio, which the kernel unpacks as its first file system.

use std::collections::BTreeSet;
use std::path::Path;

use super::error::VmError;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// An archive that is being written.
#[derive(Debug, Default, Clone)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    /// Adds a folder and those above it. Paths have no slash in front.
    pub fn folder(&mut self, path: &str) {
        if path.is_empty() || self.folders.contains(path) {
            return;
        }
        self.above(path);
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER, &[]);
    }

    /// Adds a file that nobody runs.
    pub fn file(&mut self, path: &str, data: &[u8]) {
        self.above(path);
        self.entry(path, FILE, data);
    }

    /// Adds a program.
    pub fn program(&mut self, path: &str, data: &[u8]) {
        self.above(path);
        self.entry(path, PROGRAM, data);
    }

    /// Adds the program that lies at `from` on this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<(), VmError> {
        let data = std::fs::read(from).map_err(VmError::file(from))?;
        self.program(path, &data);
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn above(&mut self, path: &str) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let links = if mode == FOLDER { 2 } else { 1 };
        // The numbers, 8 digits each: inode, mode, owner, group, links, time, size, device of the file and the
        // device that it is (2 each), length of the name with its NUL, checksum (unused).
        let numbers =
            [self.entries, mode, 0, 0, links, 0, data.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for number in numbers {
            self.bytes.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_and_every_data_starts_at_a_multiple_of_four() {
        let mut archive = Archive::default();
        archive.file("a/b/c", b"12345");
        archive.program("a/p", b"#!");
        let bytes = archive.finish();
        let mut at = 0;
        let mut seen = Vec::new();
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701", "at {at}");
            let number = |n: usize| {
                let from = at + 6 + 8 * n;
                usize::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
            };
            let (size, name) = (number(6), number(11));
            let data = (at + 110 + name).next_multiple_of(4);
            let path = String::from_utf8(bytes[at + 110..at + 110 + name - 1].to_vec()).unwrap();
            seen.push((path, number(1) as u32, bytes[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        let expected = [
            ("a", FOLDER, &b""[..]),
            ("a/b", FOLDER, b""),
            ("a/b/c", FILE, b"12345"),
            ("a/p", PROGRAM, b"#!"),
            ("TRAILER!!!", 0, b""),
        ];
        let expected = expected.map(|(path, mode, data)| (path.to_owned(), mode, data.to_vec()));
        assert_eq!(seen, expected);
    }
}
