use super::*;
use crate::{Deployment, EXACT_PREFILL};

fn tenant(salt: u8) -> Namespace {
    Deployment::from_bytes([1; 32]).namespace(EXACT_PREFILL, &[salt])
}

/// Takes as much as it may.
fn fill(shares: &mut Shares, tenant: Namespace, limit: u64) -> u64 {
    let mut taken = 0;
    while shares.ask(tenant, Resource::Views, 1, limit).is_ok() {
        shares.take(tenant, Resource::Views);
        taken += 1;
        assert!(taken <= limit, "more than there are");
    }
    taken
}

#[test]
fn whoever_takes_all_it_may_leaves_room_for_the_next() {
    let mut shares = Shares::new(75);
    assert_eq!(fill(&mut shares, tenant(1), 1_000), 750);
    // Those who come later get 75 % of what the ones before left; none of them is left with nothing.
    let later: Vec<u64> = (2..7).map(|salt| fill(&mut shares, tenant(salt), 1_000)).collect();
    assert_eq!(later[0], 187, "3 x (250 - 187) is the last product that suffices");
    assert!(later.is_sorted_by(|a, b| a >= b) && later.iter().all(|taken| *taken >= 1), "{later:?}");
    assert_eq!(shares.tenants(), 6);
    let stats = shares.stats()[Resource::Views as usize];
    assert_eq!((stats.most, stats.taken, stats.refused_total), (750, 750 + later.iter().sum::<u64>(), 6));
}

#[test]
fn the_rule_is_that_of_its_comment() {
    for percent in [1, 10, 50, 75, 99] {
        for (own, others, limit) in
            [(0, 0, 1), (3, 5, 20), (9, 0, 10), (10, 80, 100), (1, 98, 100), (0, 100, 100)]
        {
            let mut shares = Shares::new(percent);
            (0..own).for_each(|_| shares.take(tenant(1), Resource::KeptBlocks));
            (0..others).for_each(|_| shares.take(tenant(2), Resource::KeptBlocks));
            let free = f64::from(limit) - f64::from(own + others) - 1.0;
            let factor = f64::from(percent) / f64::from(100 - percent);
            let by_rule = free >= 0.0 && f64::from(own + 1) <= factor * free + 1e-9;
            let first = own == 0 && free >= 0.0;
            let told = shares.ask(tenant(1), Resource::KeptBlocks, 1, limit as u64).is_ok();
            assert_eq!(told, by_rule || first, "{percent} % of {limit}: {own} beside {others}");
        }
    }
}

#[test]
fn at_100_per_cent_only_the_limit_counts() {
    let mut shares = Shares::new(100);
    (0..10).for_each(|_| shares.take(tenant(1), Resource::PromisedBlocks));
    assert_eq!(shares.ask(tenant(1), Resource::Views, 1_000, 10), Ok(()));
    assert_eq!(shares.greediest(tenant(2)), None, "and no promise is broken");
}

#[test]
fn what_is_given_back_is_forgotten() {
    let mut shares = Shares::new(75);
    for resource in Resource::ALL {
        shares.take(tenant(1), resource);
        assert_eq!((shares.of(tenant(1), resource), shares.tenants()), (1, 1));
    }
    Resource::ALL.into_iter().for_each(|resource| shares.give(tenant(1), resource));
    assert_eq!((shares.tenants.len(), shares.taken), (0, [0; RESOURCES]));
}

#[test]
fn refusals_name_what_there_is_too_much_of_and_the_remedy() {
    let mut shares = Shares::new(50);
    fill(&mut shares, tenant(1), 10);
    let error = shares.ask(tenant(1), Resource::Views, 1, 10).unwrap_err();
    assert!(error.retryable());
    let text = error.to_string();
    for sign in ["views", "5 of the 10", "hint:", "tenant_percent"] {
        assert!(text.contains(sign), "`{sign}` is missing in {text}");
    }
}
