//! Storing and reading blocks.

use longshore_fabric::Code;
use longshore_proto::types::{GetBlocks, HeadPart, TileOrder};

use super::*;

#[tokio::test]
async fn blocks_are_acknowledged_one_by_one_and_found() {
    let shard = shard(4);
    // Layer by layer over both blocks, as a prefill worker sends them.
    let tiles = (0..LAYERS).flat_map(|layer| [message(1, layer), message(2, layer)]).collect();
    let acks = shard.put("", tiles).await;
    assert_eq!(outcomes(&acks), [(1, PutOutcome::Stored), (2, PutOutcome::Stored)]);
    assert_eq!(shard.lookup("", &[1, 2, 3]).await, [true, true, false]);
    assert_eq!(shard.lookup("other", &[1, 2, 3]).await, [false; 3]);
    let stats = shard.stats().await;
    assert_eq!((stats.blocks, stats.used_bytes, stats.stored_total), (2, 2 * block_bytes(), 2));
    assert_eq!((stats.hits_total, stats.misses_total, stats.shard_id.as_str()), (2, 4, "kv-0"));
}

#[tokio::test]
async fn an_acknowledgement_does_not_wait_for_the_end_of_the_stream() {
    let shard = shard(4);
    let (sender, receiver) = mpsc::channel(1);
    let mut acks = shard.shard.put_blocks(&shard.ctx, identity(""), wire_shape(), receiver).await.unwrap();
    for tile in block(1) {
        sender.send(tile).await.unwrap();
    }
    let ack = tokio::time::timeout(PATIENCE, acks.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((ack.key, ack.outcome), (key(1), PutOutcome::Stored));
    drop(sender);
    assert!(tokio::time::timeout(PATIENCE, acks.next()).await.unwrap().is_none());
}

#[tokio::test]
async fn held_blocks_are_duplicates_told_once() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let acks = shard.put("", block(1).into_iter().chain(block(2)).collect()).await;
    assert_eq!(outcomes(&acks), [(1, PutOutcome::Duplicate), (2, PutOutcome::Stored)]);
    let foreign = shard.put("other", block(1)).await;
    assert_eq!(outcomes(&foreign), [(1, PutOutcome::Stored)], "not told that another tenant holds it");
}

#[tokio::test]
async fn a_part_of_a_tile_ends_the_stream_although_it_is_as_long_as_a_tile() {
    let shard = shard(4);
    let mut tiles = block(1);
    let whole = HeadPart::of(&tiles[1].data, shape().kv_heads, 0);
    tiles[1].data = tiles[1].data.clone().of_heads(whole);
    let (sender, receiver) = mpsc::channel(8);
    let acks = shard.shard.put_blocks(&shard.ctx, identity(""), wire_shape(), receiver).await.unwrap();
    for tile in tiles {
        sender.send(tile).await.unwrap();
    }
    let error = collect(acks).await.pop().unwrap().unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("tile.heads")));
    shard.settled("nothing of it is kept", |stats| stats.open_blocks == 0 && stats.blocks == 0).await;
}

#[tokio::test]
async fn a_bad_tile_refuses_its_block_and_not_the_stream() {
    let shard = shard(8);
    let damaged = |change: fn(&mut TileMessage)| {
        let mut tiles = block(1);
        change(&mut tiles[1]);
        tiles
    };
    for (what, tiles) in [
        ("checksum", damaged(|tile| tile.crc32c ^= 1)),
        ("contents", damaged(|tile| tile.data = vec![1; tile.data.len()].into())),
        ("short", damaged(|tile| tile.data = tile.data[1..].to_vec().into())),
        ("empty", damaged(|tile| tile.data = Vec::new().into())),
        ("long", damaged(|tile| tile.data = vec![0; tile.data.len() + 1].into())),
        ("layer", damaged(|tile| tile.layer = LAYERS)),
        ("far layer", damaged(|tile| tile.layer = u32::MAX)),
    ] {
        let acks = shard.put("", tiles.into_iter().chain(block(2)).collect()).await;
        let refused: Vec<_> = acks.iter().filter(|ack| ack.key == key(1)).collect();
        assert_eq!(refused.len(), 1, "{what}: {acks:?}");
        assert_eq!(refused[0].outcome, PutOutcome::Corrupt, "{what}");
        assert!(!refused[0].message.is_empty(), "{what}");
        assert_eq!(acks.len(), 2, "{what}: the other block is answered");
        assert_eq!(shard.lookup("", &[1, 2]).await, [false, true], "{what}");
    }
    let stats = shard.stats().await;
    assert_eq!((stats.corrupt_total, stats.open_blocks, stats.used_bytes), (7, 0, block_bytes()));
}

#[tokio::test]
async fn a_refused_block_may_be_sent_again_in_the_same_stream() {
    let shard = shard(2);
    let mut tiles = block(1);
    tiles[1].crc32c ^= 1;
    let acks = shard.put("", tiles[..2].iter().cloned().chain(block(1)).collect()).await;
    assert_eq!(outcomes(&acks), [(1, PutOutcome::Corrupt), (1, PutOutcome::Stored)]);
}

#[tokio::test]
async fn the_same_tile_twice_is_harmless_and_another_in_its_place_is_not() {
    let shard = shard(2);
    let mut tiles = block(1);
    tiles.insert(1, message(1, 0));
    assert_eq!(outcomes(&shard.put("", tiles).await), [(1, PutOutcome::Stored)]);
    let mut tiles = block(2);
    tiles.insert(1, TileMessage { key: key(2), ..message(3, 0) });
    assert_eq!(outcomes(&shard.put("", tiles).await), [(2, PutOutcome::Corrupt)]);
}

#[tokio::test]
async fn a_full_shard_says_so_and_stores_again_once_there_is_room() {
    let shard = shard(2);
    shard.store(&[1, 2]).await;
    let view = shard.view(&[(0, 1), (1, 2)]).await;
    let acks = shard.put("", block(3)).await;
    assert_eq!(outcomes(&acks), [(3, PutOutcome::NoSpace)]);
    assert!(acks[0].message.contains("no room"), "{}", acks[0].message);
    shard.shard.close_view(&shard.ctx, view).await.unwrap();
    shard.store(&[3]).await;
    assert_eq!(shard.lookup("", &[1, 2, 3]).await, [true, false, true], "the tail went first");
    assert_eq!(shard.stats().await.evicted_total, 1);
}

#[tokio::test]
async fn the_retention_lease_keeps_fresh_blocks() {
    let shard = with_config(Config { retention_ms: 3_600_000, ..config(1) });
    shard.store(&[1]).await;
    assert_eq!(outcomes(&shard.put("", block(2)).await), [(2, PutOutcome::NoSpace)]);
}

#[tokio::test]
async fn incomplete_blocks_go_with_their_stream() {
    let shard = shard(4);
    let acks = shard.put("", vec![message(1, 0), message(2, 1)]).await;
    assert_eq!(acks, [], "nothing was completed");
    shard.settled("closed", |stats| stats.used_bytes == 0 && stats.open_blocks == 0).await;

    let (sender, receiver) = mpsc::channel(1);
    let acks = shard.shard.put_blocks(&shard.ctx, identity(""), wire_shape(), receiver).await.unwrap();
    sender.send(message(1, 0)).await.unwrap();
    shard.settled("begun", |stats| stats.open_blocks == 1).await;
    assert_eq!(shard.stats().await.used_bytes, block_bytes());
    drop(acks);
    shard.settled("dropped", |stats| stats.used_bytes == 0 && stats.open_blocks == 0).await;
    assert!(sender.send(message(1, 1)).await.is_err(), "nobody reads any more");
}

#[tokio::test]
async fn two_writers_of_one_block_end_with_one_copy() {
    let shard = shard(4);
    let (slow, receiver) = mpsc::channel(1);
    let mut acks = shard.shard.put_blocks(&shard.ctx, identity(""), wire_shape(), receiver).await.unwrap();
    slow.send(message(1, 0)).await.unwrap();
    shard.settled("begun", |stats| stats.open_blocks == 1).await;
    shard.store(&[1]).await;
    slow.send(message(1, 1)).await.unwrap();
    let ack = tokio::time::timeout(PATIENCE, acks.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(ack.outcome, PutOutcome::Duplicate);
    assert_eq!(shard.stats().await.used_bytes, block_bytes());
}

async fn get(shard: &Fixture, salt: &str, get: GetBlocks) -> Vec<Option<TileMessage>> {
    let get = GetBlocks { identity: identity(salt), ..get };
    let answer = shard.shard.get_blocks(&shard.ctx, get).await.unwrap();
    collect(answer).await.into_iter().map(|tile| tile.unwrap()).collect()
}

fn wanted(names: &[u8]) -> GetBlocks {
    let keys = names.iter().map(|name| key(*name)).collect();
    GetBlocks::whole(identity(""), keys)
}

#[tokio::test]
async fn tiles_are_read_back_block_by_block() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    let tiles = get(&shard, "", wanted(&[2, 9, 1])).await;
    let expected: Vec<_> =
        block(2).into_iter().map(Some).chain([None]).chain(block(1).into_iter().map(Some)).collect();
    assert_eq!(tiles, expected);
    let some = get(&shard, "", GetBlocks { first_layer: 1, layers: Some(1), ..wanted(&[1]) }).await;
    assert_eq!(some, [Some(message(1, 1))]);
    assert_eq!(get(&shard, "other", wanted(&[1])).await, [None]);
}

#[tokio::test]
async fn tiles_are_read_back_layer_by_layer_from_memory_and_disk() {
    let folder = super::disk::folder();
    for shard in [shard(4), with_config(super::disk::tiers(folder.path(), 1, 8))] {
        shard.store(&[1, 2, 3]).await;
        let by_layer = GetBlocks { order: TileOrder::Layers, ..wanted(&[2, 9, 1, 3, 1]) };
        let tile = |name, layer| Some(message(name, layer));
        let mut expected = vec![tile(2, 0), None, tile(1, 0), tile(3, 0), tile(1, 0)];
        for layer in 1..LAYERS {
            expected.extend([2, 1, 3, 1].map(|name| tile(name, layer)));
        }
        assert_eq!(get(&shard, "", by_layer).await, expected);
    }
}

#[tokio::test]
async fn a_block_that_was_put_anew_between_two_layers_is_not_the_one_that_was_begun() {
    let shard = shard(13);
    let names: Vec<u8> = (1..=12).collect();
    shard.store(&names).await;
    let by_layer = GetBlocks { order: TileOrder::Layers, ..wanted(&names) };
    let mut answer = shard.shard.get_blocks(&shard.ctx, by_layer).await.unwrap();
    // The first layer is taken, and the second has more tiles than may be unread: nothing of the last one is
    // read before somebody takes some.
    let first = tokio::time::timeout(PATIENCE, answer.by_ref().take(names.len()).collect::<Vec<_>>()).await;
    let first: Vec<_> = first.unwrap().into_iter().map(|tile| tile.unwrap()).collect();
    assert_eq!(first, names.iter().map(|name| Some(message(*name, 0))).collect::<Vec<_>>());
    assert!(shard.shard.corrupt_for_test(key(1), 0));
    assert_eq!(get(&shard, "", wanted(&[1])).await, [None]);
    shard.store(&[1]).await;
    let tiles: Vec<_> = collect(answer).await.into_iter().map(|tile| tile.unwrap()).collect();
    let last = tiles.iter().filter(|tile| tile.as_ref().is_none_or(|tile| tile.key == key(1)));
    let last: Vec<_> = last.map(|tile| tile.as_ref().map(|tile| tile.layer)).collect();
    assert!([&[None][..], &[Some(1), None]].contains(&&last[..]), "{last:?}");
}

#[tokio::test]
async fn a_block_that_goes_between_two_layers_is_missing_from_then_on() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    assert!(shard.shard.corrupt_for_test(key(1), 1));
    let by_layer = GetBlocks { order: TileOrder::Layers, ..wanted(&[1, 2, 1]) };
    let tile = |name, layer| Some(message(name, layer));
    let mut expected = vec![tile(1, 0), tile(2, 0), tile(1, 0), None, tile(2, 1), None];
    expected.extend((2..LAYERS).map(|layer| tile(2, layer)));
    assert_eq!(get(&shard, "", by_layer).await, expected);
}

#[tokio::test]
async fn a_tile_that_rotted_is_never_read_back() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    assert!(shard.shard.corrupt_for_test(key(1), 2));
    assert!(!shard.shard.corrupt_for_test(key(9), 0), "not held");
    let tiles = get(&shard, "", wanted(&[1, 2])).await;
    assert_eq!(tiles[0], None, "not even its sound layers");
    assert_eq!(tiles.len(), 1 + LAYERS as usize);
    assert_eq!(shard.lookup("", &[1, 2]).await, [false, true]);
    assert_eq!(shard.stats().await.corrupt_total, 1);
    shard.store(&[1]).await;
}
