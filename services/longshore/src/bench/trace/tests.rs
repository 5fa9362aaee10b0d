//! Replays against slow and obvious ones, the optimum against all there is to try, lines that are no trace.

use std::{collections::HashMap, io::Cursor};

use longshore_blocks::{AdmissionRule, pool::Eviction};

use super::{
    bound::hazard_bound,
    generate::generate,
    optimum::{belady, first_touched_lru},
    read::{Request, Trace, TraceError},
    replay::{Below, Cluster, Hits, replay},
};
use crate::random::Random;

const BLOCK_TOKENS: u64 = 16;

fn cluster(eviction: Eviction, capacity_blocks: u64, shards: u64) -> Cluster {
    Cluster { eviction, capacity_blocks, shards, stripe_blocks: 4, retention_ms: 1, disk: None }
}

fn made(requests: usize) -> Trace {
    generate(requests, BLOCK_TOKENS, 7).expect("made-up traces are valid")
}

/// A trace of prompts that are paths in a tree of few blocks, by their ids.
fn small(seed: u64, requests: usize) -> Trace {
    let mut random = Random::new(seed);
    let request = |at: usize| {
        let mut blocks = vec![1];
        while blocks.len() < 3 && random.below(4) > 0 {
            blocks.push(blocks[blocks.len() - 1] * 2 + random.below(2) as u64);
        }
        let input_tokens = blocks.len() as u64 * BLOCK_TOKENS;
        Request { timestamp_ms: at as u64, input_tokens, blocks }
    };
    Trace::of((0..requests).map(request).collect(), BLOCK_TOKENS).expect("paths of a tree")
}

/// LRU as a list: the least recently used block is at its front. The tail of a prompt is used before its head.
fn lru_list(trace: &Trace, capacity: usize) -> Hits {
    let mut list: Vec<u64> = Vec::new();
    let mut hits = Hits::default();
    for request in &trace.requests {
        let found = request.blocks.iter().take_while(|block| list.contains(block)).count();
        hits.add(request, found, trace.block_tokens);
        for block in request.blocks.iter().take(capacity).rev() {
            list.retain(|held| held != block);
            list.push(*block);
        }
        list.drain(..list.len().saturating_sub(capacity));
    }
    hits
}

/// The most hits from here on, of all ways to drop blocks.
fn best(
    trace: &Trace,
    at: usize,
    held: &[u64],
    capacity: usize,
    known: &mut HashMap<(usize, Vec<u64>), u64>,
) -> u64 {
    let Some(request) = trace.requests.get(at) else { return 0 };
    if let Some(hits) = known.get(&(at, held.to_vec())) {
        return *hits;
    }
    let found = request.blocks.iter().take_while(|block| held.contains(block)).count() as u64;
    let mut there: Vec<u64> = held.iter().chain(&request.blocks).copied().collect();
    there.sort_unstable();
    there.dedup();
    let subsets = (0u32..1 << there.len()).filter(|subset| subset.count_ones() as usize <= capacity);
    let kept = subsets.map(|subset| {
        let kept: Vec<u64> = (0..there.len()).filter(|i| subset >> i & 1 == 1).map(|i| there[i]).collect();
        best(trace, at + 1, &kept, capacity, known)
    });
    let hits = found + kept.max().unwrap_or(0);
    known.insert((at, held.to_vec()), hits);
    hits
}

#[test]
fn lru_through_the_pool_is_lru_by_list() {
    let trace = made(400);
    for capacity in [60, 150, 400, 1_000, 10_000] {
        let expected = lru_list(&trace, capacity);
        let replayed = replay(&trace, &cluster(Eviction::Lru, capacity as u64, 1)).unwrap();
        assert_eq!(replayed, expected, "{capacity} blocks");
    }
}

#[test]
fn no_choice_of_blocks_beats_belady() {
    for seed in 0..20 {
        let trace = small(seed, 12);
        for capacity in 1..=4 {
            let all = best(&trace, 0, &[], capacity, &mut HashMap::new());
            assert_eq!(belady(&trace, capacity as u64).blocks, all, "seed {seed}, {capacity} blocks");
        }
    }
}

#[test]
fn every_policy_lies_between_nothing_and_the_optimum_and_finds_all_without_a_limit() {
    let trace = made(300);
    let unlimited = belady(&trace, trace.unique_blocks);
    for eviction in Eviction::ALL {
        for capacity in [40, 200, 800] {
            let optimum = belady(&trace, capacity).blocks;
            let found = replay(&trace, &cluster(eviction, capacity, 1)).unwrap().blocks;
            assert!(found > 0 && found <= optimum, "{} finds {found} of {optimum}", eviction.name());
        }
        let found = replay(&trace, &cluster(eviction, trace.unique_blocks, 1)).unwrap();
        assert_eq!(found, unlimited, "{} without a limit", eviction.name());
    }
}

#[test]
fn the_default_finds_more_than_lru_in_conversations() {
    let trace = generate(4_000, BLOCK_TOKENS, 1).unwrap();
    let capacity = trace.unique_blocks / 10;
    for shards in [1, 4] {
        let find = |eviction| replay(&trace, &cluster(eviction, capacity, shards)).unwrap().blocks;
        let (ours, lru) = (find(Eviction::Reuse), find(Eviction::Lru));
        assert!(ours > lru, "{ours} blocks against {lru}, {shards} shards");
    }
}

#[test]
fn shards_find_what_one_does_when_there_is_room() {
    let trace = made(200);
    let one = replay(&trace, &cluster(Eviction::Reuse, trace.unique_blocks, 1)).unwrap();
    let four = replay(&trace, &cluster(Eviction::Reuse, 4 * trace.unique_blocks, 4)).unwrap();
    assert_eq!(one, four);
}

#[test]
fn a_prompt_larger_than_the_cache_keeps_its_head() {
    let blocks: Vec<u64> = (0..10).collect();
    let request =
        |timestamp_ms| Request { timestamp_ms, input_tokens: 10 * BLOCK_TOKENS - 3, blocks: blocks.clone() };
    let trace = Trace::of(vec![request(0), request(9), request(9)], BLOCK_TOKENS).unwrap();
    let found = replay(&trace, &cluster(Eviction::Reuse, 6, 1)).unwrap();
    assert_eq!(found, Hits { blocks: 12, tokens: 12 * BLOCK_TOKENS, written: 0 });
    let all = replay(&trace, &cluster(Eviction::Reuse, 10, 1)).unwrap();
    assert_eq!(
        all,
        Hits { blocks: 20, tokens: 2 * (10 * BLOCK_TOKENS - 3), written: 0 },
        "the last block is not full"
    );
}

#[test]
fn the_bound_lies_between_the_default_and_the_optimum() {
    let trace = made(2_000);
    let capacity = trace.unique_blocks / 10;
    let bound = hazard_bound(&trace, &[capacity])[0];
    let ours = replay(&trace, &cluster(Eviction::Reuse, capacity, 1)).unwrap().blocks;
    assert!(ours <= bound && bound <= belady(&trace, trace.unique_blocks).blocks, "{ours} ≤ {bound}");
}

#[test]
fn made_up_traces_are_reproducible() {
    assert_eq!(made(300).requests, made(300).requests);
    assert_ne!(made(300).requests, generate(300, BLOCK_TOKENS, 8).unwrap().requests);
    assert_eq!(made(300).requests.len(), 300);
}

fn read(text: &str) -> Result<Trace, TraceError> {
    Trace::read(Cursor::new(text), 512)
}

#[test]
fn reads_what_mooncake_publishes() {
    let trace = read(
        "{\"timestamp\": 0, \"input_length\": 513, \"output_length\": 5, \"hash_ids\": [0, 7]}\n\
         \n{\"timestamp\": 3000, \"input_length\": 1, \"output_length\": 0, \"hash_ids\": [0], \"more\": {}}",
    );
    let trace = trace.unwrap();
    assert_eq!((trace.requests.len(), trace.blocks, trace.unique_blocks, trace.tokens), (2, 3, 2, 514));
    assert_eq!(trace.requests[1], Request { timestamp_ms: 3000, input_tokens: 1, blocks: vec![0] });
}

#[test]
fn lines_that_are_no_request_are_told_by_line_and_field() {
    let good = "{\"timestamp\": 5, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2]}\n";
    for (bad, message) in [
        ("{", "is no JSON object: EOF"),
        ("[1]", "is no JSON object: invalid type: sequence"),
        ("\u{0}", "is no JSON object"),
        ("{\"input_length\": 1, \"output_length\": 1, \"hash_ids\": [1]}", "`timestamp` is missing"),
        (
            "{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [1]}",
            "`timestamp` is `-1`",
        ),
        (
            "{\"timestamp\": 4, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [1]}",
            "`timestamp` is 4, the line before has 5",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": \"1\", \"output_length\": 1, \"hash_ids\": [1]}",
            "`input_length` is a string",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 1, \"output_length\": 1.5, \"hash_ids\": [1]}",
            "`output_length` is `1.5`",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": 1}",
            "`hash_ids` is `1`, must be an array",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [null]}",
            "`hash_ids` has null",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": []}",
            "`hash_ids` has 0 ids; 1 tokens in blocks of 512 are 1 blocks",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [2, 1]}",
            "`hash_ids` has `2` after another prefix",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1, 1]}",
            "`hash_ids` has `1` after another prefix",
        ),
        (
            "{\"timestamp\": 9, \"input_length\": 9, \"output_length\": 1, \"hash_ids\": [18446744073709551615]}",
            "`hash_ids` has `18446744073709551615`",
        ),
    ] {
        let error = read(&format!("{good}{bad}\n{good}")).unwrap_err().to_string();
        assert!(error.starts_with("line 2: ") && error.contains(message), "{bad}: {error}");
    }
    assert!(matches!(read(""), Err(TraceError::Empty)));
    assert!(matches!(read("\n \n"), Err(TraceError::Empty)));
}

#[test]
fn a_line_without_an_end_does_not_fill_the_memory() {
    let endless = std::io::BufReader::new(std::io::repeat(b' '));
    let error = Trace::read(endless, 512).unwrap_err();
    assert!(matches!(error, TraceError::TooLong { line: 1, .. }), "{error}");
}

/// The published traces are not part of this repository: `LONGSHORE_TRACES` names the folder that has them. The figures are
/// those of another program, whose LRU uses the head of a prompt first.
#[test]
fn finds_what_others_found_in_the_published_traces() {
    let Some(folder) = std::env::var_os("LONGSHORE_TRACES") else { return };
    let open = |name: &str| {
        let file = std::fs::File::open(std::path::Path::new(&folder).join(name)).unwrap();
        Trace::read(std::io::BufReader::new(file), 512).unwrap()
    };
    let trace = open("conversation_trace.jsonl");
    assert_eq!((trace.requests.len(), trace.blocks, trace.unique_blocks), (12_031, 288_500, 182_790));
    for (capacity, percent) in
        [(5_000, 11.0), (10_000, 21.1), (30_000, 32.6), (50_000, 35.5), (100_000, 36.4)]
    {
        let found = first_touched_lru(&trace, capacity).blocks as f64 / trace.blocks as f64 * 100.0;
        assert!((found - percent).abs() < 0.06, "{found} % of blocks at {capacity}");
    }
    // A few hundred requests through the pool, exactly.
    let few = Trace::of(trace.requests.into_iter().take(400).collect(), 512).unwrap();
    for capacity in [300, 1_000, 3_000] {
        let replayed = replay(&few, &cluster(Eviction::Lru, capacity as u64, 1)).unwrap();
        assert_eq!(replayed, lru_list(&few, capacity), "{capacity} blocks");
    }
}

#[test]
fn a_disk_finds_what_memory_lost_and_a_filter_writes_less() {
    let trace = made(600);
    let memory = trace.unique_blocks / 50;
    let with = |disk| {
        let cluster = Cluster { disk, ..cluster(Eviction::Reuse, memory, 2) };
        replay(&trace, &cluster).expect("made-up traces can be replayed")
    };
    let below = |times, rule| with(Some(Below { times, rule }));
    let (none, all) = (with(None), below(8, AdmissionRule::All));
    assert_eq!(none.written, 0);
    assert!(all.blocks > none.blocks + none.blocks / 10, "{none:?}, {all:?}");
    for rule in [AdmissionRule::SecondTouch, AdmissionRule::Frequency] {
        let some = below(8, rule);
        assert!(some.written < all.written && some.blocks > none.blocks, "{rule:?}: {some:?}, {all:?}");
    }
    // Nothing that was stored is lost, so nothing more can be found.
    let endless = below(1_000, AdmissionRule::All);
    assert_eq!(endless.blocks, belady(&trace, trace.unique_blocks).blocks);
}
