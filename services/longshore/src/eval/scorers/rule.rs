//! What is compared: a scorer, a selector, and whether means stand for what is not visited. All rules have the same guards.

use anyhow::{Context, Result};
use longshore_attention::{CpuExecutor, ExactBlock, PrefillPolicy, SparseWork, Visit};
use serde::Serialize;

use super::layer::{Layer, QueryTile, Truth};

/// Guards of all rules: the first block and the one before the tile's own; nothing else is exact.
const GUARDS: &str = "sink=1,local=1,dense_layers=0,min_positions=0,last_tiles=0";

/// Who judges blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Scorer {
    Pooled,
    RowNormalised,
    SecondOrder,
    PooledQuery,
    Antidiagonal,
    /// Knows what falls on each block: no policy, but the best that blocks can do.
    Oracle,
}

impl Scorer {
    pub(super) const ALL: [Self; 6] = [
        Self::Pooled,
        Self::RowNormalised,
        Self::SecondOrder,
        Self::PooledQuery,
        Self::Antidiagonal,
        Self::Oracle,
    ];

    /// As policies spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pooled => "pooled",
            Self::RowNormalised => "row-normalised",
            Self::SecondOrder => "second-order",
            Self::PooledQuery => "pooled-query",
            Self::Antidiagonal => "antidiagonal",
            Self::Oracle => "oracle",
        }
    }
}

/// Who decides by the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Selector {
    Alpha,
    Mass,
    TopK,
}

impl Selector {
    pub(super) const ALL: [Self; 3] = [Self::Alpha, Self::Mass, Self::TopK];

    /// As policies spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Alpha => "alpha",
            Self::Mass => "mass",
            Self::TopK => "top-k",
        }
    }

    /// The largest setting, which keeps (nearly) all of `blocks`.
    pub(super) fn most(self, blocks: usize) -> f64 {
        match self {
            Self::Alpha => 64.0,
            Self::Mass => 24.0,
            Self::TopK => blocks as f64,
        }
    }

    /// The value for a setting: the higher the setting, the more is visited. Alphas are 2^-setting, masses 1 − 2^-setting.
    pub(super) fn value(self, setting: f64) -> f64 {
        match self {
            Self::Alpha => (-setting).exp2(),
            Self::Mass => 1.0 - (-setting).exp2(),
            Self::TopK => setting.round(),
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Alpha => "alpha",
            Self::Mass => "gamma",
            Self::TopK => "k",
        }
    }
}

/// One combination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Rule {
    pub(super) scorer: Scorer,
    pub(super) selector: Selector,
    pub(super) correction: bool,
}

impl Rule {
    /// All of them; the oracle, whose energies no policy knows, by mass and by count only.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for scorer in Scorer::ALL {
            for selector in Selector::ALL {
                if scorer == Scorer::Oracle && selector == Selector::Alpha {
                    continue;
                }
                all.extend([true, false].map(|correction| Self { scorer, selector, correction }));
            }
        }
        all
    }

    /// As a person reads it.
    pub(super) fn name(self) -> String {
        let correction = if self.correction { " + means" } else { "" };
        format!("{} × {}{correction}", self.scorer.name(), self.selector.name())
    }

    /// The policy with this value; `None`: the oracle, which is none.
    pub(super) fn policy(self, value: f64) -> Result<Option<PrefillPolicy>> {
        if self.scorer == Scorer::Oracle {
            return Ok(None);
        }
        let (scorer, selector) = (self.scorer.name(), self.selector.name());
        let correction = if self.correction { "on" } else { "off" };
        let key = self.selector.key();
        let text = format!(
            "blocks:scorer={scorer},selector={selector},{key}={value},correction={correction},{GUARDS}"
        );
        PrefillPolicy::parse(&text, None).map(Some).context("a rule is a policy")
    }

    /// What a query tile visits by a policy of this rule, or, without one, by what is true.
    pub(super) fn plan(
        self,
        policy: Option<&PrefillPolicy>,
        value: f64,
        executor: &CpuExecutor,
        layer: &Layer,
        tile: &QueryTile,
        truth: &Truth,
    ) -> Result<SparseWork> {
        if let Some(policy) = policy {
            return Ok(layer.with_input(tile, |input| policy.plan(executor, input))?);
        }
        let rows = tile.data.len() / (layer.heads.query_heads() * layer.heads.head_dim);
        let lists = truth.masses.iter().map(|masses| {
            let mut blocks = match self.selector {
                Selector::TopK => heaviest(masses, value as usize, f64::INFINITY),
                Selector::Mass | Selector::Alpha => {
                    heaviest(masses, masses.len(), value * masses.iter().sum::<f64>())
                }
            };
            // The guards of the policies.
            if let [first, .., last] = &mut blocks[..] {
                (*first, *last) = (true, true);
            }
            (list(layer, tile.first_position + rows as u64, &blocks, self.correction), Vec::new())
        });
        Ok(SparseWork::new(layer.heads.kv_heads, vec![rows as u32], lists.collect())?)
    }
}

/// Marks the heaviest blocks, at most `most`, until their mass reaches `enough`; of equals the later one comes first.
fn heaviest(masses: &[f64], most: usize, enough: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..masses.len()).collect();
    order.sort_by(|&a, &b| masses[b].total_cmp(&masses[a]).then(b.cmp(&a)));
    let (mut chosen, mut reached) = (vec![false; masses.len()], 0.0);
    for block in order.into_iter().take(most) {
        if reached >= enough {
            break;
        }
        chosen[block] = true;
        reached += masses[block];
    }
    chosen
}

/// The list of a tile whose last row ends before position `end`: the chosen of the blocks before it and those it lies in.
fn list(layer: &Layer, end: u64, chosen: &[bool], correction: bool) -> Vec<Visit> {
    let (block_tokens, stripe) = (layer.block_tokens() as u64, layer.stripe_blocks());
    let seen = end.div_ceil(block_tokens) as usize;
    let mut visits = Vec::new();
    for first in (0..seen).step_by(stripe) {
        let blocks = first..seen.min(first + stripe);
        let visited = |block: usize| chosen.get(block).copied().unwrap_or(true);
        let before = visits.len();
        visits.extend(blocks.clone().filter(|block| visited(*block)).map(|block| {
            let first_position = block as u64 * block_tokens;
            let len = block_tokens.min(end - first_position) as u32;
            Visit::Block(ExactBlock { tile: block as u32, first_position, len })
        }));
        let keys = blocks.filter(|block| !visited(*block)).fold(0, |keys, block| keys | 1 << (block - first));
        if correction && keys != 0 {
            visits.push(Visit::Means { tile: (first / stripe) as u32, first: 0, keys });
        }
        if visits.len() > before {
            visits.push(Visit::EndOfStripe);
        }
    }
    visits
}

/// The same lists without means.
pub(super) fn without_means(work: &SparseWork) -> Result<SparseWork> {
    let row_ends = (0..work.tiles()).map(|tile| work.rows(tile).end as u32).collect();
    let mut lists = Vec::with_capacity(work.kv_heads() * work.tiles());
    for kv_head in 0..work.kv_heads() {
        for tile in 0..work.tiles() {
            let mut visits = Vec::new();
            for visit in work.list(kv_head, tile) {
                match visit {
                    Visit::Means { .. } => {}
                    // A stripe of which only means were visited is not there any more.
                    Visit::EndOfStripe if matches!(visits.last(), None | Some(Visit::EndOfStripe)) => {}
                    other => visits.push(*other),
                }
            }
            lists.push((visits, Vec::new()));
        }
    }
    Ok(SparseWork::new(work.kv_heads(), row_ends, lists)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heaviest_are_the_fewest() {
        let masses = [0.1, 0.5, 0.1, 0.3];
        assert_eq!(heaviest(&masses, 4, 0.8), [false, true, false, true]);
        assert_eq!(heaviest(&masses, 3, f64::INFINITY), [false, true, true, true]);
        assert_eq!(heaviest(&masses, 4, 0.0), [false; 4]);
    }

    #[test]
    fn every_rule_is_a_policy_at_both_ends() {
        let rules = Rule::all();
        assert_eq!(rules.len(), 5 * 3 * 2 + 2 * 2);
        for rule in rules {
            for setting in [0.0, rule.selector.most(512)] {
                let policy = rule.policy(rule.selector.value(setting)).unwrap();
                assert_eq!(policy.is_none(), rule.scorer == Scorer::Oracle, "{}", rule.name());
            }
        }
    }
}
