//! Reads of a range of KV heads, verified against the whole tile that was stored.

use std::ops::Range;

use longshore_fabric::Code;

use super::{
    disk::{folder, tiers},
    *,
};

async fn heads(shard: &Fixture, names: &[u8], heads: Range<u32>) -> Vec<Option<TileMessage>> {
    let keys = names.iter().map(|name| key(*name)).collect();
    let get = GetBlocks { first_layer: 1, ..GetBlocks::whole(identity(""), keys) };
    let read = shard.shard.get_heads(&shard.ctx, get, heads).await.expect("the range is valid");
    collect(read).await.into_iter().map(|tile| tile.expect("the stream goes on")).collect()
}

/// What a reader makes of an answer for block `name`, layers 1 and on: every copied byte is that of the stored tile.
fn check(read: &[Option<TileMessage>], name: u8, heads: &Range<u32>) {
    assert_eq!(read.len(), LAYERS as usize - 1);
    for (layer, read) in (1..).zip(read) {
        let read = read.as_ref().expect("the block is held");
        assert_eq!((read.key, read.layer), (key(name), layer));
        let (copy, told) = read.copy_heads(heads.clone(), KV_HEADS as u32, shape().head_bytes()).unwrap();
        let whole = tile(name, layer);
        let bytes = heads.start as usize * shape().head_bytes()..heads.end as usize * shape().head_bytes();
        assert_eq!(copy, &whole.as_bytes()[bytes]);
        assert_eq!((told, read.crc32c), (crc32c(whole.as_bytes()), crc32c(&copy)));
    }
}

#[tokio::test]
async fn heads_come_from_memory_and_from_disk_as_they_were_stored() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 1, 8));
    shard.store(&[1, 2]).await;
    assert_eq!(shard.disk().await.blocks, 1, "one of the two lies on disk");
    for range in [0..1, 1..2, 0..2] {
        for name in [1, 2] {
            check(&heads(&shard, &[name], range.clone()).await, name, &range);
        }
    }
    assert_eq!(heads(&shard, &[9], 0..1).await, [None]);
}

#[tokio::test]
async fn a_damaged_tile_is_found_by_readers_of_any_of_its_heads() {
    for read_head in 0..2 {
        let shard = shard(2);
        shard.store(&[1, 2]).await;
        // A bit of head 0 in layer 2.
        assert!(shard.shard.corrupt_for_test(key(1), 2));
        assert_eq!(heads(&shard, &[1], read_head..read_head + 1).await, [None], "head {read_head}");
        assert_eq!(shard.lookup("", &[1, 2]).await, [false, true], "it was dropped");
        check(&heads(&shard, &[2], 1..2).await, 2, &(1..2));
    }
}

#[tokio::test]
async fn ranges_beyond_the_tile_are_refused_by_field() {
    let shard = shard(1);
    shard.store(&[1]).await;
    let get = GetBlocks::whole(identity(""), vec![key(1)]);
    #[allow(clippy::reversed_empty_ranges, reason = "as a hostile caller would send them")]
    for wrong in [0..0, 1..1, 2..1, 0..3, 2..3, 0..u32::MAX] {
        let error =
            shard.shard.get_heads(&shard.ctx, get.clone(), wrong.clone()).await.err().expect("refused");
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("heads")), "{wrong:?}");
    }
    let other = GetBlocks { identity: identity("other"), ..get };
    let read = shard.shard.get_heads(&shard.ctx, other, 0..1).await.unwrap();
    assert_eq!(collect(read).await, [Ok(None)], "heads of another tenant are as unknown as its blocks");
}
