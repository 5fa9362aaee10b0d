//! A policy as text: names, presets, and the canonical form that is its fingerprint.

use std::sync::Arc;

use crate::Error;

use super::keys::Keys;
use super::{
    Blocks, Flex, Guards, HeadBudgets, HeadPattern, HeadPlan, Heads, Level, Method, PrefillPolicy, Scorer,
    Selector, invalid, shown,
};

/// Longest text.
const TEXT_MAX: usize = 4096;
/// Largest count of blocks, keys or tiles.
const COUNT_MAX: u64 = HeadPattern::BUDGET_MAX;
/// MInference's default for a head.
const VERTICALS: u64 = 1000;
const SLASHES: u64 = 6096;

/// Names with a line about each.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("exact", "visits everything"),
    ("faithful", "mean-corrected blocks, generous: for answers that must not change"),
    ("balanced", "mean-corrected blocks; or what a level of the head plan with this name says"),
    ("fast", "mean-corrected blocks, sparing, with skip-softmax"),
    (
        "blocks",
        "any scorer (pooled, row-normalised, second-order, pooled-query, antidiagonal) with any selector (alpha, mass, top-k)",
    ),
    ("xattention", "XAttention: antidiagonal sums, blocks up to a share of the mass"),
    (
        "flexprefill",
        "FlexPrefill: each head query-aware or vertical-slash, by how well pooling tells its mass",
    ),
    ("minference", "MInference: the deployment's head plan, or vertical-slash heads throughout"),
    ("streaming", "all heads see the beginning and the newest keys only"),
    ("heads", "the deployment's head plan (MInference JSON, DuoAttention TSV, or a level of budgets)"),
];

/// Values of the presets of `blocks`; what they do not say is the default of each key.
const PRESETS: &[(&str, &str)] = &[
    ("blocks", ""),
    ("faithful", "scorer=row-normalised,selector=mass,gamma=0.97,peak=0.1,dense_layers=0,last_tiles=8"),
    (
        "balanced",
        "scorer=row-normalised,selector=mass,gamma=0.9,max_blocks=64,peak=0.25,dense_layers=0,last_tiles=4",
    ),
    ("fast", "scorer=pooled,selector=alpha,alpha=0.1,dense_layers=0,last_tiles=4,skip=12"),
    (
        "xattention",
        "scorer=antidiagonal,stride=16,selector=mass,gamma=0.9,correction=off,sink=1,local=0,dense_layers=0",
    ),
];

#[derive(Clone, Copy)]
enum ScorerName {
    Pooled,
    RowNormalised,
    SecondOrder,
    PooledQuery,
    Antidiagonal,
}

#[derive(Clone, Copy)]
enum SelectorName {
    Alpha,
    Mass,
    TopK,
}

const SCORERS: &[(&str, ScorerName)] = &[
    ("pooled", ScorerName::Pooled),
    ("row-normalised", ScorerName::RowNormalised),
    ("second-order", ScorerName::SecondOrder),
    ("pooled-query", ScorerName::PooledQuery),
    ("antidiagonal", ScorerName::Antidiagonal),
];

const SELECTORS: &[(&str, SelectorName)] =
    &[("alpha", SelectorName::Alpha), ("mass", SelectorName::Mass), ("top-k", SelectorName::TopK)];

/// Keys of the skeleton: whoever gives one does not mean the budgets of a plan.
const BLOCK_KEYS: &[&str] = &[
    "scorer",
    "stride",
    "selector",
    "alpha",
    "gamma",
    "k",
    "max_blocks",
    "correction",
    "sink",
    "local",
    "escape",
    "peak",
    "levels",
];

const LEVELS: &[(&str, bool)] = &[("1", false), ("2", true)];

const SWITCH: &[(&str, bool)] = &[("on", true), ("off", false)];

pub(super) fn parse(text: &str, plan: Option<&HeadPlan>) -> Result<PrefillPolicy, Error> {
    if text.len() > TEXT_MAX {
        return invalid("policy", format!("has {} bytes, limit {TEXT_MAX}", text.len()));
    }
    let (name, rest) = text.trim().split_once(':').unwrap_or((text.trim(), ""));
    if let Some((_, preset)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
        let mut keys = Keys::new(rest, preset)?;
        let method = match planned_preset(name, &mut keys, plan)? {
            Some(level) => {
                keys.otherwise("in place of the head plan's level", BLOCK_KEYS);
                Method::Budgets(level)
            }
            None => Method::Blocks(blocks(&mut keys)?),
        };
        let guards = guards(&mut keys, 2)?;
        keys.finish(name)?;
        return Ok(PrefillPolicy { method, guards });
    }
    let mut keys = Keys::new(rest, "")?;
    let heads = match name {
        "exact" => {
            keys.finish(name)?;
            return Ok(PrefillPolicy::exact());
        }
        "flexprefill" => {
            let (method, guards) = (Method::Flex(flex(&mut keys)?), guards(&mut keys, 0)?);
            keys.finish(name)?;
            return Ok(PrefillPolicy { method, guards });
        }
        "streaming" => streaming(&mut keys)?,
        "minference" => match plan.filter(|plan| plan.budgets().is_none()) {
            Some(plan) => planned(&mut keys, plan)?,
            None => vertical_slash(&mut keys)?,
        },
        "heads" => match plan.map(|plan| (plan, plan.budgets())) {
            Some((_, Some(budgets))) => {
                let method = Method::Budgets(level(&mut keys, budgets)?);
                let guards = guards(&mut keys, 0)?;
                keys.finish(name)?;
                return Ok(PrefillPolicy { method, guards });
            }
            Some((plan, None)) => planned(&mut keys, plan)?,
            None => return invalid("plan", "is missing: the policy `heads` needs a head plan"),
        },
        _ => {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            let problem = format!("has the name {}, must be one of: {}", shown(name), names.join(", "));
            return invalid("policy", problem);
        }
    };
    let guards = guards(&mut keys, 0)?;
    keys.finish(name)?;
    Ok(PrefillPolicy { method: Method::Heads(heads), guards })
}

/// A rule of the skeleton by its keys alone, over those that are shared.
pub(super) fn read_blocks(given: &str, shared: &str) -> Result<Blocks, Error> {
    let mut keys = Keys::new(given, shared)?;
    let rule = blocks(&mut keys)?;
    keys.finish("blocks")?;
    // A key that only the shared part has is forgiven where a head's scorer or selector does not ask for it, but it must be one.
    match Keys::new(shared, "")?.stranger(BLOCK_KEYS) {
        Some(key) => {
            invalid("blocks", format!("has the key {}, it has: {}", shown(key), BLOCK_KEYS.join(", ")))
        }
        None => Ok(rule),
    }
}

/// The level of the deployment's budgets that a preset means, unless `plan=off` or a key of the skeleton says otherwise.
fn planned_preset(
    name: &str,
    keys: &mut Keys<'_>,
    plan: Option<&HeadPlan>,
) -> Result<Option<Arc<Level>>, Error> {
    let wanted = keys.text("plan");
    let level = plan.and_then(HeadPlan::budgets).and_then(|budgets| budgets.level(name));
    match (wanted, level) {
        (Some("off"), _) => Ok(None),
        (None, Some(level)) if !keys.gives(BLOCK_KEYS) => Ok(Some(Arc::new(level.clone()))),
        (None, _) => Ok(None),
        (Some(wanted), _) => {
            invalid("plan", format!("is {}, must be `off` here or not be given", shown(wanted)))
        }
    }
}

/// The level of a plan that `plan` (by its digest, of a fingerprint) or `level` names, or the only one.
fn level(keys: &mut Keys<'_>, budgets: &HeadBudgets) -> Result<Arc<Level>, Error> {
    let (digest, name) = (keys.text("plan"), keys.text("level"));
    let named = match name {
        Some(name) => budgets.level(name),
        None if digest.is_none() => budgets.only(),
        None => digest.and_then(|digest| budgets.with_digest(digest)),
    };
    let found = named.filter(|level| digest.is_none_or(|digest| digest == level.digest()));
    match (found, digest, name) {
        (Some(level), ..) => Ok(Arc::new(level.clone())),
        (None, Some(digest), _) => invalid(
            "plan",
            format!("is {}, the head plan of this deployment has no such level of budgets", shown(digest)),
        ),
        (None, None, name) => invalid(
            "level",
            format!(
                "is {}, must be one of: {}",
                name.map_or_else(|| "missing".to_owned(), shown),
                budgets.names()
            ),
        ),
    }
}

fn blocks(keys: &mut Keys<'_>) -> Result<Blocks, Error> {
    let scorer = match keys.word("scorer", SCORERS, ScorerName::Pooled)? {
        ScorerName::Pooled => Scorer::Pooled,
        ScorerName::RowNormalised => Scorer::RowNormalised,
        ScorerName::SecondOrder => Scorer::SecondOrder,
        ScorerName::PooledQuery => Scorer::PooledQuery,
        ScorerName::Antidiagonal => Scorer::Antidiagonal(keys.word("stride", &[("8", 8), ("16", 16)], 16)?),
    };
    let selector = match keys.word("selector", SELECTORS, SelectorName::Alpha)? {
        // −0 is 0: equal policies have equal texts.
        SelectorName::Alpha => Selector::Alpha(keys.number("alpha", 0.1, 0.0..=1.0)? + 0.0),
        SelectorName::Mass => Selector::Mass(keys.number("gamma", 0.9, 0.0..=1.0)? + 0.0),
        SelectorName::TopK => Selector::TopK(keys.number("k", 64, 0..=COUNT_MAX as usize)?),
    };
    let shares = !matches!(scorer, Scorer::Pooled | Scorer::PooledQuery);
    let each_row = matches!(scorer, Scorer::Pooled | Scorer::RowNormalised | Scorer::SecondOrder);
    Ok(Blocks {
        scorer,
        selector,
        max_blocks: keys.switched("max_blocks", 1..=COUNT_MAX)?,
        correction: keys.word("correction", SWITCH, true)?,
        sink: keys.number("sink", 2, 0..=COUNT_MAX)?,
        local: keys.number("local", 4, 0..=COUNT_MAX)?,
        // −0 is 0: equal policies have equal texts.
        escape: keys.switched("escape", -1.0..=1.0)?.map(|escape: f32| escape + 0.0),
        // Only some scorers know shares of rows.
        peak: if shares { keys.switched("peak", f32::MIN_POSITIVE..=1.0)? } else { None },
        // And only some score mean keys row by row.
        two_levels: each_row && keys.word("levels", LEVELS, false)?,
    })
}

fn guards(keys: &mut Keys<'_>, dense_layers: usize) -> Result<Guards, Error> {
    Ok(Guards {
        dense_layers: keys.number("dense_layers", dense_layers, 0..=10_000)?,
        min_positions: keys.number("min_positions", 4096, 0..=1 << 40)?,
        last_tiles: keys.number("last_tiles", 4, 0..=COUNT_MAX as u32)?,
        skip: keys.switched("skip", f32::MIN_POSITIVE..=1e6)?,
    })
}

fn streaming(keys: &mut Keys<'_>) -> Result<Heads, Error> {
    Ok(Heads::Uniform(HeadPattern::Streaming {
        sink: keys.number("sink", 64, 0..=COUNT_MAX)?,
        recent: keys.number("recent", 256, 1..=COUNT_MAX)?,
    }))
}

fn flex(keys: &mut Keys<'_>) -> Result<Flex, Error> {
    Ok(Flex {
        // −0 is 0: equal policies have equal texts.
        gamma: keys.number("gamma", 0.95, 0.0..=1.0)? + 0.0,
        tau: keys.number("tau", 0.1, 0.0..=1.0)? + 0.0,
        budget: keys.number("budget", 512, 0..=COUNT_MAX)?,
    })
}

fn vertical_slash(keys: &mut Keys<'_>) -> Result<Heads, Error> {
    Ok(Heads::Uniform(HeadPattern::VerticalSlash {
        vertical: keys.number("vertical", VERTICALS, 0..=COUNT_MAX)?,
        slash: keys.number("slash", SLASHES, 0..=COUNT_MAX)?,
    }))
}

/// A key `plan` (of a fingerprint) must be the digest of the plan.
fn planned(keys: &mut Keys<'_>, plan: &HeadPlan) -> Result<Heads, Error> {
    let digest = plan.digest();
    match keys.text("plan") {
        Some(wanted) if wanted != digest => invalid(
            "plan",
            format!("is {}, the head plan of this deployment has the digest {digest}", shown(wanted)),
        ),
        _ => Ok(Heads::Planned(Arc::new(plan.clone()))),
    }
}

pub(super) fn canonical(policy: &PrefillPolicy) -> String {
    let method = match &policy.method {
        Method::Exact => return "exact".to_owned(),
        Method::Blocks(blocks) => canonical_blocks(blocks),
        Method::Flex(Flex { gamma, tau, budget }) => {
            format!("flexprefill:gamma={gamma},tau={tau},budget={budget}")
        }
        Method::Budgets(level) => format!("heads:plan={}", level.digest()),
        Method::Heads(Heads::Planned(plan)) => format!("heads:plan={}", plan.digest()),
        Method::Heads(Heads::Uniform(HeadPattern::Streaming { sink, recent })) => {
            format!("streaming:sink={sink},recent={recent}")
        }
        Method::Heads(Heads::Uniform(HeadPattern::VerticalSlash { vertical, slash })) => {
            format!("minference:vertical={vertical},slash={slash}")
        }
        Method::Heads(Heads::Uniform(HeadPattern::Dense | HeadPattern::BlockSparse { .. })) => {
            unreachable!("no name makes such a policy")
        }
    };
    let Guards { dense_layers, min_positions, last_tiles, skip } = policy.guards;
    let skip = switched(skip);
    format!(
        "{method},dense_layers={dense_layers},min_positions={min_positions},last_tiles={last_tiles},skip={skip}"
    )
}

pub(super) fn canonical_blocks(blocks: &Blocks) -> String {
    let Blocks { scorer, selector, max_blocks, correction, sink, local, escape, peak, two_levels } = *blocks;
    // Policies without what came later keep the texts that they had.
    let levels = if two_levels { ",levels=2" } else { "" };
    let peak = peak.map_or_else(String::new, |peak| format!(",peak={peak}"));
    let scorer = match scorer {
        Scorer::Pooled => "pooled".to_owned(),
        Scorer::RowNormalised => "row-normalised".to_owned(),
        Scorer::SecondOrder => "second-order".to_owned(),
        Scorer::PooledQuery => "pooled-query".to_owned(),
        Scorer::Antidiagonal(stride) => format!("antidiagonal,stride={stride}"),
    };
    let selector = match selector {
        Selector::Alpha(alpha) => format!("alpha,alpha={alpha}"),
        Selector::Mass(gamma) => format!("mass,gamma={gamma}"),
        Selector::TopK(k) => format!("top-k,k={k}"),
    };
    let most = max_blocks.map_or_else(String::new, |most| format!(",max_blocks={most}"));
    let (correction, escape) = (if correction { "on" } else { "off" }, switched(escape));
    format!(
        "blocks:scorer={scorer},selector={selector}{most},correction={correction},sink={sink},local={local},escape={escape}{peak}{levels}"
    )
}

fn switched(value: Option<f32>) -> String {
    value.map_or_else(|| "off".to_owned(), |value| value.to_string())
}
