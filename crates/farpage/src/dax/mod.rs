//! DAX files: files whose pages are their storage, mapped without a page cache, that live by the one rule.
//!
//! Whoever uses a page of such a file works on the file's own block. If the file is cut meanwhile, the block becomes
//! another file's, and the work goes on there: the kernel guards against that by waiting, before it truncates or punches,
//! until the pages are idle. Here programs get the same, in user space, across processes, and for the affected
//! range only: each page has a count, every mapping and every pin holds one reference of it, and a file is cut only
//! where every count is 0. "Idle" and "free of users" are one event.
//!
//! | to do | call |
//! |---|---|
//! | open, and be told why not | [`DaxFile::open`], [`DaxOptions`] |
//! | reach the pages | [`DaxFile::map`], [`DaxMapping`] |
//! | keep them from being cut during a transfer | [`DaxFile::pin`], [`DaxMapping::pin`] |
//! | make them durable | [`DaxMapping::flush`], [`DaxFile::flush`] |
//! | cut | [`DaxFile::truncate`], [`DaxFile::punch_hole`], [`DaxFile::change`] |
//! | a device without a file system | [`DaxDevice`] |
//! | see who holds what | [`DaxFile::users`], [`tables()`], `farpage dax ls` |
//!
//! ```
//! use std::time::Duration;
//!
//! use farpage::Pin;
//! use farpage::dax::{Change, DaxError, DaxOptions, Wait};
//!
//! let dir = tempfile::tempdir()?;
//! let file = DaxOptions::new().page_cache(true).create(dir.path().join("log"))?;
//! file.write_at(&[7; 64 << 10], 0)?;
//! let map = file.map(0..64 << 10)?;
//! let pin = map.pin(0..4096, Pin::Short)?;
//!
//! // Somebody works on the first page: it is not cut, and the error says who it is. The rest goes at once.
//! let soon = Wait { timeout: Duration::from_millis(50), stop: None };
//! let error = file.change(Change::Truncate(0), &soon).unwrap_err();
//! assert!(matches!(error, DaxError::Held { .. }), "{error}");
//! file.truncate(4096)?;
//!
//! let mut byte = [0];
//! map.read(0, &mut byte)?;
//! assert_eq!(byte, [7]);
//! assert!(matches!(map.read(4096, &mut byte), Err(DaxError::Cut { .. })), "a touch would be SIGBUS");
//! drop(pin);
//! file.truncate(0)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod agent;
mod append;
mod change;
mod copied;
mod counts;
mod device;
mod error;
mod file;
mod heads;
mod inner;
mod lease;
mod mapping;
mod options;
mod pin;
mod refs;
mod slots;
mod table;
mod tables;
mod touch;
mod users;

pub use change::{Change, Wait};
pub use device::{DaxDevice, DeviceMapping, DeviceOpenError, DevicePin};
pub use error::{DaxError, Missing, TableError};
pub use file::{Access, CloseError, DaxFile};
pub use mapping::DaxMapping;
pub use options::DaxOptions;
pub use pin::DaxPin;
pub use tables::{TableInfo, tables, tables_in};
pub use users::{Difference, Holding, User};
