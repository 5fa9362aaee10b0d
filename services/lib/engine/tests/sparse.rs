//! Sparse prefill in the walk: exact where it must be, the same whatever the chunks, and refused where it cannot be.

#[path = "support/world.rs"]
mod support;

use std::sync::Arc;

use longshore_attention::{KvDtype, PrefillPolicy};
use longshore_engine::{AttentionProbe, Logits, Sequence, StepInput, StepObserver, testing::tokens};
use longshore_fabric::{CallContext, Code};

use support::{BLOCK, World, bits};

fn policy(text: &str) -> Arc<PrefillPolicy> {
    Arc::new(PrefillPolicy::parse(text, None).expect("the text is a policy"))
}

const SPARSE: &str =
    "blocks:scorer=row-normalised,selector=top-k,k=1,sink=0,local=0,dense_layers=1,min_positions=64";

fn sparse(world: &World, text: &str, dense_from: u64) -> Sequence {
    let mut sequence = world.empty();
    sequence.set_prefill(policy(text), dense_from).expect("stripes are small");
    sequence
}

/// How much of the causal attention was visited, and the probes seen.
#[derive(Default)]
struct Watch {
    visited: u64,
    causal: u64,
    layers: Vec<usize>,
}

impl StepObserver for Watch {
    fn layer_done(&mut self, _: usize, _: &[StepInput<'_>]) -> Result<(), longshore_engine::Error> {
        Ok(())
    }

    fn probes(&self) -> bool {
        true
    }

    fn probe(&mut self, probe: &AttentionProbe<'_>) {
        let pairs = probe.work.visited_pairs(&probe.plan.queries);
        self.visited += pairs.keys;
        self.causal += pairs.causal;
        self.layers.push(probe.layer);
        assert_eq!(probe.output.len(), probe.plan.queries.data.len());
    }
}

fn compute(world: &World, sequence: &mut Sequence, tokens: &[u32], chunk: usize) -> Watch {
    let mut watch = Watch::default();
    for part in tokens.chunks(chunk) {
        let input = StepInput { sequence, tokens: part, logits: Logits::All };
        let outputs = world.cluster.engine.step(&CallContext::new("test"), &mut [input], &mut watch);
        let logits = outputs.expect("the step runs").remove(0).expect("nothing is remote").expect("wanted");
        assert_eq!(logits.into_all().len() % part.len(), 0, "logits of every row");
    }
    watch
}

#[test]
fn chunks_of_whole_tiles_change_no_bit() {
    let prompt = tokens(11, 320);
    for dtype in [KvDtype::F32, KvDtype::Int8] {
        let world = World::new(0, dtype);
        let mut whole = sparse(&world, SPARSE, u64::MAX);
        let watch = compute(&world, &mut whole, &prompt, 320);
        assert!(watch.visited * 10 < watch.causal * 9, "{} of {} visited", watch.visited, watch.causal);
        assert_eq!(watch.layers, [0, 1, 2]);
        let tiles = world.full_tiles(&whole);
        for chunk in [32, 64, 96, 160] {
            let mut sequence = sparse(&world, SPARSE, u64::MAX);
            compute(&world, &mut sequence, &prompt, chunk);
            assert!(world.full_tiles(&sequence) == tiles, "chunks of {chunk}, {dtype:?}");
        }
        let (exact, _) = world.reference(&prompt);
        assert!(exact != tiles, "a sparse policy must change something here");
    }
}

#[test]
fn full_budgets_and_exact_rows_give_the_bits_of_exact() {
    let world = World::new(0, KvDtype::F16);
    let prompt = tokens(12, 256);
    let (tiles, logits) = world.reference(&prompt);
    let full = "blocks:alpha=0,dense_layers=0,min_positions=0";
    for (text, dense_from) in [(full, u64::MAX), (SPARSE, 0), ("balanced", u64::MAX)] {
        let mut sequence = sparse(&world, text, dense_from);
        let got = world.step(&mut sequence, &prompt).expect("logits were asked for");
        assert_eq!(bits(&got), bits(&logits), "{text}");
        assert!(world.full_tiles(&sequence) == tiles, "{text}");
    }
}

#[test]
fn a_fetched_prefix_is_as_good_as_a_computed_one() {
    let world = World::new(2, KvDtype::F16);
    let prompt = tokens(13, 256);
    world.store(&prompt[..128]);
    let suffix = |sequence: &mut Sequence| {
        sequence.set_prefill(policy(SPARSE), u64::MAX).expect("stripes are small");
        compute(&world, sequence, &prompt[128..], 64);
        world.full_tiles(sequence)
    };
    let mut fetched = world.fetch(&prompt[..128]).expect("the blocks are there");
    let mut computed = world.empty();
    world.step(&mut computed, &prompt[..128]);
    assert!(suffix(&mut fetched) == suffix(&mut computed));
}

#[test]
fn blocks_on_shards_are_refused_until_their_summaries_are_here() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(14, 4 * BLOCK);
    world.store(&prompt);
    let antidiagonal = "blocks:scorer=antidiagonal,stride=8,min_positions=0";
    for (text, hint) in [(SPARSE, "load the summaries"), (antidiagonal, "fetch the prefix")] {
        let mut sequence = world.open(&prompt[..2 * BLOCK]);
        sequence.set_prefill(policy(text), u64::MAX).expect("stripes are small");
        let error = world.try_step(&mut sequence, &prompt[2 * BLOCK..]).expect_err("blocks are remote");
        assert_eq!(error.kind(), Code::InvalidArgument);
        assert!(error.to_string().contains(hint), "{error}");
    }
    let mut sequence = world.open(&prompt[..2 * BLOCK]);
    sequence.set_prefill(policy(SPARSE), u64::MAX).expect("stripes are small");
    sequence.set_prefill(Arc::new(PrefillPolicy::exact()), 0).expect("exact needs nothing");
    assert!(world.step(&mut sequence, &prompt[2 * BLOCK..]).is_some(), "the sequence is as good as new");
}
