//! Figures, lists, files.

use longshore_blocks::{Deployment, EXACT_PREFILL, crc32c};
use longshore_proto::types::ListBlocks;

use super::house::{House, LAYERS, block, block_bytes, deployment, key};
use crate::cli::{ClusterArgs, StoreLsArgs};
use crate::store::{
    file::BlockFile,
    get::{fetch, fetch_heads, find},
    listing::Listing,
    ls,
    put::put_file,
    stat,
};

#[tokio::test]
async fn figures_add_up_over_the_shards() {
    let house = House::new(3, 2).await;
    // Nobody knows where they belong, so no shard sends one: a search between two copies of a put would, and its bytes would be
    // counted too.
    for name in 1..=8 {
        let file = house.file(&BlockFile { place: None, ..block(name) });
        for shard in [name % 3, (name + 1) % 3] {
            put_file(&house.cluster, &file, Some(&format!("kv-{shard}"))).await.unwrap();
        }
    }
    let (first, look) = stat::look(&house.cluster, None).await;
    assert_eq!((first.shards.len(), first.unanswered.len()), (3, 0));
    let total = &first.total;
    assert_eq!((total.blocks, total.stored_total, total.copies.wanted), (16, 16, 2));
    assert_eq!(first.shards.iter().map(|shard| shard.blocks).sum::<u64>(), 16);
    let memory = &total.tiers[0];
    assert_eq!((memory.tier.as_str(), memory.blocks, memory.used_bytes), ("dram", 16, 16 * block_bytes()));
    let received: u64 = total.lanes.iter().map(|lane| lane.received_bytes_total).sum();
    assert_eq!(received, 16 * block_bytes());
    let local = total.lanes.iter().find(|lane| lane.lane == "local").unwrap();
    assert_eq!((local.puts_total, local.received_bytes_total), (0, 0), "everything came from outside");
    assert!(total.lanes.iter().map(|lane| lane.received_bytes_per_s).sum::<f64>() > 0.0, "since the start");
    let row = find(&house.cluster, &key(1).to_string(), "").await.unwrap();
    fetch(&house.cluster, &row).await.unwrap();
    let (second, _) = stat::look(&house.cluster, Some(&look)).await;
    let sent: u64 = second.total.lanes.iter().map(|lane| lane.sent_bytes_total).sum();
    assert_eq!(sent, block_bytes());
    let rate =
        |report: &stat::Report| report.total.lanes.iter().map(|lane| lane.received_bytes_per_s).sum::<f64>();
    assert_eq!(rate(&second), 0.0, "nothing came since the look before");
    let json = serde_json::to_value(&second).unwrap();
    assert_eq!(json["total"]["blocks"], 16);
    assert_eq!(json["shards"][0]["drain"], "no");
    let text = second.text();
    for word in [
        "kv-0",
        "total",
        "HIT RATE",
        "EVICTED FROM MEMORY",
        "SHORT",
        "UNSEARCHED",
        "MOST KEPT",
        "RECEIVED/S",
        "dram",
        "grpc",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_list_has_every_block_once_with_all_its_copies() {
    let house = House::new(3, 2).await;
    for name in [0x11, 0x12, 0x2a, 0x2b, 0xff] {
        house.put(name).await;
    }
    for limit in [1, 2, 4_096] {
        let mut listing = Listing::new(&house.cluster, ListBlocks { limit, ..ListBlocks::default() });
        let mut names = Vec::new();
        while let Some(row) = listing.next().await {
            assert_eq!(row.copies.len(), 2, "{row:?}");
            names.push(row.key.0[0]);
        }
        assert_eq!(names, [0x11, 0x12, 0x2a, 0x2b, 0xff], "pages of {limit}");
    }
    let list = ListBlocks { key_prefix: "2".to_owned(), ..ListBlocks::default() };
    let row = Listing::new(&house.cluster, list).next().await.unwrap();
    let view = ls::view(&house.cluster, &row);
    assert_eq!((view.key.as_str(), view.copies, view.index), (key(0x2a).to_string().as_str(), 2, Some(0x2a)));
    assert_eq!((view.namespace.len(), view.bytes), (16, block_bytes()), "no whole namespace is ever shown");
    assert!(view.held_by.iter().all(|copy| copy.tier == "dram" && copy.state == "sealed"), "{view:?}");
}

#[tokio::test]
async fn a_list_goes_on_after_its_cursor() {
    let house = House::new(2, 1).await;
    for name in 1..=4 {
        house.put(name).await;
    }
    let namespace = ls::view(&house.cluster, &house.rows().await[0]).namespace;
    let after = ls::resume(&house.cluster, &format!("{namespace}:{}", key(2))).await.unwrap();
    let mut listing =
        Listing::new(&house.cluster, ListBlocks { after: Some(after), ..ListBlocks::default() });
    assert_eq!(listing.next().await.unwrap().key, key(3));
    let gone = ls::resume(&house.cluster, &format!("{}:{}", "f".repeat(16), key(2))).await.unwrap();
    let mut listing = Listing::new(&house.cluster, ListBlocks { after: Some(gone), ..ListBlocks::default() });
    assert!(listing.next().await.is_none(), "nothing comes after the last namespace");
    for bad in ["", "12", "12:34", "zz:00"] {
        assert!(ls::resume(&house.cluster, bad).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_block_goes_into_a_file_and_back() {
    let house = House::new(3, 2).await;
    let placed = house.put(7).await;
    assert_eq!((placed.holders.len(), placed.wanted), (2, 2));
    let row = find(&house.cluster, "0707", "").await.unwrap();
    let (got, from) = fetch(&house.cluster, &row).await.unwrap();
    assert_eq!(got, block(7), "all of it, its place too, from {from}");
    let path = house.folder.path().join("got.lsb");
    got.write(&path).unwrap();
    let again = put_file(&house.cluster, &path, None).await.unwrap();
    assert!(again.holders.iter().all(|(_, before)| *before), "{again:?}");
    let elsewhere = House::new(1, 1).await;
    let placed = put_file(&elsewhere.cluster, &path, None).await.unwrap();
    assert_eq!(placed.holders, [("kv-0".to_owned(), false)]);
    assert_eq!(fetch(&elsewhere.cluster, &elsewhere.rows().await[0]).await.unwrap().0, block(7));
}

#[tokio::test]
async fn heads_of_a_block_go_into_a_file_that_proves_them() {
    let house = House::new(2, 1).await;
    house.put(7).await;
    let row = find(&house.cluster, "0707", "").await.unwrap();
    let path = house.folder.path().join("heads.lsh");
    let head_bytes = block(7).tiles[0].1.len() / 2;
    for heads in [0..1, 1..2, 0..2] {
        let (file, _) = fetch_heads(&house.cluster, &row, &heads).await.unwrap();
        file.write(&path).unwrap();
        // Read by the table in docs/protocol.md.
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((&bytes[..8], word(8)), (&b"LSHEADS\0"[..], 1));
        assert_eq!(&bytes[80..96], &key(7).0);
        assert_eq!((word(168), word(172)), (heads.start, heads.end - heads.start));
        let (layers, tables) = (LAYERS as usize, 176 + 4 * LAYERS as usize);
        let bodies = tables + 4 * 2 * layers + 4;
        assert_eq!(crc32c(&bytes[..bodies - 4]), word(bodies - 4), "the header's own checksum");
        let part = head_bytes * heads.len();
        assert_eq!(bytes.len(), bodies + part * layers);
        for (layer, (crc, whole)) in block(7).tiles.iter().enumerate() {
            assert_eq!(word(176 + 4 * layer), *crc, "that of the whole tile");
            let own = [0, 1].map(|head| crc32c(&whole[head * head_bytes..(head + 1) * head_bytes]));
            assert_eq!([0, 1].map(|head| word(tables + 4 * (2 * layer + head))), own);
            let body = &bytes[bodies + layer * part..bodies + (layer + 1) * part];
            assert_eq!(body, &whole[heads.start as usize * head_bytes..heads.end as usize * head_bytes]);
        }
        let refused = format!("{:#}", put_file(&house.cluster, &path, None).await.unwrap_err());
        assert!(refused.contains("`magic` is that of a file of heads"), "{refused}");
    }
    let beyond = format!("{:#}", fetch_heads(&house.cluster, &row, &(1..3)).await.unwrap_err());
    assert!(beyond.contains("`--heads 1..3`") && beyond.contains("2 KV heads"), "{beyond}");
    let (mut file, _) = fetch_heads(&house.cluster, &row, &(0..1)).await.unwrap();
    file.layers[1].head_crc32cs[1] ^= 1;
    let forged = file.write(&path).unwrap_err().to_string();
    assert!(forged.contains("`tiles[1]` does not match its checksum"), "{forged}");
}

#[tokio::test]
async fn heads_come_from_a_sound_copy() {
    let house = House::new(3, 2).await;
    house.put(7).await;
    let holders = house.holders(7).await;
    let row = find(&house.cluster, "07", "").await.unwrap();
    assert!(house.shards[*holders.first().unwrap()].corrupt_for_test(key(7), 1));
    // The damage is in head 0; who asks for head 1 does not get a part of a damaged tile either.
    let (file, from) = fetch_heads(&house.cluster, &row, &(1..2)).await.unwrap();
    assert_eq!(from, format!("kv-{}", holders.last().unwrap()));
    assert_eq!(file.layers[1].tile_crc32c, block(7).tiles[1].0);
}

#[test]
fn an_empty_list_says_so() {
    let args = |prefix: Option<&str>| StoreLsArgs {
        cluster: ClusterArgs { endpoints: Vec::new(), members_file: None },
        namespace: None,
        prefix: prefix.map(str::to_owned),
        limit: 100,
        after: None,
        json: false,
    };
    assert_eq!(ls::nothing(&args(None), 3), "the store is empty: 3 shards told of no block");
    let none = ls::nothing(&args(Some("1f")), 1);
    assert_eq!(none, "no block matches `--prefix 1f`: the one shard that answers told of none");
}

#[tokio::test]
async fn a_damaged_copy_is_passed_over_for_a_sound_one() {
    let house = House::new(3, 2).await;
    house.put(7).await;
    let holders = house.holders(7).await;
    let first = *holders.first().unwrap();
    let row = find(&house.cluster, "07", "").await.unwrap();
    assert!(house.shards[first].corrupt_for_test(key(7), 1));
    let (got, from) = fetch(&house.cluster, &row).await.unwrap();
    assert_eq!((got, from), (block(7), format!("kv-{}", holders.last().unwrap())));
}

#[tokio::test]
async fn what_cannot_be_got_or_put_is_told_by_name() {
    let house = House::new(2, 1).await;
    house.put(0x11).await;
    house.put(0x12).await;
    let told = |error: anyhow::Error| format!("{error:#}");
    let absent = told(find(&house.cluster, "99", "").await.unwrap_err());
    assert!(absent.contains("no shard holds a block `99`"), "{absent}");
    let several = told(find(&house.cluster, "1", "").await.unwrap_err());
    assert!(several.contains("more than one block") && several.contains("--namespace"), "{several}");
    let put = async |block: &BlockFile, only: Option<&str>| {
        put_file(&house.cluster, &house.file(block), only).await.map_err(told)
    };
    let other = Deployment::from_bytes([4; 32]);
    let foreign = BlockFile { deployment: other, namespace: other.namespace(EXACT_PREFILL, b""), ..block(3) };
    assert!(put(&foreign, None).await.unwrap_err().contains("`deployment`"));
    let mut wide = block(3);
    wide.shape.layers = 1;
    wide.tiles.pop();
    assert!(put(&wide, None).await.unwrap_err().contains("`tile_shape`"));
    let homeless = BlockFile { place: None, ..block(3) };
    assert!(put(&homeless, None).await.unwrap_err().contains("`--shard`"));
    assert_eq!(put(&homeless, Some("kv-1")).await.unwrap().holders, [("kv-1".to_owned(), false)]);
    assert!(put(&block(4), Some("kv-7")).await.unwrap_err().contains("no shard `kv-7`"));
    let path = house.file(&block(5));
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = told(put_file(&house.cluster, &path, None).await.unwrap_err());
    assert!(damaged.contains("`tiles[1]` does not match its checksum"), "{damaged}");
    assert_eq!(deployment(), block(5).deployment);
}
