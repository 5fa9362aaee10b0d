//! Which selections are compared.

use longshore_attention::HeadShape;

use super::Case;
use super::pages::{Rule, choose};
use super::plan::{Prompt, energies, plan};
use super::select::{Rule as SelectRule, WITH_NAN, select};
use super::visits::{Shape, visits};
use crate::{PageElement, PageShape, SelectGuards, Selector, StripeMeans};

fn heads(kv_heads: usize, group: usize, head_dim: usize) -> HeadShape {
    HeadShape { kv_heads, group, head_dim }
}

/// Comparisons of scores, selectors, lists and plans.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (selector, bounds) in [
        (Selector::Alpha(0.1), &[3, 500][..]),
        (Selector::Alpha(0.0), &[0]),
        (Selector::TopK(0), &[]),
        (Selector::TopK(40), &[7]),
        (Selector::TopK(1000), &[]),
        (Selector::Mass(0.0), &[]),
        (Selector::Mass(0.6), &[5, 500]),
        (Selector::Mass(0.97), &[40]),
        (Selector::Mass(1.0), &[9]),
    ] {
        for most in bounds.iter().copied().chain([u32::MAX]) {
            cases.extend([0, 5, WITH_NAN].map(|levels| selection((selector, most), levels)));
        }
    }
    visits_of_bits(&mut cases);
    scores(&mut cases);
    plans(&mut cases);
    for (element, bounds, sum) in
        [(PageElement::F16, true, false), (PageElement::Bf16, false, true), (PageElement::F32, true, true)]
    {
        let rule = Rule { heads: heads(2, 3, 80), element, bounds, sum };
        let by = if bounds { "bounds" } else { "means" };
        let name = format!("pages by {by} {element:?}, {}", if sum { "sum" } else { "largest" });
        cases.push(Case::new(name, 0.0, move |device| choose(device, &rule)));
    }
    cases
}

/// A selector over lists of energies.
fn selection(rule: SelectRule, levels: usize) -> Case {
    let bound = if rule.1 == u32::MAX { String::new() } else { format!(", at most {},", rule.1) };
    let energies = match levels {
        0 => "different",
        WITH_NAN => "NaN and other",
        _ => "equal",
    };
    let name = format!("select {:?}{bound} of {energies} energies", rule.0);
    Case::new(name, 0.0, move |device| select(device, rule, levels))
}

/// Blocks that are shorter than a visit, as long and longer; means of stripes that fill their pages and of others.
fn visits_of_bits(cases: &mut Vec<Case>) {
    let full = StripeMeans { stripe_blocks: 32, page_keys: 32 };
    let odd = StripeMeans { stripe_blocks: 24, page_keys: 32 };
    let large = StripeMeans { stripe_blocks: 256, page_keys: 256 };
    for (block_tokens, keys, means) in [
        (16, 64, None),
        (16, 32, Some(odd)),
        (32, 64, Some(full)),
        (64, 64, Some(large)),
        (128, 32, Some(StripeMeans { stripe_blocks: 3, page_keys: 16 })),
        (256, 16, None),
    ] {
        let with = means.map_or("no means".to_owned(), |of| format!("means of {}", of.stripe_blocks));
        let name = format!("visits of {keys} keys, blocks of {block_tokens}, {with}");
        let shape = Shape { block_tokens, keys, means };
        cases.push(Case::new(name, 0.0, move |device| visits(device, &shape)));
    }
}

/// Energies: distances of logarithms.
fn scores(cases: &mut Vec<Case>) {
    for (element, heads) in [
        (PageElement::F32, heads(2, 3, 64)),
        (PageElement::F16, heads(1, 4, 128)),
        (PageElement::Bf16, heads(2, 1, 80)),
        (PageElement::F16, heads(1, 2, 256)),
    ] {
        cases.extend([false, true].map(|normalise| score(element, heads, normalise, 544)));
    }
}

/// Energies of three query tiles after `before` positions.
fn score(element: PageElement, heads: HeadShape, normalise: bool, before: usize) -> Case {
    let scorer = if normalise { "row-normalised" } else { "pooled" };
    let HeadShape { kv_heads, group, head_dim } = heads;
    let name = format!("score {scorer} {element:?} {kv_heads}×{group}×{head_dim} after {before}");
    Case::new(name, 1e-4, move |device| energies(device, &Prompt::new(heads, element, before, 3), normalise))
}

/// Longer prefixes at every head size of models.
pub(super) fn large_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in PageElement::FLOATS {
        for head_dim in PageShape::HEAD_DIMS {
            cases.extend(
                [false, true].map(|normalise| score(element, heads(2, 4, head_dim), normalise, 8_000)),
            );
        }
    }
    cases
}

/// Plans of f32 prompts by policies, against the CPU's.
fn plans(cases: &mut Vec<Case>) {
    let rules = "correction=off,dense_layers=0,min_positions=0,last_tiles=0";
    let guards = SelectGuards { sink: 2, local: 4, peak: None };
    let all = u32::MAX;
    for (policy, normalise, (selector, most), guards) in [
        ("scorer=pooled,selector=alpha,alpha=0.1".to_owned(), false, (Selector::Alpha(0.1), all), guards),
        (
            "scorer=pooled,selector=alpha,alpha=0.1,max_blocks=3".to_owned(),
            false,
            (Selector::Alpha(0.1), 3),
            guards,
        ),
        (
            "scorer=row-normalised,selector=mass,gamma=0.9,max_blocks=4".to_owned(),
            true,
            (Selector::Mass(0.9), 4),
            guards,
        ),
        (
            "scorer=row-normalised,selector=mass,gamma=0.9,peak=0.25".to_owned(),
            true,
            (Selector::Mass(0.9), all),
            SelectGuards { peak: Some(0.25), ..guards },
        ),
        ("scorer=row-normalised,selector=top-k,k=9".to_owned(), true, (Selector::TopK(9), all), guards),
    ] {
        let text = format!("blocks:{policy},{rules}");
        let run = move |device: &_| {
            let prompt = Prompt::new(heads(2, 3, 64), PageElement::F32, 512, 4);
            plan(device, &prompt, &text, (normalise, selector, most, guards))
        };
        cases.push(Case::new(format!("plan {policy}"), 0.0, run));
    }
}
