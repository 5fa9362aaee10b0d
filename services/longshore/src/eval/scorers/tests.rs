//! Rules on planted heads: equal costs, and orders that must hold.

use longshore_compute::ComputePool;

use super::*;
use crate::eval::scorers::rule::Selector;

#[test]
fn tiles_lie_in_the_second_half() {
    assert_eq!(tiles(1024, 4), [608, 736, 864, 992]);
    assert_eq!(tiles(1024, 99).len(), 16);
    assert_eq!(tiles(1024, 99)[0], 512);
}

#[test]
fn densities_are_percentages() {
    assert_eq!(densities(&[5.0, 100.0]).unwrap(), [0.05, 1.0]);
    for bad in [0.0, -1.0, 100.1, f64::NAN] {
        assert!(densities(&[bad]).unwrap_err().to_string().contains("`--density`"));
    }
}

#[test]
fn rules_visit_as_much_as_was_asked_and_the_oracle_sees_most() {
    let layers = planted::layers(4096, &tiles(4096, 3)).unwrap();
    let bench = Bench::new(&ComputePool::serial(), layers, &|| ()).unwrap();
    let wanted = 0.25;
    let of = |scorer, selector, correction| {
        let measured = bench.measure(Rule { scorer, selector, correction }, wanted).unwrap();
        assert!((cost(measured.visited) - wanted).abs() < 0.02, "{}", cost(measured.visited));
        measured
    };
    let oracle = of(Scorer::Oracle, Selector::TopK, false);
    let mut errors = Vec::new();
    for scorer in [Scorer::Pooled, Scorer::RowNormalised, Scorer::Antidiagonal] {
        let [with, without] = [true, false].map(|correction| of(scorer, Selector::TopK, correction));
        assert!(with.mass.mean <= oracle.mass.mean && without.mass.mean <= oracle.mass.mean);
        assert!(with.visited.means > 0 && without.visited.means == 0);
        let sink = |m: &Measured| m.layers.iter().find(|l| l.name == "sink").unwrap().output.median;
        errors.push((sink(&with), sink(&without)));
    }
    // What is left of a head whose first key has no value is everything else: means know it, leaving it out does not.
    assert!(errors.iter().all(|(with, without)| with < without), "{errors:?}");
}

#[test]
fn everything_visited_is_exact() {
    let layers = planted::layers(2048, &tiles(2048, 2)).unwrap();
    let bench = Bench::new(&ComputePool::serial(), layers, &|| ()).unwrap();
    for scorer in [Scorer::Pooled, Scorer::Oracle] {
        let rule = Rule { scorer, selector: Selector::TopK, correction: true };
        let measured = bench.measure(rule, 1.0).unwrap();
        assert_eq!((measured.visited.keys, measured.visited.means), (measured.visited.causal, 0));
        assert!(measured.output.max < 1e-4 && measured.mass.p10 > 0.9999, "{measured:?}");
    }
}
