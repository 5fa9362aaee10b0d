use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn key(name: u64) -> BlockKey {
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&name.to_le_bytes());
    BlockKey(bytes)
}

proptest! {
    #[test]
    fn counts_are_never_too_low_and_seldom_too_high(names in prop::collection::vec(0u64..200, 1..2_000), seed: u64) {
        let mut sketch = Sketch::new(256, seed);
        let mut exact: HashMap<u64, u8> = HashMap::new();
        for name in &names {
            sketch.add(&key(*name));
            let count = exact.entry(*name).or_default();
            *count = (*count + 1).min(15);
        }
        let too_high = exact.iter().filter(|(name, exact)| {
            let count = sketch.count(&key(**name));
            assert!(count >= **exact, "{name} was seen {exact} times, not {count}");
            count > **exact
        });
        prop_assert!(too_high.count() <= 40, "of 200 keys in 256 counters");
        prop_assert!((0..200).all(|name| exact.contains_key(&name) || sketch.count(&key(name)) <= 15));
    }
}

#[test]
fn memory_is_bounded_and_old_counts_fade() {
    let mut sketch = Sketch::new(1_000, 3);
    let bytes = sketch.bytes();
    assert!(bytes <= 4 * 1_000);
    (0..15).for_each(|_| sketch.add(&key(1)));
    assert_eq!(sketch.count(&key(1)), 15);
    (0..100_000).for_each(|name| sketch.add(&key(1_000 + name)));
    assert!(sketch.count(&key(1)) < 15 && sketch.bytes() == bytes);
}

#[test]
fn the_second_touch_opens_the_door() {
    let mut filter = AdmissionFilter::new(AdmissionRule::SecondTouch, 64, 1);
    assert!(!filter.admits(&key(1), None));
    filter.touch(&key(1));
    assert!(!filter.admits(&key(1), None));
    filter.touch(&key(1));
    assert!(filter.admits(&key(1), None) && filter.admits(&key(1), Some(&key(2))));
}

#[test]
fn the_more_frequent_block_stays() {
    let mut filter = AdmissionFilter::new(AdmissionRule::Frequency, 64, 1);
    (0..3).for_each(|_| filter.touch(&key(1)));
    filter.touch(&key(2));
    assert!(filter.admits(&key(1), Some(&key(2))) && !filter.admits(&key(2), Some(&key(1))));
    assert!(filter.admits(&key(2), None), "there is room");
    assert!(!filter.admits(&key(1), Some(&key(1))), "equals do not take turns");
    let all = AdmissionFilter::new(AdmissionRule::All, 64, 1);
    assert!(all.admits(&key(3), Some(&key(1))));
}

#[test]
fn unknown_rules_are_told_with_those_that_there_are() {
    for rule in AdmissionRule::ALL {
        assert_eq!(rule.name().parse(), Ok(rule));
    }
    let error = "twice".parse::<AdmissionRule>().unwrap_err().to_string();
    assert_eq!(error, "`admission` is `twice`, must be one of `all`, `second-touch`, `frequency`");
}
