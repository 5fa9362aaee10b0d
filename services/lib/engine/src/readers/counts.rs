//! What decided which copy is read, counted since the start of a process.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{Distance, Standing};

/// What put the copy that is asked first before the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// There is no other.
    Only,
    /// The others failed lately.
    Failures,
    /// It lies in this process.
    Here,
    /// It lies on this host and the others do not.
    Host,
    /// It lies in this zone and the others do not.
    Zone,
    /// It has less to send to this process.
    Load,
    /// Nothing tells them apart: the order of the stripe.
    Stripe,
}

impl Decision {
    /// All of them, in the order of their declaration.
    const ALL: [(Self, &'static str); 7] = [
        (Self::Only, "only"),
        (Self::Failures, "failures"),
        (Self::Here, "here"),
        (Self::Host, "host"),
        (Self::Zone, "zone"),
        (Self::Load, "load"),
        (Self::Stripe, "stripe"),
    ];

    /// What decided between the first and the second.
    pub(super) fn between(first: Standing, second: Standing) -> Self {
        match first.distance {
            _ if first.avoided != second.avoided => Self::Failures,
            Distance::Here if first.distance != second.distance => Self::Here,
            Distance::Host if first.distance != second.distance => Self::Host,
            Distance::Zone if first.distance != second.distance => Self::Zone,
            _ if first.load != second.load => Self::Load,
            _ => Self::Stripe,
        }
    }
}

/// How often what decided which copy is asked first; clones share the counters.
#[derive(Debug, Clone, Default)]
pub struct ReadCounts(Arc<[AtomicU64; Decision::ALL.len()]>);

impl ReadCounts {
    pub(super) fn count(&self, decision: Decision) {
        self.0[decision as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All decisions by name, each with how often it was taken.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let count = |(decision, name): (Decision, &'static str)| {
            (name, self.0[decision as usize].load(Ordering::Relaxed))
        };
        Decision::ALL.into_iter().map(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_for_what_they_name() {
        for (at, (decision, name)) in Decision::ALL.into_iter().enumerate() {
            assert_eq!((decision as usize, format!("{decision:?}").to_lowercase().as_str()), (at, name));
        }
        let counts = ReadCounts::default();
        counts.count(Decision::Load);
        let counted: Vec<_> = counts.each().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("load", 1)]);
    }

    #[test]
    fn the_first_difference_decides() {
        use Distance::{Far, Here, Host, Zone};
        let at = |avoided, distance, load| Standing { avoided, distance, load };
        for (first, second, expected) in [
            (at(false, Far, 9), at(true, Here, 0), Decision::Failures),
            (at(false, Here, 9), at(false, Host, 0), Decision::Here),
            (at(true, Host, 9), at(true, Far, 0), Decision::Host),
            (at(false, Zone, 9), at(false, Far, 0), Decision::Zone),
            (at(false, Zone, 1), at(false, Zone, 2), Decision::Load),
            (at(false, Far, 1), at(false, Far, 2), Decision::Load),
            (at(false, Host, 1), at(false, Host, 1), Decision::Stripe),
        ] {
            assert_eq!(Decision::between(first, second), expected, "{first:?} {second:?}");
        }
    }
}
