//! Which thread block takes which rows and visits.

use bytemuck::{Pod, Zeroable};

/// Visits are those of all keys in order.
pub(super) const DENSE: u32 = 1;
/// The item folds onto the earlier partial.
pub(super) const BEGINS: u32 = 2;
/// The result is no part of another.
const WHOLE: u32 = u32::MAX;

/// What some packed rows of a KV head visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct List {
    pub(super) kv_head: u32,
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) first_visit: u64,
    pub(super) visits: u32,
}

/// What a thread block does; as in `visits.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Item {
    pub(super) first_visit: u64,
    pub(super) visits: u32,
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) kv_head: u32,
    pub(super) part: u32,
    pub(super) flags: u32,
}

/// Rows whose list was cut along its visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) kv_head: u32,
    /// Row of the first part; the others follow, `rows` each.
    pub(super) part: u32,
    pub(super) parts: u32,
}

/// The thread blocks of a launch and what is merged after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// The longest first.
    pub(super) items: Vec<Item>,
    pub(super) cuts: Vec<Cut>,
    /// Rows of all parts.
    pub(super) part_rows: u32,
}

/// Cuts lists into items of at most `tile_rows` rows and, where they are longer, of parts of at most `part_visits` visits, nearly equal.
pub(super) fn plan(lists: &[List], tile_rows: u32, part_visits: u64, flags: u32) -> Plan {
    let mut plan = Plan { items: Vec::new(), cuts: Vec::new(), part_rows: 0 };
    for list in lists {
        for first in (0..list.rows).step_by(tile_rows as usize) {
            let rows = (list.rows - first).min(tile_rows);
            plan.add(&List { first_row: list.first_row + first, rows, ..*list }, part_visits, flags);
        }
    }
    // The device takes items in order: short ones fill what long ones leave.
    plan.items.sort_by_key(|item| std::cmp::Reverse(item.visits));
    plan
}

/// The same for lists whose visits the device counts: `first_visit` of a list is its number, `visits` the most that it may have. So it is cut as
/// one of that length would be; `place_items` makes of an item's list, part and number of parts what they are of the visits that there
/// are. The lists that may have the most come first.
pub(super) fn counted(lists: &[List], tile_rows: u32, part_visits: u64) -> Plan {
    let mut plan = Plan { items: Vec::new(), cuts: Vec::new(), part_rows: 0 };
    let mut longest: Vec<&List> = lists.iter().collect();
    longest.sort_by_key(|list| std::cmp::Reverse(list.visits));
    for list in longest {
        for first in (0..list.rows).step_by(tile_rows as usize) {
            let rows = (list.rows - first).min(tile_rows);
            let list = List { first_row: list.first_row + first, rows, ..*list };
            let parts = parts(&list, part_visits).min(PARTS_MAX);
            plan.add_parts(&list, parts, 0, |part| (list.first_visit, part << 16 | parts));
        }
    }
    plan
}

/// Parts that half a word tells.
const PARTS_MAX: u32 = u16::MAX as u32;

fn parts(list: &List, part_visits: u64) -> u32 {
    u64::from(list.visits).div_ceil(part_visits).max(1) as u32
}

impl Plan {
    fn add(&mut self, list: &List, part_visits: u64, flags: u32) {
        let parts = parts(list, part_visits);
        let at = |part: u32| u64::from(list.visits) * u64::from(part) / u64::from(parts);
        self.add_parts(list, parts, flags, |part| {
            (list.first_visit + at(part), (at(part + 1) - at(part)) as u32)
        });
    }

    /// `visits` says where those of a part begin, and how many they are.
    fn add_parts(&mut self, list: &List, parts: u32, flags: u32, visits: impl Fn(u32) -> (u64, u32)) {
        let &List { kv_head, first_row, rows, .. } = list;
        for part in 0..parts {
            let begins = if part == 0 { BEGINS } else { 0 };
            let (first_visit, visits) = visits(part);
            self.items.push(Item {
                first_visit,
                visits,
                first_row,
                rows,
                kv_head,
                part: if parts == 1 { WHOLE } else { self.part_rows + part * rows },
                flags: flags | begins,
            });
        }
        if parts > 1 {
            self.cuts.push(Cut { first_row, rows, kv_head, part: self.part_rows, parts });
            self.part_rows += parts * rows;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTS: [List; 3] = [
        List { kv_head: 0, first_row: 0, rows: 224, first_visit: 0, visits: 3 },
        List { kv_head: 1, first_row: 224, rows: 10, first_visit: 3, visits: 21 },
        List { kv_head: 1, first_row: 234, rows: 7, first_visit: 24, visits: 0 },
    ];

    #[test]
    fn every_row_and_visit_is_taken_once() {
        let plan = plan(&LISTS, 128, 5, DENSE);
        let mut taken: Vec<(u32, u32, u64)> = Vec::new();
        for item in &plan.items {
            assert!(item.rows <= 128 && item.visits <= 5 && item.flags & DENSE != 0);
            let visits = item.first_visit..item.first_visit + u64::from(item.visits);
            let rows = item.first_row..item.first_row + item.rows;
            taken.extend(rows.flat_map(|row| visits.clone().map(move |visit| (item.kv_head, row, visit))));
        }
        let mut wanted: Vec<(u32, u32, u64)> = Vec::new();
        for list in LISTS {
            let visits = list.first_visit..list.first_visit + u64::from(list.visits);
            let rows = list.first_row..list.first_row + list.rows;
            wanted.extend(rows.flat_map(|row| visits.clone().map(move |visit| (list.kv_head, row, visit))));
        }
        taken.sort_unstable();
        assert_eq!(taken, wanted);
    }

    #[test]
    fn counted_lists_are_cut_as_if_they_had_all_that_they_may_have() {
        let numbered: Vec<List> =
            LISTS.iter().zip(0..).map(|(list, number)| List { first_visit: number, ..*list }).collect();
        let counted = counted(&numbered, 128, 5);
        let plain = plan(&LISTS, 128, 5, 0);
        assert_eq!((counted.part_rows, counted.cuts.len()), (plain.part_rows, plain.cuts.len()));
        let places = counted.items.iter().map(|item| (item.first_visit, item.visits, item.flags));
        let part = |part: u32| (1, part << 16 | 5, if part == 0 { BEGINS } else { 0 });
        let longest = (0..5).map(part);
        assert!(places.eq(longest.chain([(0, 1, BEGINS), (0, 1, BEGINS), (2, 1, BEGINS)])), "{counted:?}");
    }

    #[test]
    fn parts_lie_apart_and_one_of_each_list_begins() {
        let plan = plan(&LISTS, 128, 5, 0);
        assert_eq!(plan.cuts, [Cut { first_row: 224, rows: 10, kv_head: 1, part: 0, parts: 5 }]);
        assert_eq!(plan.part_rows, 50);
        let mut parts: Vec<_> = plan.items.iter().filter(|item| item.part != WHOLE).collect();
        parts.sort_by_key(|item| item.part);
        let places: Vec<_> = parts.iter().map(|item| (item.part, item.visits, item.flags)).collect();
        assert_eq!(places, [(0, 4, BEGINS), (10, 4, 0), (20, 4, 0), (30, 4, 0), (40, 5, 0)]);
        let whole = plan.items.iter().filter(|item| item.part == WHOLE);
        assert!(whole.clone().count() == 3 && whole.clone().all(|item| item.flags == BEGINS));
        assert!(plan.items.is_sorted_by_key(|item| std::cmp::Reverse(item.visits)), "the longest first");
    }
}
