//! The cases, by topic.

mod append;
mod data;
mod device;
mod forks;
mod fuse;
mod holders;
mod io;
mod killed;
mod leases;
mod open;
mod races;
mod space;

use farpage_tests::Verdict;

use crate::Outcome;
use crate::place::{Expect, Place};

/// A case: what it is called, and what it does.
#[derive(Debug)]
pub struct Case {
    pub name: &'static str,
    pub body: fn(&Place) -> Outcome<Verdict>,
}

/// Short for a table of cases.
pub const fn case(name: &'static str, body: fn(&Place) -> Outcome<Verdict>) -> Case {
    Case { name, body }
}

/// What ran and held.
pub const PASSED: Outcome<Verdict> = Ok(Verdict::Passed);

/// Why a case cannot run here.
pub fn skipped(why: impl Into<String>) -> Outcome<Verdict> {
    Ok(Verdict::Skipped(why.into()))
}

const USE: &[&[Case]] = &[
    open::CASES,
    data::CASES,
    holders::CASES,
    io::CASES,
    forks::CASES,
    leases::CASES,
    append::CASES,
    space::CASES,
    fuse::CASES,
    killed::CASES,
    races::CASES,
];

/// The cases for a file system of this kind.
pub fn all(expect: Expect) -> impl Iterator<Item = &'static Case> {
    let tables: &[&[Case]] = match expect {
        Expect::Dax => &[open::DAX],
        Expect::PageCache => &[],
        Expect::Refused => &[open::REFUSED],
        Expect::Device => &[device::CASES],
    };
    let use_of_files = if matches!(expect, Expect::Dax | Expect::PageCache) { USE } else { &[] };
    let tables = tables.iter().chain(use_of_files);
    tables.flat_map(|table| table.iter())
}

/// Those that are called so, or have it in their names if none is called so.
pub fn chosen(expect: Expect, only: Option<&str>) -> impl Iterator<Item = &'static Case> {
    let exact = all(expect).any(|case| Some(case.name) == only);
    all(expect).filter(move |case| match only {
        Some(only) if exact => case.name == only,
        Some(only) => case.name.contains(only),
        None => true,
    })
}
