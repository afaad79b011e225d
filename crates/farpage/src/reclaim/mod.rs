//! Reclaim: which granule leaves DRAM (`evict`), how its pages reach a device (`settle`), where frames for
//! pages that come in are found (`supply`), and the worker that keeps a stock of them (`worker`).

pub(crate) mod cost;
mod evict;
pub(crate) mod settle;
mod supply;
pub mod worker;

use crate::Page;
use crate::space::range::GRANULE_PAGES;

pub use supply::Frames;

/// What a manager thread works with: buffers outside managed memory, so that it never faults itself.
pub struct Hands {
    /// A granule's worth of pages.
    pub pages: Vec<Page>,
}

impl Hands {
    /// New buffers, touched once so that they are there.
    pub fn new() -> Self {
        Self { pages: vec![Page([0; crate::PAGE_SIZE]); GRANULE_PAGES] }
    }
}

impl Default for Hands {
    fn default() -> Self {
        Self::new()
    }
}
