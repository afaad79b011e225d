//! Tests of the slots: runs of free frames, what is given up, the count of staged pages.

use super::*;

/// A slot all of whose pages have been staged and settled.
fn free_slots(slots: &Slots, n: usize) -> u32 {
    let (first, got) = slots.take_empty(n).unwrap();
    assert_eq!(got, n);
    for slot in first..first + n as u32 {
        slots.attach(slot, GRANULE, u64::MAX);
        assert_eq!(slots.oldest(), Some(slot));
        slots.set_staged(slot, 0);
        slots.add_free(slot, u64::MAX);
        slots.detach(slot);
    }
    first
}

#[test]
fn a_run_goes_over_whole_slots_and_what_is_left_is_used_up_singly() {
    let slots = Slots::new(20).unwrap();
    assert_eq!(slots.take(512), None);
    let first = free_slots(&slots, 5);
    assert_eq!((slots.free_frames(), slots.staged_pages()), (320, 0));
    let run = slots.take(200).unwrap();
    assert_eq!(run, Run { slot: first, first: 0, len: 200 });
    assert_eq!(slots.free_frames(), 120);
    // Part of it was not needed; that makes the slot it lies in whole again.
    slots.used(run, 70);
    assert_eq!(slots.free_frames(), 250);
    assert_eq!(slots.take(512).unwrap().len, 192);
    // Singly, until nothing is left; emptied slots can be staged into again.
    let mut n = 0;
    while let Some(run) = slots.take(1) {
        slots.used(run, 1);
        n += 1;
    }
    assert_eq!(n, 58);
    assert_eq!(slots.free_frames(), 0);
    assert_eq!(slots.take_empty(20), Some((first + 5, 15)));
    assert_eq!(slots.take_empty(20), Some((first, 2)));
}

#[test]
fn eight_slots_are_those_of_a_page_table_if_possible() {
    let slots = Slots::new(32).unwrap();
    let (first, _) = slots.take_empty(3).unwrap();
    assert_eq!((first, slots.take_empty(8)), (0, Some((8, 8))));
    assert_eq!(slots.take_empty(7), Some((16, 7)));
    slots.give_back(16);
    assert_eq!(slots.take_empty(8), Some((24, 8)));
    // None is left; three and five and what comes after them are.
    assert_eq!(slots.take_empty(8), Some((3, 5)));
}

#[test]
fn all_side_by_side_or_plenty_in_pieces_or_none() {
    let slots = Slots::new(64).unwrap();
    free_slots(&slots, 4);
    assert_eq!((slots.take_all(512), slots.take_all(257)), (None, None));
    let run = slots.take_all(256).unwrap();
    assert_eq!(run.len, 256);
    slots.used(run, 0);
    // A piece of each of many slots: four times what is wanted.
    for _ in 0..48 {
        let slot = free_slots(&slots, 1);
        slots.used(slots.take(64).unwrap(), 40);
        assert!(slot < 64);
    }
    assert!(slots.free_frames() >= 1024, "{}", slots.free_frames());
    let run = slots.take_all(256).unwrap();
    assert!(run.len > 0);
}

#[test]
fn free_frames_are_given_up_but_not_those_beside_staged_pages() {
    let slots = Slots::new(8).unwrap();
    let first = free_slots(&slots, 3);
    let (half, _) = slots.take_empty(1).unwrap();
    slots.attach(half, GRANULE, 0b11);
    slots.set_staged(half, 0b10);
    slots.add_free(half, 0b01);
    let run = slots.take(1).unwrap();
    assert_eq!((run.slot, slots.free_frames()), (half, 192));
    slots.used(run, 0);
    assert_eq!(slots.give_up(), 192);
    assert_eq!((slots.free_frames(), slots.staged_pages()), (1, 1));
    assert_eq!(slots.give_up(), 0);
    assert_eq!(slots.take_empty(3), Some((first, 3)));
}

#[test]
fn staged_pages_are_counted_as_they_come_and_go() {
    let slots = Slots::new(4).unwrap();
    let (first, n) = slots.take_empty(2).unwrap();
    assert_eq!(n, 2);
    slots.give_back(first + 1);
    slots.attach(first, GRANULE, 0b1011);
    assert_eq!(slots.staged_pages(), 3);
    slots.set_staged(first, 0b1000);
    assert_eq!(slots.staged_pages(), 1);
}

/// What lies next to the area is somebody else's, and all of the area's mapping is gone with it.
#[test]
fn the_area_holds_its_mapping_and_nothing_else() {
    let slots = Slots::new(3).unwrap();
    let (start, len) = slots.mapping;
    let (base, area) = slots.area();
    assert!(start <= base && base + area < start + len);
    assert!(slots.holds(start) && slots.holds(start + len - 1) && slots.holds(slots.hole()));
    assert!(!slots.holds(start - 1) && !slots.holds(start + len));
    let mapped = crate::sys::mappings_in(start, start + len).unwrap();
    assert!(mapped.last().is_some_and(|m| m.1 >= start + len));
}
