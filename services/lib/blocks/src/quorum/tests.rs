//! The tally against a model that keeps sets.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[test]
fn rules_out_of_range_are_refused_by_name() {
    for (copies, acks, field) in
        [(0, 1, "`copies`"), (9, 1, "`copies`"), (2, 0, "`write_acks`"), (2, 3, "`write_acks`")]
    {
        let error = CopyRule::new(copies, acks).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    }
    assert_eq!(CopyRule::new(1, 1).unwrap(), CopyRule::default());
}

/// Shards on machines of their own.
fn alone(shards: &[usize]) -> Vec<Candidate> {
    shards.iter().map(|&shard| Candidate { shard, host: shard }).collect()
}

#[test]
fn a_refusal_is_made_good_by_the_next_shard() {
    let mut tally = Tally::new(CopyRule::new(2, 2).unwrap(), alone(&[4, 7, 1]));
    assert_eq!(tally.under_way().collect::<Vec<_>>(), [4, 7]);
    assert_eq!(tally.ask_next(), None, "both may still answer");
    tally.held(4);
    tally.refused(7);
    assert_eq!(tally.verdict(), Verdict::Waiting);
    assert_eq!(tally.ask_next(), Some(1));
    tally.held(7);
    assert_eq!(tally.verdict(), Verdict::Waiting, "a shard that was given up confirms nothing");
    tally.held(1);
    assert_eq!(tally.verdict(), Verdict::Stored);
    assert_eq!(tally.holders().collect::<Vec<_>>(), [4, 1]);
}

#[test]
fn one_copy_of_one_candidate_fails_with_it() {
    let mut tally = Tally::new(CopyRule::default(), alone(&[3]));
    tally.refused(3);
    assert_eq!((tally.ask_next(), tally.verdict()), (None, Verdict::Failed));
    assert_eq!(Tally::new(CopyRule::default(), alone(&[])).verdict(), Verdict::Failed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_tally_does_what_sets_do(
        copies in 1usize..5,
        acks in 1usize..5,
        count in 0usize..8,
        answers in prop::collection::vec((0usize..8, any::<bool>()), 0..30),
    ) {
        let rule = CopyRule::new(copies, acks.min(copies)).unwrap();
        let candidates: Vec<usize> = (0..count).collect();
        let mut tally = Tally::new(rule, alone(&candidates));
        let mut asked: BTreeSet<usize> = tally.under_way().collect();
        let (mut held, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for (shard, yes) in answers {
            if asked.contains(&shard) && !held.contains(&shard) && !refused.contains(&shard) {
                if yes { held.insert(shard) } else { refused.insert(shard) };
            }
            if yes { tally.held(shard) } else { tally.refused(shard) }
            while let Some(next) = tally.ask_next() {
                prop_assert!(asked.insert(next), "asked twice");
            }
            prop_assert_eq!(&tally.holders().collect::<BTreeSet<_>>(), &held);
            let open = asked.len() - held.len() - refused.len();
            prop_assert_eq!(tally.under_way().count(), open);
            prop_assert!(held.len() + open <= copies, "never more copies than wanted");
            // Everybody who could still hold a copy: those asked that did not refuse, and those not asked.
            let expected = if held.len() >= rule.write_acks() {
                Verdict::Stored
            } else if count - refused.len() >= rule.write_acks() {
                Verdict::Waiting
            } else {
                Verdict::Failed
            };
            prop_assert_eq!(tally.verdict(), expected);
            // Whoever is left to ask is asked as long as copies are missing.
            prop_assert!(held.len() + open == copies.min(count - refused.len()));
        }
    }

    #[test]
    fn no_two_copies_go_to_one_machine(
        copies in 1usize..5,
        hosts in prop::collection::vec(0usize..4, 0..8),
        answers in prop::collection::vec((0usize..8, any::<bool>()), 0..30),
    ) {
        let candidates: Vec<Candidate> =
            hosts.iter().enumerate().map(|(shard, &host)| Candidate { shard, host }).collect();
        let mut tally = Tally::new(CopyRule::new(copies, copies).unwrap(), candidates);
        for (shard, yes) in answers {
            if yes { tally.held(shard) } else { tally.refused(shard) }
            while tally.ask_next().is_some() {}
            let used: Vec<usize> = tally.holders().chain(tally.under_way()).map(|shard| hosts[shard]).collect();
            prop_assert_eq!(used.iter().collect::<BTreeSet<_>>().len(), used.len(), "{:?}", used);
            let nobody_left = tally.under_way().count() == 0 && tally.verdict() == Verdict::Waiting;
            prop_assert!(!nobody_left, "waits for nobody");
        }
    }
}
