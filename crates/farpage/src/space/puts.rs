//! Dropping the references of page entries, many at a time.

use crate::domain::Domain;
use crate::domain::entry::Entry;
use crate::frame::{Owner, Pfn};

/// References that are being dropped. Each is marked as in transit before its entry changes, so that a reaper, should
/// we die in between, knows which of the two came first; the frames go back to their devices when this is dropped, best
/// after the locks are released.
pub(crate) struct Puts<'a> {
    domain: &'a Domain,
    me: Owner,
    begun: Vec<(u8, Pfn)>,
}

impl<'a> Puts<'a> {
    pub fn new(domain: &'a Domain, me: Owner) -> Self {
        Self { domain, me, begun: Vec::new() }
    }

    /// The caller changes this entry next, and then it holds no reference any more.
    pub fn begin(&mut self, e: Entry) {
        let Some((dev, pfn)) = e.frame() else { return };
        let frames = &self.domain.pagemap(dev).frames;
        if frames.try_begin_put(pfn, self.me).is_err() {
            // Another process is at it. Two that each were in transit on what the other waits for would wait for ever:
            // finish what has been begun, whose entries have changed by now, and wait empty-handed.
            self.finish();
            frames.begin_put(pfn, self.me);
        }
        self.begun.push((dev, pfn));
    }

    fn finish(&mut self) {
        for map in &self.domain.pagemaps {
            let pfns: Vec<Pfn> = self.begun.iter().filter(|p| p.0 == map.id).map(|p| p.1).collect();
            map.put_in_transit(&pfns, self.me);
        }
        self.begun.clear();
    }
}

impl Drop for Puts<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}
