#![forbid(unsafe_code)]
//! Which page of ours shows at which page of guest RAM (TLFS 6.0b section 5.2.1).
//!
//! An overlay hides the RAM below it; when it is taken away, the RAM is there again, untouched. Each of our
//! pages lives in a sealed memfd and is mapped over guest RAM's host mapping; this module decides only which
//! mapping a guest page gets.
//!
//! Rules for addresses that no honest guest uses:
//! - beyond RAM: the MSR write that would place the page is refused (#GP, `msr.rs`); nothing comes here.
//! - two or more pages at one address: the one placed last is on top. When it goes, the one below it shows
//!   again, whatever the order of leaving. (The TLFS leaves this open.)
//! - the page that holds the running code, or page tables: allowed; the guest harms itself only.

use std::collections::BTreeMap;

/// A page of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Page {
    Hypercall,
    ReferenceTsc,
    /// Message page of a VP.
    Simp(u16),
    /// Event-flags page of a VP.
    Siefp(u16),
}

/// A mapping to change. At most one for each guest page is produced by one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Map the page at this guest page number.
    Show { gpn: u64, page: Page },
    /// Map RAM at this guest page number again.
    Restore { gpn: u64 },
}

/// All overlays of a VM. Bounded by the number of pages: two, and two for each VP.
#[derive(Debug, Default)]
pub struct Overlays {
    /// For each covered guest page the overlays on it, the visible one last. Never an empty list.
    stacks: BTreeMap<u64, Vec<Page>>,
    places: BTreeMap<Page, u64>,
}

impl Overlays {
    /// Puts `page` on top at `gpn`, or takes it away for `None`.
    ///
    /// A page that stays where it is keeps its place in the stack.
    pub fn place(&mut self, page: Page, gpn: Option<u64>) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.places.get(&page).copied() == gpn {
            return changes;
        }
        if let Some(old) = self.places.remove(&page) {
            changes.extend(self.remove(page, old));
        }
        if let Some(gpn) = gpn {
            self.stacks.entry(gpn).or_default().push(page);
            self.places.insert(page, gpn);
            changes.push(Change::Show { gpn, page });
        }
        changes
    }

    /// Takes all overlays away.
    pub fn clear(&mut self) -> Vec<Change> {
        self.places.clear();
        std::mem::take(&mut self.stacks)
            .into_keys()
            .map(|gpn| Change::Restore { gpn })
            .collect()
    }

    /// Guest page and page of each overlay, for inspection.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Page)> + '_ {
        self.places.iter().map(|(page, gpn)| (*gpn, *page))
    }

    fn remove(&mut self, page: Page, gpn: u64) -> Option<Change> {
        let stack = self.stacks.get_mut(&gpn)?;
        let was_visible = stack.last() == Some(&page);
        stack.retain(|other| *other != page);
        match stack.last() {
            Some(below) if was_visible => Some(Change::Show { gpn, page: *below }),
            Some(_) => None,
            None => {
                self.stacks.remove(&gpn);
                Some(Change::Restore { gpn })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn enabling_shows_the_page_and_disabling_restores_ram() {
        let mut overlays = Overlays::default();
        assert_eq!(
            overlays.place(Page::Hypercall, Some(7)),
            [Change::Show {
                gpn: 7,
                page: Page::Hypercall
            }]
        );
        assert_eq!(overlays.place(Page::Hypercall, Some(7)), []);
        assert_eq!(
            overlays.place(Page::Hypercall, None),
            [Change::Restore { gpn: 7 }]
        );
        assert_eq!(overlays.place(Page::Hypercall, None), []);
    }

    #[test]
    fn moving_restores_the_old_place_first() {
        let mut overlays = Overlays::default();
        overlays.place(Page::Simp(0), Some(1));
        assert_eq!(
            overlays.place(Page::Simp(0), Some(2)),
            [
                Change::Restore { gpn: 1 },
                Change::Show {
                    gpn: 2,
                    page: Page::Simp(0)
                }
            ]
        );
    }

    #[test]
    fn the_last_page_placed_at_an_address_is_on_top_and_the_one_below_returns() {
        let mut overlays = Overlays::default();
        overlays.place(Page::Simp(0), Some(5));
        overlays.place(Page::Siefp(0), Some(5));
        assert_eq!(overlays.place(Page::Simp(0), None), [], "it was hidden");
        overlays.place(Page::Simp(1), Some(5));
        assert_eq!(
            overlays.place(Page::Simp(1), None),
            [Change::Show {
                gpn: 5,
                page: Page::Siefp(0)
            }]
        );
        assert_eq!(overlays.place(Page::Siefp(0), None), [Change::Restore { gpn: 5 }]);
    }

    fn pages() -> impl Strategy<Value = Page> {
        prop_oneof![
            Just(Page::Hypercall),
            Just(Page::ReferenceTsc),
            (0u16..2).prop_map(Page::Simp),
            (0u16..2).prop_map(Page::Siefp),
        ]
    }

    proptest! {
        /// The oracle keeps the order of placement and looks for the newest page at each address.
        #[test]
        fn what_shows_is_always_the_newest_page_at_the_address(
            steps in prop::collection::vec((pages(), prop::option::of(0u64..3)), 0..40)
        ) {
            let mut overlays = Overlays::default();
            let mut oracle: Vec<(Page, u64)> = Vec::new();
            let mut shown: BTreeMap<u64, Page> = BTreeMap::new();
            for (page, gpn) in steps {
                if oracle.iter().find(|entry| entry.0 == page).map(|entry| entry.1) != gpn {
                    oracle.retain(|entry| entry.0 != page);
                    oracle.extend(gpn.map(|gpn| (page, gpn)));
                }
                for change in overlays.place(page, gpn) {
                    match change {
                        Change::Show { gpn, page } => { shown.insert(gpn, page); }
                        Change::Restore { gpn } => { shown.remove(&gpn); }
                    }
                }
                for gpn in 0..3 {
                    let newest = oracle.iter().rev().find(|entry| entry.1 == gpn).map(|entry| entry.0);
                    prop_assert_eq!(shown.get(&gpn).copied(), newest);
                }
            }
        }
    }
}
