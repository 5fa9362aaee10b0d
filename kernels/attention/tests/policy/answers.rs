//! What rows of an answer visit, against the definition.

use std::collections::BTreeSet;

use longshore_attention::{HeadPattern, HeadPlan, HeadShape, PrefillPolicy, Streaming};

use crate::case::{Shape, generator, policy, seen};

/// Blocks by the definition: key by key.
fn wanted(rule: Streaming, first: u64, last: u64, block: u64) -> BTreeSet<u64> {
    let tile = first / 32 * 32;
    let near = |key: u64| key >= tile || tile - key < rule.recent;
    (0..=last).filter(|&key| key / block * block < rule.sink || near(key)).map(|key| key / block).collect()
}

fn visited(rule: Streaming, first: u64, last: u64, block: u64) -> BTreeSet<u64> {
    let [sink, recent] = rule.blocks(first, last, block);
    assert!(sink.is_empty() || sink.end < recent.start, "two runs with a gap: {sink:?} {recent:?}");
    assert!(recent.contains(&(last / block)), "a row sees itself");
    sink.chain(recent).collect()
}

#[test]
fn rows_visit_the_first_and_the_newest_blocks_of_their_query_tile() {
    for block in [16, 32, 64, 128] {
        for (sink, recent) in [(0, 1), (1, 33), (64, 256), (100, 16), (5000, 1), (0, 5000), (65, 300)] {
            let rule = Streaming { sink, recent };
            for first in (0..700).step_by(7) {
                for last in [first, first / 32 * 32 + 31] {
                    let what = format!("{rule:?}, rows {first} to {last}, blocks of {block}");
                    assert_eq!(visited(rule, first, last, block), wanted(rule, first, last, block), "{what}");
                }
            }
        }
    }
    // Far out nothing depends on the length but the place of the newest.
    let rule = Streaming { sink: 64, recent: 256 };
    assert_eq!(rule.blocks(1_000_000, 1_000_000, 64), [0..1, 15_621..15_626]);
}

/// An answer's rows see what a prompt's rows at the same positions would.
#[test]
fn answers_and_prompts_share_one_rule() {
    let streaming = policy("streaming:sink=40,recent=70,dense_layers=0,min_positions=0");
    for seed in 0..6 {
        let mut rng = generator(seed);
        let case = Shape::random(&mut rng, 700).case(&mut rng);
        let heads = streaming.answer_heads(0, case.shape.heads).unwrap().expect("all heads stream");
        let work = case.plan(&streaming);
        for (tile, kv_head) in
            (0..case.shape.tokens / 32).flat_map(|tile| (0..heads.len()).map(move |head| (tile, head)))
        {
            let rule = heads[kv_head].expect("all heads stream");
            let (first, block) = (32 * tile as u64, case.shape.block as u64);
            let blocks: BTreeSet<usize> =
                visited(rule, first, first + 31, block).into_iter().map(|block| block as usize).collect();
            assert_eq!(seen(&case, &work, 0, kv_head, tile).blocks, blocks, "tile {tile}, head {kv_head}");
        }
    }
}

const SHAPE: HeadShape = HeadShape { kv_heads: 2, group: 2, head_dim: 8 };

fn stream(sink: u64, recent: u64) -> HeadPattern {
    HeadPattern::Streaming { sink, recent }
}

fn planned(layers: Vec<Vec<HeadPattern>>, keys: &str) -> PrefillPolicy {
    let plan = HeadPlan::new(layers).unwrap();
    PrefillPolicy::parse(&format!("heads:{keys}"), Some(&plan)).unwrap()
}

#[test]
fn a_kv_head_streams_when_all_of_its_query_heads_do() {
    let slash = HeadPattern::VerticalSlash { vertical: 30, slash: 100 };
    let layers = vec![
        vec![stream(1, 90), stream(70, 64), stream(9, 9), HeadPattern::Dense],
        vec![HeadPattern::Dense, slash, slash, HeadPattern::BlockSparse { top: 4 }],
        vec![stream(4, 32), stream(4, 32), stream(8, 64), stream(8, 64)],
    ];
    let policy = planned(layers.clone(), "dense_layers=0");
    let heads = |layer: usize| policy.answer_heads(layer, SHAPE).unwrap();
    assert_eq!(heads(0), Some(vec![Some(Streaming { sink: 70, recent: 90 }), None]));
    assert_eq!(heads(1), None);
    let last = vec![Some(Streaming { sink: 4, recent: 32 }), Some(Streaming { sink: 8, recent: 64 })];
    assert_eq!(heads(2), Some(last.clone()));
    assert!(policy.streams_answers());
    // A plan of KV heads, as DuoAttention's.
    let of_kv_heads = planned(vec![vec![HeadPattern::Dense, stream(64, 256)]], "dense_layers=0");
    let found = of_kv_heads.answer_heads(0, SHAPE).unwrap();
    assert_eq!(found, Some(vec![None, Some(Streaming { sink: 64, recent: 256 })]));
    // The guards count in answers too.
    let guarded = planned(layers, "dense_layers=2,min_positions=100");
    assert_eq!(guarded.answer_heads(0, SHAPE).unwrap(), None);
    assert_eq!(guarded.answer_heads(2, SHAPE).unwrap(), Some(last));
    assert_eq!([5, 127, 128, 129].map(|prompt| guarded.answer_from(prompt)), [128, 128, 128, 129]);
}

#[test]
fn other_policies_visit_everything_in_answers() {
    for text in ["exact", "balanced", "fast", "xattention", "flexprefill", "minference"] {
        assert!(!policy(text).streams_answers(), "{text}");
        assert_eq!(policy(text).answer_heads(3, SHAPE).unwrap(), None, "{text}");
    }
    let dense = planned(vec![vec![HeadPattern::Dense; 4]], "dense_layers=0");
    assert!(!dense.streams_answers());
}

#[test]
fn plans_for_other_models_are_refused() {
    let policy = planned(vec![vec![stream(64, 256); 3]; 2], "dense_layers=0");
    for (layer, problem) in [(0, "has 3 heads, the model has 4 query heads and 2 KV heads"), (2, "2 layers")]
    {
        let error = policy.answer_heads(layer, SHAPE).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}
