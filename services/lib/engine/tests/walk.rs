//! The bits of the walk never depend on chunks, batches, shards, or on what is remote; and what fails, fails alone.

#[path = "support/world.rs"]
mod support;

use std::sync::atomic::Ordering;

use longshore_attention::KvDtype;
use longshore_engine::{
    EngineOptions, Logits, Sequence, StepInput, StepObserver,
    testing::{TestCluster, reference_tiles, tokens},
};
use longshore_fabric::CallContext;
use longshore_model::RowLogits;

use support::{BLOCK, World, bits};

#[test]
fn chunks_change_no_bit() {
    let world = World::new(0, KvDtype::F32);
    let prompt = tokens(1, 150);
    let (tiles, logits) = world.reference(&prompt);
    for chunk in [1, 7, 16, 40, 64, 149] {
        let mut sequence = world.empty();
        let mut last = None;
        for part in prompt.chunks(chunk) {
            last = world.step(&mut sequence, part);
        }
        assert_eq!(bits(&last.expect("there were chunks")), bits(&logits), "chunks of {chunk}");
        assert!(world.full_tiles(&sequence) == tiles, "tiles of chunks of {chunk}");
    }
}

#[test]
fn remote_and_local_blocks_give_the_same_bits_on_any_number_of_shards() {
    let prompt = tokens(2, 150);
    for (shards, dtype) in [(1, KvDtype::F32), (3, KvDtype::F32), (4, KvDtype::F16)] {
        let world = World::new(shards, dtype);
        let (_, logits) = world.reference(&prompt);
        world.store(&prompt);
        for remote in 0..=prompt.len() / BLOCK {
            let mut sequence = world.open(&prompt[..remote * BLOCK]);
            let got = world.step(&mut sequence, &prompt[remote * BLOCK..]).expect("logits were asked for");
            assert_eq!(bits(&got), bits(&logits), "{remote} remote blocks on {shards} shards, {dtype:?}");
        }
    }
}

#[test]
fn fetched_blocks_are_as_good_as_remote_ones() {
    let world = World::new(3, KvDtype::F16);
    let prompt = tokens(3, 120);
    let (tiles, logits) = world.reference(&prompt);
    world.store(&prompt);
    let mut sequence = world.fetch(&prompt[..5 * BLOCK]).expect("the blocks are there");
    assert_eq!(sequence.local_bytes(), 5 * sequence.block_bytes());
    let got = world.step(&mut sequence, &prompt[5 * BLOCK..]).expect("logits were asked for");
    assert_eq!(bits(&got), bits(&logits));
    assert!(world.full_tiles(&sequence) == tiles);
}

#[test]
fn blocks_may_move_to_the_shards_between_any_two_steps() {
    let world = World::new(3, KvDtype::F32);
    let prompt = tokens(4, 140);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..2 * BLOCK]);
    for (index, token) in prompt.iter().enumerate().skip(2 * BLOCK) {
        let got = world.step(&mut sequence, &[*token]).expect("logits were asked for");
        let (_, expected) = world.reference(&prompt[..=index]);
        assert_eq!(bits(&got), bits(&expected), "after {} tokens", index + 1);
        if index % 37 == 0 {
            world.append(&mut sequence, 2).expect("the blocks are there");
        }
    }
    assert!(sequence.remote_blocks() > 4, "blocks moved while the sequence grew");
}

#[test]
fn a_batch_gives_every_sequence_what_it_gets_alone() {
    let world = World::new(3, KvDtype::F32);
    // Different lengths, different parts remote, one of another tenant.
    let plan: [(u64, usize, usize, &[u8]); 5] = [
        (10, 150, 4, b""),
        (11, 20, 0, b""),
        (12, 97, 6, b"other"),
        (10, 150, 9, b""),
        (13, 64, 3, b"other"),
    ];
    let prompts: Vec<Vec<u32>> = plan.iter().map(|&(seed, length, ..)| tokens(seed, length)).collect();
    let mut sequences = Vec::new();
    let mut expected = Vec::new();
    for (&(_, _, remote, salt), prompt) in plan.iter().zip(&prompts) {
        world.store_as(salt, prompt);
        expected.push(world.reference_as(salt, prompt).1);
        sequences.push(world.open_as(salt, &prompt[..remote * BLOCK]).expect("the blocks are there"));
    }
    let queries = world.attends();
    let mut batch: Vec<StepInput<'_>> = sequences
        .iter_mut()
        .zip(&plan)
        .zip(&prompts)
        .map(|((sequence, &(_, _, remote, _)), prompt)| StepInput {
            sequence,
            tokens: &prompt[remote * BLOCK..],
            logits: Logits::Last,
        })
        .collect();
    let outputs =
        world.cluster.engine.step(&CallContext::new("test"), &mut batch, &mut ()).expect("the step runs");
    for (output, expected) in outputs.into_iter().zip(&expected) {
        let logits = output.expect("no shard fails").expect("logits were asked for").into_all();
        assert_eq!(bits(&logits), bits(expected));
    }
    // At most one query per shard, tenant and layer.
    assert!(world.attends() - queries <= 3 * 2 * 3, "queries of one shard are coalesced");
}

#[test]
fn small_waves_change_no_bit() {
    let prompt = tokens(5, 200);
    let plain = World::new(2, KvDtype::F32);
    let (_, logits) = plain.reference(&prompt);
    for wave_bytes in [1, 3_000, 20_000] {
        let options = EngineOptions { kv_dtype: KvDtype::F32, wave_bytes, ..EngineOptions::default() };
        let world = World::with_options(2, options);
        world.store(&prompt);
        let mut sequence = world.open(&prompt[..5 * BLOCK]);
        let got = world.step(&mut sequence, &prompt[5 * BLOCK..]).expect("logits were asked for");
        assert_eq!(bits(&got), bits(&logits), "waves of {wave_bytes} bytes");
    }
}

/// Collects final tiles as a sender would.
#[derive(Default)]
struct Collector {
    layers: Vec<usize>,
    tiles: longshore_engine::testing::Bodies,
}

impl StepObserver for Collector {
    fn layer_done(&mut self, layer: usize, batch: &[StepInput<'_>]) -> Result<(), longshore_engine::Error> {
        self.layers.push(layer);
        for block in batch[0].sequence.filling() {
            let tile = batch[0].sequence.tile_message(block, layer).expect("filled blocks are local");
            assert_eq!(tile.crc32c, longshore_blocks::crc32c(&tile.data));
            self.tiles.insert((tile.key, layer), tile.data.to_vec());
        }
        Ok(())
    }
}

#[test]
fn tiles_are_final_as_soon_as_their_layer_is_done() {
    let world = World::new(0, KvDtype::F16);
    let prompt = tokens(6, 6 * BLOCK);
    let (tiles, _) = world.reference(&prompt);
    let (mut sequence, mut collector) = (world.empty(), Collector::default());
    for part in prompt.chunks(40) {
        let input = StepInput { sequence: &mut sequence, tokens: part, logits: Logits::None };
        let outputs = world.cluster.engine.step(&CallContext::new("test"), &mut [input], &mut collector);
        outputs.expect("the step runs").remove(0).expect("nothing is remote");
    }
    assert_eq!(collector.layers, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    assert!(collector.tiles == tiles);
}

#[test]
fn the_reference_itself_attends_to_everything_before() {
    let world = World::new(0, KvDtype::F32);
    let mut prompt = tokens(7, 100);
    let (_, before) = world.reference(&prompt);
    prompt[0] = (prompt[0] + 1) % 97;
    let (_, after) = world.reference(&prompt);
    assert_ne!(bits(&before), bits(&after), "the first token matters to the last");
}

#[test]
fn sequences_are_told_apart_by_tenant() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(8, 2 * BLOCK);
    world.store_as(b"mine", &prompt);
    assert!(world.open_as(b"mine", &prompt).is_ok());
    assert!(world.open_as(b"theirs", &prompt).is_err());
}

#[test]
fn empty_input_and_unknown_tokens_are_refused_before_anything_changes() {
    let world = World::new(0, KvDtype::F32);
    let mut sequence = world.empty();
    for bad in [&[][..], &[97][..], &[1, u32::MAX][..]] {
        let input = StepInput { sequence: &mut sequence, tokens: bad, logits: Logits::None };
        let error = world
            .cluster
            .engine
            .step(&CallContext::new("test"), &mut [input], &mut ())
            .expect_err("it is bad");
        assert_eq!(error.kind(), longshore_fabric::Code::InvalidArgument, "{error}");
    }
    assert!(world.step(&mut sequence, &[1, 2, 3]).is_some(), "the sequence is as good as new");
}

#[test]
fn the_epoch_of_the_links_follows_the_membership() {
    let world = World::new(2, KvDtype::F32);
    let before = world.links();
    assert!(std::sync::Arc::ptr_eq(&before, &world.links()), "links are kept");
    let _on = world.runtime.enter();
    let fewer = TestCluster::new(1, KvDtype::F32);
    let view = std::sync::Arc::clone(&fewer.views.borrow());
    world.cluster.views.send(view).expect("the directory listens");
    assert_ne!(world.links().map().epoch(), before.map().epoch());
}

#[test]
fn references_do_not_depend_on_the_cluster() {
    let (one, two) = (World::new(1, KvDtype::F32), World::new(4, KvDtype::F32));
    let prompt = tokens(9, 70);
    let of = |world: &World| {
        let cluster = &world.cluster;
        reference_tiles(&cluster.engine, cluster.identity(b""), world.links(), &prompt)
    };
    let (a, b) = (of(&one), of(&two));
    assert!(a.0 == b.0 && bits(&a.1) == bits(&b.1));
}

#[test]
fn a_sequence_knows_its_size() {
    let world = World::new(1, KvDtype::F16);
    let prompt = tokens(14, 5 * BLOCK + 3);
    world.store(&prompt);
    let mut sequence: Sequence = world.open(&prompt[..2 * BLOCK]);
    assert_eq!((sequence.position(), sequence.remote_blocks(), sequence.local_bytes()), (32, 2, 0));
    world.step(&mut sequence, &prompt[2 * BLOCK..]);
    assert_eq!((sequence.position(), sequence.full_blocks()), (83, 5));
    assert_eq!(sequence.local_bytes(), 4 * sequence.block_bytes());
    world.append(&mut sequence, 3).expect("the blocks are there");
    assert_eq!((sequence.remote_blocks(), sequence.local_bytes()), (5, sequence.block_bytes()));
}

#[test]
fn each_sequence_of_a_step_gets_the_logits_that_it_wants() {
    let world = World::new(1, KvDtype::F32);
    let wants = [Logits::Candidates(3), Logits::None, Logits::All, Logits::Last, Logits::Candidates(1)];
    let step = |chooses: bool, wants: [Logits; 5]| {
        world.cluster.model.chooses.store(chooses, Ordering::SeqCst);
        let mut sequences: Vec<Sequence> = wants.iter().map(|_| world.empty()).collect();
        let inputs = sequences.iter_mut().zip(wants);
        let mut batch: Vec<StepInput<'_>> =
            inputs.map(|(sequence, logits)| StepInput { sequence, tokens: &[5, 9, 2], logits }).collect();
        let outputs = world.cluster.engine.step(&CallContext::new("test"), &mut batch, &mut ());
        outputs
            .expect("the step runs")
            .into_iter()
            .map(|output| output.expect("all is here"))
            .collect::<Vec<_>>()
    };
    let all = step(false, [Logits::All; 5])[0].clone().expect("they were wanted").into_all();
    let last = &all[all.len() - 97..];
    let whole = step(false, wants);
    let lengths = whole.iter().map(|output| output.clone().map(|row| row.into_all().len()));
    assert!(lengths.eq([Some(97), None, Some(3 * 97), Some(97), Some(97)]));
    let chosen = step(true, wants);
    for (output, wants) in chosen.iter().zip(wants) {
        match (output, wants) {
            (None, Logits::None) => {}
            (Some(RowLogits::All(found)), Logits::All) => assert_eq!(bits(found), bits(&all)),
            (Some(RowLogits::All(found)), Logits::Last) => assert_eq!(bits(found), bits(last)),
            (Some(RowLogits::Likeliest(found)), Logits::Candidates(count)) => {
                let largest = last.iter().copied().fold(f32::MIN, f32::max);
                assert!(found.best.len() == count && found.best[0].1 == largest, "{found:?}");
                assert_eq!(last[found.best[0].0 as usize], largest);
            }
            other => panic!("{other:?}"),
        }
    }
}
