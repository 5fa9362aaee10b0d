//! The table against a list of everything that is under way.

use proptest::prelude::*;

use super::*;
use crate::Kind;

const LIMITS: LoadLimits = LoadLimits {
    workers_max: 4,
    tickets_max: 12,
    prefill_tokens_max: 100,
    decode_sequences_max: 3,
    backoff_first_ms: 100,
    backoff_max_ms: 500,
};

fn table() -> LoadTable {
    LoadTable::new(LIMITS).unwrap()
}

fn prefill(tokens: u64) -> Cost {
    Cost { prefill_tokens: tokens, decode_sequences: 0 }
}

const ONE: Cost = Cost { prefill_tokens: 0, decode_sequences: 1 };

#[test]
fn the_least_work_wins_and_ids_break_ties() {
    let mut table = table();
    assert_eq!(table.pick(Phase::Prefill, &["b", "a"], &[], prefill(5), 0).unwrap(), "a");
    table.begin("a", prefill(10), 0).unwrap();
    assert_eq!(table.pick(Phase::Prefill, &["b", "a"], &[], prefill(5), 0).unwrap(), "b");
    table.begin("b", prefill(10), 0).unwrap();
    table.begin("a", ONE, 0).unwrap();
    assert_eq!(table.pick(Phase::Prefill, &["a", "b"], &[], prefill(5), 0).unwrap(), "b");
    assert_eq!(table.pick(Phase::Decode, &["a", "b"], &[], ONE, 0).unwrap(), "b");
    assert_eq!(table.pick(Phase::Decode, &["a", "b"], &["b"], ONE, 0).unwrap(), "a");
}

#[test]
fn nobody_left_and_everybody_busy_are_told_apart() {
    let mut table = table();
    let error = table.pick(Phase::Decode, &[], &[], ONE, 0).unwrap_err();
    assert_eq!(error, Error::NoWorker { role: "decode", known: 0, excluded: 0 });
    let error = table.pick(Phase::Decode, &["a"], &["a", "z"], ONE, 0).unwrap_err();
    assert_eq!(error, Error::NoWorker { role: "decode", known: 1, excluded: 1 });
    assert_eq!(error.kind(), Kind::Unavailable);
    for _ in 0..3 {
        table.assign(Phase::Decode, &["a"], &[], ONE, 0).unwrap();
    }
    let error = table.assign(Phase::Decode, &["a"], &[], ONE, 0).unwrap_err();
    assert_eq!((error.kind(), error.retryable()), (Kind::Overloaded, true));
}

#[test]
fn a_long_prompt_waits_for_an_idle_worker() {
    let mut table = table();
    let (worker, ticket) = table.assign(Phase::Prefill, &["a", "b"], &[], prefill(1000), 0).unwrap();
    assert_eq!(worker, "a");
    assert_eq!(table.assign(Phase::Prefill, &["a", "b"], &[], prefill(1000), 0).unwrap().0, "b");
    assert!(table.pick(Phase::Prefill, &["a", "b"], &[], prefill(1), 0).is_err());
    table.prefilled(ticket, 950);
    assert_eq!(table.pick(Phase::Prefill, &["a", "b"], &[], prefill(50), 0).unwrap(), "a");
    table.prefilled(ticket, u64::MAX);
    assert_eq!(table.load("a").prefill_tokens, 0);
    assert!(table.finish(ticket));
    assert!(!table.finish(ticket));
    table.prefilled(ticket, 1);
    assert_eq!(table.load("a"), WorkerLoad::default());
}

#[test]
fn suspension_doubles_up_to_its_cap_and_ends_with_success() {
    let mut table = table();
    let mut now = 1000;
    for pause in [100, 200, 400, 500, 500] {
        assert_eq!(table.failed("a", now).unwrap(), now + pause);
        assert_eq!(table.failed("a", now + 1).unwrap(), now + pause, "failures at one time count once");
        assert_eq!(table.pick(Phase::Decode, &["a", "b"], &[], ONE, now + pause - 1).unwrap(), "b");
        assert_eq!(table.pick(Phase::Decode, &["a", "b"], &[], ONE, now + pause).unwrap(), "a");
        now += pause;
    }
    table.succeeded("a");
    assert_eq!(table.failed("a", now).unwrap(), now + 100);
    table.succeeded("a");
    assert_eq!(table.pick(Phase::Decode, &["a", "b"], &[], ONE, now).unwrap(), "a");
}

#[test]
fn when_all_are_suspended_the_first_to_return_is_tried() {
    let mut table = table();
    table.failed("a", 50).unwrap();
    table.failed("b", 10).unwrap();
    assert_eq!(table.pick(Phase::Decode, &["a", "b"], &[], ONE, 60).unwrap(), "b");
    assert_eq!(table.pick(Phase::Decode, &["a", "b"], &["b"], ONE, 60).unwrap(), "a");
    for _ in 0..3 {
        table.begin("c", ONE, 60).unwrap();
    }
    let error = table.pick(Phase::Decode, &["a", "c"], &[], ONE, 60).unwrap_err();
    assert_eq!(error.kind(), Kind::Overloaded, "a busy worker is better waited for than a failed one tried");
}

#[test]
fn time_at_its_end_does_not_overflow() {
    let mut table = table();
    assert_eq!(table.failed("a", u64::MAX - 1).unwrap(), u64::MAX);
    for _ in 0..100 {
        table.workers.get_mut("a").unwrap().suspended_until_ms = 0;
        assert!(table.failed("a", 7).unwrap() <= 7 + 500);
    }
}

#[test]
fn the_table_stays_bounded() {
    let mut table = table();
    let tickets: Vec<Ticket> =
        ["a", "b", "c", "d"].iter().map(|worker| table.begin(worker, ONE, 0).unwrap()).collect();
    assert_eq!(table.begin("e", ONE, 0).unwrap_err(), Error::Full { what: "workers", limit: 4 });
    table.finish(tickets[1]);
    table.failed("b", 0).unwrap();
    assert!(table.begin("e", ONE, 99).is_err(), "a suspended worker is remembered");
    table.begin("e", ONE, 100).unwrap();
    assert_eq!(table.workers().map(|(id, _)| id).collect::<Vec<_>>(), ["a", "c", "d", "e"]);
    table.retain(&[]);
    assert_eq!(table.workers().count(), 4, "workers with work stay");
    for _ in table.tickets()..12 {
        table.begin("a", Cost::default(), 0).unwrap();
    }
    assert_eq!(table.begin("a", ONE, 0).unwrap_err().kind(), Kind::Overloaded);
    table.finish(tickets[2]);
    table.retain(&["x"]);
    assert_eq!(table.workers().count(), 3);
}

#[test]
fn limits_and_costs_that_cannot_work_are_named() {
    let zero = |change: fn(&mut LoadLimits)| {
        let mut limits = LIMITS;
        change(&mut limits);
        LoadTable::new(limits).unwrap_err().to_string()
    };
    assert!(zero(|l| l.workers_max = 0).contains("`workers_max`"));
    assert!(zero(|l| l.tickets_max = 0).contains("`tickets_max`"));
    assert!(zero(|l| l.prefill_tokens_max = 0).contains("`prefill_tokens_max`"));
    assert!(zero(|l| l.decode_sequences_max = 0).contains("`decode_sequences_max`"));
    assert!(zero(|l| l.backoff_first_ms = 0).contains("`backoff_first_ms`"));
    assert!(zero(|l| l.backoff_max_ms = 99).contains("`backoff_max_ms`"));
    assert!(LoadTable::new(LoadLimits::default()).is_ok());
    let mut table = table();
    table.begin("a", prefill(u64::MAX), 0).unwrap();
    assert_eq!(table.begin("a", prefill(1), 0).unwrap_err().kind(), Kind::InvalidInput);
    assert_eq!(table.load("a").tickets, 1);
}

#[derive(Debug, Clone)]
enum Action {
    Assign { phase: Phase, cost: Cost, excluded: Vec<usize> },
    Prefilled { which: usize, tokens: u64 },
    Finish { which: usize },
    Fail { worker: usize },
    Succeed { worker: usize },
    Wait { ms: u64 },
}

const WORKERS: [&str; 3] = ["a", "b", "c"];

fn action() -> impl Strategy<Value = Action> {
    let cost = (0u64..150, 0u32..3).prop_map(|(p, d)| Cost { prefill_tokens: p, decode_sequences: d });
    let phase = prop_oneof![Just(Phase::Prefill), Just(Phase::Decode)];
    prop_oneof![
        4 => (phase, cost, prop::collection::vec(0usize..3, 0..3))
            .prop_map(|(phase, cost, excluded)| Action::Assign { phase, cost, excluded }),
        2 => (0usize..12, 0u64..200).prop_map(|(which, tokens)| Action::Prefilled { which, tokens }),
        2 => (0usize..12).prop_map(|which| Action::Finish { which }),
        1 => (0usize..3).prop_map(|worker| Action::Fail { worker }),
        1 => (0usize..3).prop_map(|worker| Action::Succeed { worker }),
        1 => (0u64..300).prop_map(|ms| Action::Wait { ms }),
    ]
}

/// Everything that is under way, in a list, and suspensions: (until, failures).
#[derive(Default)]
struct Naive {
    begun: Vec<(Ticket, &'static str, Cost)>,
    suspended: [(u64, u32); 3],
}

impl Naive {
    fn sum(&self, worker: &str) -> (u64, u64) {
        let mine = self.begun.iter().filter(|(_, at, _)| *at == worker);
        mine.fold((0, 0), |(p, d), (_, _, c)| (p + c.prefill_tokens, d + u64::from(c.decode_sequences)))
    }

    /// Sorts all allowed workers and takes the first; none is an error.
    fn pick(&self, phase: Phase, cost: Cost, excluded: &[usize], now: u64) -> Option<&'static str> {
        let mut rows = Vec::new();
        for (index, worker) in WORKERS.iter().enumerate().filter(|(index, _)| !excluded.contains(index)) {
            rows.push((self.suspended[index].0.saturating_sub(now), *worker));
        }
        if rows.iter().any(|(left, _)| *left == 0) {
            rows.retain(|(left, _)| *left == 0);
        }
        rows.retain(|(_, worker)| match (phase, self.sum(worker)) {
            (Phase::Prefill, (p, _)) => p == 0 || p + cost.prefill_tokens <= 100,
            (Phase::Decode, (_, d)) => d + u64::from(cost.decode_sequences) <= 3,
        });
        rows.sort_by_key(|(left, worker)| {
            let (p, d) = self.sum(worker);
            (*left, if phase == Phase::Prefill { (p, d) } else { (d, p) }, *worker)
        });
        rows.first().map(|(_, worker)| *worker)
    }
}

proptest! {
    #[test]
    fn the_table_equals_a_list(actions in prop::collection::vec(action(), 0..80)) {
        let (mut table, mut naive, mut now) = (table(), Naive::default(), 0u64);
        for action in actions {
            match action {
                Action::Assign { phase, cost, excluded } => {
                    let names: Vec<&str> = excluded.iter().map(|index| WORKERS[*index]).collect();
                    let expected = naive.pick(phase, cost, &excluded, now).filter(|_| naive.begun.len() < 12);
                    let got = table.assign(phase, &WORKERS, &names, cost, now);
                    prop_assert_eq!(got.as_ref().ok().map(|(worker, _)| worker.as_str()), expected);
                    if let (Ok((_, ticket)), Some(worker)) = (got, expected) {
                        naive.begun.push((ticket, worker, cost));
                    }
                }
                Action::Prefilled { which, tokens } => {
                    if let Some((ticket, _, cost)) = naive.begun.get_mut(which) {
                        table.prefilled(*ticket, tokens);
                        cost.prefill_tokens = cost.prefill_tokens.saturating_sub(tokens);
                    }
                }
                Action::Finish { which } if which < naive.begun.len() => {
                    prop_assert!(table.finish(naive.begun.remove(which).0));
                }
                Action::Finish { .. } => {}
                Action::Fail { worker } => {
                    let (until, failures) = &mut naive.suspended[worker];
                    if *until <= now {
                        *until = now + (100 * 2u64.pow((*failures).min(20))).min(500);
                        *failures += 1;
                    }
                    prop_assert_eq!(table.failed(WORKERS[worker], now).unwrap(), *until);
                }
                Action::Succeed { worker } => {
                    table.succeeded(WORKERS[worker]);
                    naive.suspended[worker] = (0, 0);
                }
                Action::Wait { ms } => now += ms,
            }
            for worker in WORKERS {
                let load = table.load(worker);
                prop_assert_eq!((load.prefill_tokens, u64::from(load.decode_sequences)), naive.sum(worker));
            }
            prop_assert_eq!(table.tickets(), naive.begun.len());
        }
        for (ticket, ..) in naive.begun {
            table.finish(ticket);
        }
        prop_assert!(table.workers().all(|(_, load)| load.tickets == 0 && load.prefill_tokens == 0));
    }
}
