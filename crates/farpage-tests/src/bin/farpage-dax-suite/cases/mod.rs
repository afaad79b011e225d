//! The cases, by topic.

mod data;
mod forks;
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
    space::CASES,
    killed::CASES,
    races::CASES,
];

/// The cases for a file system of this kind.
pub fn all(expect: Expect) -> impl Iterator<Item = &'static Case> {
    let tables = if expect == Expect::Refused { &[open::REFUSED] } else { USE };
    tables.iter().flat_map(|table| table.iter())
}
