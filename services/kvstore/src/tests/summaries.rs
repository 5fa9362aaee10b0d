//! Summaries of views against their definition, and who gets none.

use longshore_attention::Mean;
use longshore_fabric::Code;
use longshore_proto::types::{GetSummaries, SummariesMessage};

use super::*;

fn ask(view_id: u64) -> GetSummaries {
    let (first_layer, layers) = (0, None);
    GetSummaries {
        identity: identity(""),
        view_id,
        first_layer,
        layers,
        values: true,
        spreads: true,
        cosines: true,
    }
}

async fn read(shard: &Fixture, get: GetSummaries) -> Vec<Result<SummariesMessage, CallError>> {
    collect(shard.shard.get_summaries(&shard.ctx, get).await.expect("the request is sound")).await
}

fn floats(tensor: Option<&Tensor>) -> Vec<f32> {
    tensor.expect("it was asked for").to_f32().expect("summaries are f32")
}

#[tokio::test]
async fn summaries_are_those_of_the_stored_tiles() {
    // 2 KV heads of 8 elements: 3 × 64 bytes and 8 of cosines a block, so five to a message of 1,024.
    for (config, per_message) in
        [(config(16), 7), (Config { attend_message_bytes: 1 << 10, ..config(16) }, 5)]
    {
        let shard = with_config(config);
        shard.store(&[1, 2, 3, 4, 5, 6, 7]).await;
        let names = [3u8, 1, 2, 7, 6, 5, 4];
        let blocks: Vec<_> =
            names.iter().zip([0, 1, 4, 5, 9, 10, 11]).map(|(name, at)| (at, *name)).collect();
        let view = shard.view(&blocks).await;
        for _ in 0..2 {
            let messages = read(&shard, ask(view)).await;
            let (mut layer, mut first) = (0, 0);
            for message in messages {
                let message = message.expect("the stream goes on");
                assert_eq!((message.layer, message.first), (layer, first as u64));
                let end = names.len().min(first + per_message);
                let means: Vec<Mean> =
                    names[first..end].iter().map(|name| Mean::of(&tile(*name, layer))).collect();
                let wanted =
                    |part: fn(&Mean) -> &[f32]| means.iter().flat_map(part).copied().collect::<Vec<_>>();
                assert_eq!(message.keys.shape, [means.len() as u64, KV_HEADS as u64, HEAD_DIM as u64]);
                assert_eq!(floats(Some(&message.keys)), wanted(Mean::key));
                assert_eq!(floats(message.values.as_ref()), wanted(Mean::value));
                assert_eq!(floats(message.spreads.as_ref()), wanted(Mean::spread));
                assert_eq!(floats(message.cosines.as_ref()), wanted(Mean::cosines));
                (layer, first) = if end == names.len() { (layer + 1, 0) } else { (layer, end) };
            }
            assert_eq!((layer, first), (LAYERS, 0), "all layers came");
            // Made once.
            assert_eq!(shard.shard.summaries_made_for_test(), 7 * u64::from(LAYERS));
        }
        let get = GetSummaries {
            first_layer: 1,
            layers: Some(1),
            values: false,
            spreads: false,
            cosines: false,
            ..ask(view)
        };
        for message in read(&shard, get).await {
            let message = message.unwrap();
            assert_eq!(
                (message.layer, message.values, message.spreads, message.cosines),
                (1, None, None, None)
            );
        }
    }
}

#[tokio::test]
async fn requests_for_summaries_that_make_no_sense_are_refused() {
    let shard = shard(2);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    let stale = Identity { shard_map_epoch: EPOCH - 1, ..identity("") };
    for (wrong, code) in [
        (GetSummaries { identity: stale, ..ask(view) }, Code::FailedPrecondition),
        (GetSummaries { identity: identity("other"), ..ask(view) }, Code::NotFound),
        (ask(77), Code::NotFound),
        (GetSummaries { first_layer: LAYERS, ..ask(view) }, Code::InvalidArgument),
        (GetSummaries { layers: Some(LAYERS + 1), ..ask(view) }, Code::InvalidArgument),
        (GetSummaries { layers: Some(0), ..ask(view) }, Code::InvalidArgument),
    ] {
        let error = shard.shard.get_summaries(&shard.ctx, wrong).await.err().expect("the request is refused");
        assert_eq!(error.code, code, "{error}");
    }
}

#[tokio::test]
async fn summaries_are_part_of_the_budget_and_go_with_their_blocks() {
    let shard = with_config(Config { eviction: "lru".to_owned(), ..config(8) });
    shard.store(&[1, 2, 3, 4]).await;
    let view = shard.view(&[(0, 1), (1, 2), (2, 3), (3, 4)]).await;
    read(&shard, ask(view)).await;
    let stats = shard.stats().await;
    assert!(stats.summary_bytes > 0);
    assert_eq!(stats.used_bytes, 4 * block_bytes() + stats.summary_bytes);
    let line = format!("longshore_kvstore_kept_summary_bytes {}", stats.summary_bytes);
    assert!(shard.metrics.encode().lines().any(|have| have == line), "{line}");

    // Four more would fit beside the blocks, but not beside their summaries.
    let free = (stats.capacity_bytes - stats.used_bytes) / block_bytes();
    assert!(free < 4, "{stats:?}");
    shard.store(&[5, 6, 7, 8]).await;
    assert_eq!(shard.stats().await.evicted_total, 4 - free);
    let all: Vec<u8> = (5..=8).collect();
    let kept = shard.lookup("", &all).await;
    let rest: Vec<_> = all.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(name, _)| *name).collect();
    let blocks: Vec<_> = rest.iter().map(|name| (u64::from(*name), *name)).collect();
    let rest = shard.view(&blocks).await;
    assert_eq!(outcomes(&shard.put("", block(9)).await), [(9, PutOutcome::NoSpace)]);
    let stats = shard.stats().await;
    assert!(stats.summary_bytes > 0 && stats.used_bytes <= stats.capacity_bytes, "{stats:?}");

    for view in [view, rest] {
        shard.shard.close_view(&shard.ctx, view).await.expect("views can be closed");
    }
    shard.store(&[11, 12, 13, 14, 15, 16, 17, 18]).await;
    let stats = shard.stats().await;
    assert_eq!((stats.summary_bytes, stats.used_bytes), (0, 8 * block_bytes()));
}

#[tokio::test]
async fn summaries_of_damaged_blocks_go_too() {
    let shard = shard(8);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    read(&shard, ask(view)).await;
    assert!(shard.stats().await.summary_bytes > 0);
    assert!(shard.shard.corrupt_for_test(key(1), 0));
    assert_eq!(shard.get(&[1]).await, [None]);
    assert_eq!(shard.stats().await.summary_bytes, 0);
}
