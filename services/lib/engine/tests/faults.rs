//! What shards and callers can do wrong, and what it means for a sequence and its neighbours.

#[path = "support/world.rs"]
mod support;

use std::sync::atomic::Ordering;

use longshore_attention::KvDtype;
use longshore_engine::{
    Error, Logits, StepInput, StepObserver,
    testing::{MemoryShard, tokens},
};
use longshore_fabric::{CallContext, Code};

use support::{BLOCK, World, bits};

/// A shard that holds a part of `sequence`.
fn shard_of<'a>(world: &'a World, sequence: &longshore_engine::Sequence, block: u64) -> &'a MemoryShard {
    let index = sequence.owner(block).expect("there are shards");
    let id = &sequence.links().links()[index].id.0;
    let number: usize = id.trim_start_matches("shard-").parse().expect("ids end with a number");
    &world.cluster.shards[number]
}

#[test]
fn missing_blocks_are_named_and_leave_no_view_open() {
    let world = World::new(3, KvDtype::F32);
    let prompt = tokens(1, 8 * BLOCK);
    world.store(&prompt[..5 * BLOCK]);
    let error = world.open_as(b"", &prompt).expect_err("three blocks are missing");
    assert_eq!(error.kind(), Code::NotFound);
    let Error::Missing { keys, .. } = &error else { panic!("{error}") };
    assert!(!keys.is_empty() && error.to_string().contains(&keys[0].to_string()), "{error}");
    assert!(world.views_settle_at(0));
    assert_eq!(world.fetch(&prompt).expect_err("nor can they be fetched").kind(), Code::NotFound);
}

#[test]
fn dropping_or_closing_a_sequence_closes_its_views() {
    let world = World::new(3, KvDtype::F32);
    let prompt = tokens(2, 12 * BLOCK);
    world.store(&prompt);
    let (dropped, closed) = (world.open(&prompt), world.open(&prompt));
    assert!(world.cluster.open_views() >= 2);
    drop(dropped);
    world.runtime.block_on(closed.close());
    assert!(world.views_settle_at(0));
}

#[test]
fn a_lost_view_fails_its_sequence_and_no_other() {
    let world = World::new(1, KvDtype::F32);
    let (lost, kept) = (tokens(3, 50), tokens(4, 50));
    world.store(&lost);
    world.store(&kept);
    let (_, expected) = world.reference(&kept);
    let (mut a, mut b) = (world.open(&lost[..2 * BLOCK]), world.open(&kept[..2 * BLOCK]));
    // The first strike refuses the common query, the second the one of the first sequence alone.
    world.cluster.shards[0].faults.corrupt_attends.store(2, Ordering::SeqCst);
    let mut batch = [
        StepInput { sequence: &mut a, tokens: &lost[2 * BLOCK..], logits: Logits::Last },
        StepInput { sequence: &mut b, tokens: &kept[2 * BLOCK..], logits: Logits::Last },
    ];
    let outputs =
        world.cluster.engine.step(&CallContext::new("test"), &mut batch, &mut ()).expect("one goes on");
    let mut outputs = outputs.into_iter();
    let failed = outputs.next().expect("two outputs").expect_err("its query was refused twice");
    assert_eq!(failed.kind(), Code::DataLoss, "{failed}");
    let logits = outputs.next().expect("two outputs").expect("it goes on").expect("logits were asked for");
    assert_eq!(bits(&logits.into_all()), bits(&expected));
    let error = world.try_step(&mut a, &[1]).expect_err("a failed sequence can only be closed");
    assert_eq!(error.kind(), Code::Unavailable, "{error}");
}

#[test]
fn an_ill_shard_makes_the_sequence_unavailable() {
    let world = World::new(3, KvDtype::F32);
    let prompt = tokens(5, 9 * BLOCK + 5);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..9 * BLOCK]);
    shard_of(&world, &sequence, 4).faults.failed_attends.store(1, Ordering::SeqCst);
    let error = world.try_step(&mut sequence, &prompt[9 * BLOCK..]).expect_err("a third of the KV is away");
    assert_eq!(error.kind(), Code::Unavailable, "{error}");
}

#[test]
fn an_answer_that_lacks_a_stripe_is_data_loss_and_no_token() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(6, 7 * BLOCK + 5);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..7 * BLOCK]);
    world.cluster.shards[0].faults.short_attends.store(1, Ordering::SeqCst);
    let error = world.try_step(&mut sequence, &prompt[7 * BLOCK..]).expect_err("a stripe is missing");
    assert_eq!(error.kind(), Code::DataLoss, "{error}");
}

#[test]
fn an_append_without_an_answer_breaks_the_sequence() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(7, 4 * BLOCK);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..BLOCK]);
    world.step(&mut sequence, &prompt[BLOCK..]);
    world.cluster.shards[0].faults.failed_appends.store(1, Ordering::SeqCst);
    world.append(&mut sequence, 1).expect_err("nobody knows whether the block was appended");
    assert!(sequence.broken().is_some());
    assert_eq!(world.try_step(&mut sequence, &[1]).expect_err("it is broken").kind(), Code::Unavailable);
}

#[test]
fn blocks_evicted_before_they_were_handed_over_stay_local() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(8, 4 * BLOCK);
    let (_, expected) = world.reference(&[&prompt[..], &[5]].concat());
    let mut sequence = world.empty();
    world.step(&mut sequence, &prompt);
    let error = world.append(&mut sequence, 2).expect_err("they were never stored");
    assert_eq!(error.kind(), Code::NotFound);
    assert_eq!((sequence.remote_blocks(), sequence.broken()), (0, None));
    let logits = world.step(&mut sequence, &[5]).expect("logits were asked for");
    assert_eq!(bits(&logits), bits(&expected));
}

/// Cancels after the first layer.
struct CancelAfterFirst(CallContext);

impl StepObserver for CancelAfterFirst {
    fn layer_done(&mut self, _layer: usize, _batch: &[StepInput<'_>]) -> Result<(), Error> {
        self.0.cancel.cancel();
        Ok(())
    }
}

#[test]
fn a_cancelled_step_stops_within_one_layer() {
    let world = World::new(0, KvDtype::F32);
    let ctx = CallContext::new("test");
    let mut sequence = world.empty();
    let input = StepInput { sequence: &mut sequence, tokens: &[1, 2], logits: Logits::Last };
    let outcome = world.cluster.engine.step(&ctx, &mut [input], &mut CancelAfterFirst(ctx.clone()));
    assert_eq!(outcome.expect_err("the caller went away").kind(), Code::Cancelled);
    assert_eq!(world.cluster.model.layers_computed.load(Ordering::SeqCst), 1);
}

#[test]
fn a_deadline_that_passed_stops_a_step() {
    let world = World::new(0, KvDtype::F32);
    let ctx = CallContext::new("test").with_timeout(std::time::Duration::ZERO);
    let mut sequence = world.empty();
    let input = StepInput { sequence: &mut sequence, tokens: &[1, 2], logits: Logits::Last };
    let outcome = world.cluster.engine.step(&ctx, &mut [input], &mut ());
    assert_eq!(outcome.expect_err("it is late").kind(), Code::DeadlineExceeded);
}

#[test]
fn a_cluster_without_shards_can_compute_but_not_store() {
    let world = World::new(0, KvDtype::F32);
    let mut sequence = world.empty();
    assert!(world.step(&mut sequence, &tokens(9, 2 * BLOCK)).is_some());
    assert_eq!(sequence.owner(0).expect_err("there are no shards").kind(), Code::Unavailable);
}
