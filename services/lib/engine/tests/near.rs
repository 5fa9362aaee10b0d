//! Of several copies a worker reads those that are near it, as the labels of the member list tell.

#[path = "support/world.rs"]
mod support;

use std::sync::Arc;

use longshore_cluster::{ClusterView, Member};
use longshore_engine::{Sequence, ShardDirectory, ShardLinks, testing::tokens};
use longshore_fabric::CallContext;
use tokio_util::task::TaskTracker;

use support::{BLOCK, World};

/// Two zones of two shards, each on a host of its own, and a worker.
fn join(world: &World, worker: &str) -> Arc<ShardLinks> {
    let shards = [("a", 0), ("a", 1), ("b", 2), ("b", 3)];
    let shards = shards
        .map(|(zone, shard)| format!("kvstore=shard-{shard}@local:shard-{shard};host=h-{shard};zone={zone}"));
    let members = shards.iter().map(String::as_str).chain([worker]);
    let members = members.map(|member| Member::parse(member).expect("the member is valid")).collect();
    world.cluster.views.send_replace(Arc::new(ClusterView::new(members).expect("the members differ")));
    let connector = Arc::new(world.cluster.connector.clone());
    let directory = ShardDirectory::new(world.cluster.views.subscribe(), connector, TaskTracker::new(), 16);
    let directory = directory.with_copies(world.links().rule()).of_member("decode-0");
    let _on_runtime = world.runtime.enter();
    directory.current().expect("the addresses make clients")
}

/// Tiles that each shard sent for one read of all blocks.
fn read(world: &World, links: &Arc<ShardLinks>, prompt: &[u32]) -> Vec<u64> {
    let sent = || world.cluster.shards.iter().map(|shard| shard.tiles_sent()).collect::<Vec<_>>();
    let before = sent();
    let (ctx, identity) = (CallContext::new("test"), world.cluster.identity(b""));
    let fetch = Sequence::fetch(&world.cluster.engine, &ctx, identity, Arc::clone(links), prompt);
    let fetched = world.runtime.block_on(fetch).expect("the blocks are there");
    assert!(world.full_tiles(&fetched) == world.reference(prompt).0, "whoever was asked");
    sent().into_iter().zip(before).map(|(after, before)| after - before).collect()
}

#[test]
fn copies_on_the_same_host_and_in_the_same_zone_are_read() {
    let world = World::with_copies(4, 2, 2);
    let links = join(&world, "decode=decode-0@local:decode-0;zone=a");
    let prompt = tokens(31, 24 * BLOCK);
    world.store(&prompt);
    let held: Vec<u64> = world.cluster.shards.iter().map(|shard| shard.bodies().len() as u64).collect();
    let all = held.iter().sum::<u64>() / 2;
    assert_eq!(held[0] + held[1], all, "each zone has one copy of everything");

    let sent = read(&world, &links, &prompt);
    assert_eq!((sent[0], sent[1], sent[2] + sent[3]), (held[0], held[1], 0));
    // On a host of zone b: all that lies there, and the rest from the other one of the zone.
    let sent = read(&world, &join(&world, "decode=decode-0@local:decode-0;host=h-2;zone=b"), &prompt);
    assert_eq!(sent, [0, 0, held[2], all - held[2]]);
    // A host alone tells of no zone.
    let sent = read(&world, &join(&world, "decode=decode-0@local:decode-0;host=h-3"), &prompt);
    assert_eq!(sent[3], held[3]);
    // And nobody knows where this one is: a stripe is read where it comes first.
    let sent = read(&world, &join(&world, "decode=decode-0@local:decode-0"), &prompt);
    assert!(sent[0] + sent[1] > 0 && sent[2] + sent[3] > 0, "{sent:?}");
    assert_eq!(read(&world, &join(&world, "decode=decode-0@local:decode-0"), &prompt), sent);
}

/// Whether its blocks are looked for one by one or together.
#[test]
fn a_search_for_who_reads_a_stripe_counts_once() {
    let world = World::with_copies(4, 2, 2);
    let prompt = tokens(33, 7 * BLOCK);
    world.store(&prompt);
    let counted = || world.cluster.parts.shards.reads().each().map(|(_, count)| count).sum::<u64>();
    let before = counted();
    world.fetch(&prompt).expect("the blocks are there");
    assert_eq!(counted(), before + 3, "seven blocks lie in three stripes");
    drop(world.open(&prompt));
    assert_eq!(counted(), before + 6);
}

/// Blocks that are handed over later join those of their stripe.
#[test]
fn a_stripe_stays_where_it_was_opened() {
    let world = World::with_copies(4, 2, 2);
    let links = join(&world, "decode=decode-0@local:decode-0;zone=a");
    let prompt = tokens(32, 3 * BLOCK);
    world.store(&prompt);
    let (ctx, identity) = (CallContext::new("test"), world.cluster.identity(b""));
    let open = Sequence::open(&world.cluster.engine, &ctx, identity, links, &prompt[..BLOCK], 60_000);
    let mut sequence = world.runtime.block_on(open).expect("the block is there");
    world.step(&mut sequence, &prompt[BLOCK..]);
    let opened = || world.cluster.shards.iter().map(|shard| shard.opened()).collect::<Vec<_>>();
    let before = opened();
    assert_eq!((before[0] + before[1], before[2] + before[3]), (1, 0));
    world.append(&mut sequence, 2).expect("the view grows");
    assert_eq!((opened(), world.cluster.open_views()), (before, 1), "it is the view that was there");
}
