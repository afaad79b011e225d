//! All DAX files that are in use on this machine, by their tables.

use std::io;
use std::path::{Path, PathBuf};

use super::copied::Copied;
use super::error::TableError;
use super::table::{DIR, PREFIX, Table};
use super::users::{Difference, User};
use crate::frame::Pfn;

/// A DAX file that is in use.
///
/// See the example of [`tables_in`].
#[derive(Debug)]
pub struct TableInfo {
    /// The table of its users.
    pub table: PathBuf,
    /// The file, as whoever opened it first called it.
    pub file: PathBuf,
    /// Who has it open, and what he holds of it.
    pub users: Vec<User>,
    /// Counts that differ from the references that are recorded. (Root does not look at the counts of other users.)
    pub differences: Vec<Difference>,
}

/// The DAX files that are in use, with their users. What the dead left behind is cleaned up on the way.
///
/// ```
/// for table in farpage::dax::tables()? {
///     match table {
///         Ok(info) => println!("{} is used by {} processes", info.file.display(), info.users.len()),
///         Err((path, why)) => println!("{}: {why}", path.display()),
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// The directory of tables cannot be read. Tables of other users come as errors of their own.
pub fn tables() -> io::Result<Vec<Result<TableInfo, (PathBuf, TableError)>>> {
    tables_in(Path::new(DIR))
}

/// As [`tables`], of another directory ([`super::DaxOptions::tables`]).
///
/// ```
/// use farpage::dax::{DaxOptions, tables_in};
///
/// # let dir = tempfile::tempdir()?;
/// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// # let file = options.create(dir.path().join("file"))?;
/// file.write_at(&[1; 8192], 0)?;
/// let map = file.map(0..8192)?;
/// let tables = tables_in(dir.path())?;
/// let info = tables[0].as_ref().unwrap();
/// assert_eq!((info.file.as_path(), info.table.parent()), (file.path(), Some(dir.path())));
/// assert_eq!((info.users.len(), info.users[0].holds.len()), (1, 1));
/// assert!(info.differences.is_empty());
/// # drop(map);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`tables`].
pub fn tables_in(dir: &Path) -> io::Result<Vec<Result<TableInfo, (PathBuf, TableError)>>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let is_ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        if is_ours {
            found.extend(look(&path).map_err(|e| (path, e)).transpose());
        }
    }
    Ok(found)
}

/// `None`: nobody uses it, or it has just gone.
fn look(path: &Path) -> Result<Option<TableInfo>, TableError> {
    let table = match Table::look_at(path) {
        Ok(Some(table)) => table,
        Ok(None) => return Ok(None),
        // Nobody else can open it, and to join it would be to trust it.
        Err(TableError::Untrusted(_)) => return look_at_copy(path),
        Err(e) => return Err(e),
    };
    table.reap();
    let users = table.users(&(0..Pfn::MAX));
    if users.is_empty() {
        return Ok(None);
    }
    let differences = table.differences();
    Ok(Some(TableInfo { table: path.to_owned(), file: table.head().file_name(), users, differences }))
}

fn look_at_copy(path: &Path) -> Result<Option<TableInfo>, TableError> {
    let Some(copy) = Copied::of(path)? else { return Ok(None) };
    let (file, users) = copy.says();
    let differences = Vec::new();
    Ok((!users.is_empty()).then(|| TableInfo { table: path.to_owned(), file, users, differences }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_looks_makes_no_table() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("farpage-dax-0");
        assert!(look(&path).unwrap().is_none());
        assert!(!path.exists());
        // What the dead left goes.
        for len in [0, 100, 1 << 20] {
            std::fs::write(&path, vec![0; len]).unwrap();
            assert!(look(&path).unwrap().is_none());
            assert!(!path.exists());
        }
    }
}
