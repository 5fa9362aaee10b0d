//! The comparisons of prefill attention.

use std::ops::Range;

use longshore_attention::HeadShape;

use super::Case;
use super::material::Random;
use super::prefill::{Keys, Numbers, Prefill, Way};
use crate::PageElement;

const PLAIN: Way =
    Way { scalar: false, wgmma: false, part_visits: None, earlier: false, apart: false, skip_below: None };

/// Largest relative error of a result in these elements.
fn limit(element: PageElement) -> f64 {
    match element {
        PageElement::F32 => 1e-5,
        PageElement::F16 => 2e-3,
        PageElement::Bf16 | PageElement::Int8 | PageElement::E4m3 => 8e-3,
    }
}

fn case(name: &str, prefill: Prefill) -> Case {
    let Prefill { element, tokens, heads, prefix, rows, seed, .. } = prefill;
    let HeadShape { kv_heads, group, head_dim } = heads;
    let by = if prefill.way.wgmma { ", by wgmma" } else { "" };
    let name = format!(
        "prefill {name}{by}, {element:?}, {kv_heads} × {group} heads of {head_dim}, pages of {tokens}, {rows} rows after {prefix} (seed {seed})"
    );
    // Without matrix units no weight is rounded.
    let limit = if prefill.way.scalar { limit(PageElement::F32) } else { limit(element) };
    Case::new(name, limit, move |device| prefill.run(device))
}

/// By warp groups: everything that heads of 64 are compared in, and the largest heads that they take.
pub(super) fn wgmma_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in [PageElement::F16, PageElement::Bf16] {
        let of = |head_dim| {
            let base = base(element, head_dim);
            Prefill { way: Way { wgmma: true, ..base.way }, ..base }
        };
        for head_dim in [64, 128] {
            let base = of(head_dim);
            cases.push(case("dense", base));
            cases.push(case("lists", Prefill { keys: Keys::Lists, rows: 50, seed: 2, ..base }));
        }
        let many =
            Prefill { prefix: 1000, rows: 90, heads: HeadShape { kv_heads: 1, ..of(128).heads }, ..of(128) };
        cases.push(case("dense, many stages", many));
        cases.extend(odd_cases(of(64)));
        cases.extend(RANDOM_SHAPES.map(|seed| case("of any shape", random_shape(of(64), seed))));
    }
    cases.into_iter().map(|case| case.only_on(90)).collect()
}

fn base(element: PageElement, head_dim: usize) -> Prefill {
    Prefill {
        seed: 1,
        element,
        tokens: 64,
        heads: HeadShape { kv_heads: 2, group: 3, head_dim },
        prefix: 100,
        rows: 70,
        stripe: 4,
        numbers: Numbers::Ordinary,
        keys: Keys::Dense,
        way: PLAIN,
    }
}

/// All of them, in sizes that the emulator has time for.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in [PageElement::F32, PageElement::F16, PageElement::Bf16] {
        for head_dim in [64, 80, 96, 128, 256] {
            let base = base(element, head_dim);
            cases.push(case("dense", base));
            cases.push(case("lists", Prefill { keys: Keys::Lists, rows: 50, seed: 2, ..base }));
        }
    }
    for element in [PageElement::F32, PageElement::F16, PageElement::Bf16] {
        cases.extend(odd_cases(base(element, 64)));
    }
    for element in [PageElement::F16, PageElement::Bf16] {
        let base = Prefill { way: Way { scalar: true, ..PLAIN }, rows: 33, ..base(element, 80) };
        cases.push(case("dense, scalar", base));
        cases.push(case("lists, scalar", Prefill { keys: Keys::Lists, ..base }));
    }
    cases
}

/// Seeds of shapes by chance.
const RANDOM_SHAPES: Range<u64> = 20..24;

fn random_shape(base: Prefill, seed: u64) -> Prefill {
    let mut random = Random(seed);
    let mut one_of = |choices: &[usize]| choices[random.below(choices.len())];
    let heads = HeadShape {
        kv_heads: one_of(&[1, 2, 3]),
        group: one_of(&[1, 2, 3, 4, 5, 6, 7, 8, 12]),
        head_dim: one_of(&[64, 128]),
    };
    let (tokens, stripe) = (one_of(&[16, 32, 64, 128, 256]), one_of(&[1, 3, 4, 8, 20]));
    let (prefix, rows) =
        (one_of(&[0, 1, 15, 63, 64, 100, 257, 600]), one_of(&[1, 2, 17, 31, 32, 33, 64, 75]));
    let numbers = [Numbers::Ordinary, Numbers::Extreme, Numbers::Equal][one_of(&[0, 0, 0, 1, 2])];
    let keys = [Keys::Dense, Keys::Lists, Keys::Biased][one_of(&[0, 1, 1, 1, 2])];
    let parts = one_of(&[0, 0, 1, 2, 5]) as u64;
    let way = Way {
        part_visits: (parts > 0).then_some(parts),
        earlier: one_of(&[0, 1]) == 1,
        skip_below: (keys == Keys::Lists && one_of(&[0, 1]) == 1).then_some(40),
        ..base.way
    };
    Prefill { seed, tokens, heads, prefix, rows, stripe, numbers, keys, way, ..base }
}

/// Shapes that are none of the usual.
fn odd_cases(base: Prefill) -> Vec<Case> {
    let heads = |kv_heads, group| HeadShape { kv_heads, group, ..base.heads };
    let lists = Prefill { keys: Keys::Lists, ..base };
    let extreme_lists = Prefill { numbers: Numbers::Extreme, heads: heads(1, 4), seed: 9, ..lists };
    let skipping = Way { skip_below: Some(40), ..base.way };
    let parted = Way { part_visits: Some(1), earlier: true, ..base.way };
    vec![
        case("one row", Prefill { rows: 1, prefix: 0, heads: heads(1, 1), ..base }),
        case("one row after many", Prefill { rows: 1, prefix: 200, heads: heads(2, 7), ..base }),
        case("small pages", Prefill { tokens: 16, heads: heads(1, 4), prefix: 37, ..base }),
        case("large pages", Prefill { tokens: 256, heads: heads(1, 8), prefix: 300, rows: 17, ..base }),
        case("many heads for each of KV", Prefill { heads: heads(1, 40), rows: 9, ..base }),
        case("parts onto earlier keys", Prefill { way: parted, heads: heads(1, 4), ..base }),
        case("pages far apart", Prefill { way: Way { apart: true, ..base.way }, heads: heads(1, 2), ..base }),
        case("lists in parts onto earlier keys", Prefill { way: parted, seed: 3, ..lists }),
        case("lists of one head", Prefill { heads: heads(3, 1), tokens: 16, stripe: 20, seed: 4, ..lists }),
        case(
            "lists of seven heads",
            Prefill { heads: heads(1, 7), tokens: 32, stripe: 32, seed: 5, ..lists },
        ),
        case(
            "lists, means of many",
            Prefill { heads: heads(1, 2), tokens: 16, stripe: 96, seed: 6, prefix: 2000, rows: 8, ..lists },
        ),
        case("columns with bias", Prefill { keys: Keys::Biased, heads: heads(1, 4), seed: 7, ..base }),
        case("extreme logits", Prefill { numbers: Numbers::Extreme, heads: heads(1, 4), seed: 8, ..base }),
        case("extreme logits, lists", extreme_lists),
        case("extreme logits, blocks left out", Prefill { way: skipping, ..extreme_lists }),
        case("equal logits", Prefill { numbers: Numbers::Equal, heads: heads(1, 4), seed: 10, ..base }),
        case(
            "equal keys and values",
            Prefill { numbers: Numbers::Same, heads: heads(1, 4), seed: 12, ..base },
        ),
    ]
}

/// The shapes of models, with enough keys that lists are cut.
pub(super) fn large_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in [PageElement::F16, PageElement::Bf16] {
        for (kv_heads, group, head_dim) in [(8, 4, 128), (4, 7, 128), (3, 3, 64), (2, 8, 256)] {
            let heads = HeadShape { kv_heads, group, head_dim };
            let base =
                Prefill { heads, prefix: 2_000, rows: 200, stripe: 32, seed: 11, ..base(element, head_dim) };
            cases.push(case("dense", base));
            cases.push(case("lists", Prefill { keys: Keys::Lists, ..base }));
        }
        // As many visits as are ever added up one after the other.
        let heads = HeadShape { kv_heads: 1, group: 1, head_dim: 64 };
        let way = Way { part_visits: Some(2048), ..PLAIN };
        let base =
            Prefill { heads, prefix: 200_000, rows: 33, numbers: Numbers::Same, way, ..base(element, 64) };
        cases.push(case("sums as long as they get", base));
    }
    cases
}
