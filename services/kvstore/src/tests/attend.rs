//! Attention over views, against direct runs of the executor.

use longshore_attention::{
    AttendItem as ExecutorItem, CpuExecutor, ExactBlock, Executor as _, HeadShape, Queries, Tiles, WorkList,
};
use longshore_blocks::{KeyChain, ShardEntry, ShardMap};
use longshore_fabric::Code;

use super::*;

/// What attention of `item` over (index, name) blocks must give, straight from the executor.
fn direct(item: &AttendItem, layer: u32, blocks: &[(u64, u8)]) -> Vec<f32> {
    let tiles = blocks.iter().map(|(_, name)| tile(*name, layer)).collect();
    let source = Tiles { shape: shape(), tiles };
    let exact = blocks.iter().enumerate().map(|(at, (index, _))| ExactBlock {
        tile: at as u32,
        first_position: index * BLOCK_TOKENS as u64,
        len: BLOCK_TOKENS as u32,
    });
    let work = WorkList { exact: exact.collect(), ..WorkList::default() };
    let rows = item.queries.to_f32().expect("queries are f32");
    let heads = HeadShape { kv_heads: KV_HEADS, group: HEADS / KV_HEADS, head_dim: HEAD_DIM };
    let queries =
        Queries { shape: heads, first_position: item.first_position, scale: item.scale, data: &rows };
    let call = ExecutorItem { queries, kv: &source, work: &work, initial: None };
    CpuExecutor::serial().attend(&[call]).expect("the call is valid")[0].to_interleaved()
}

fn bits(partial: &AttendPartial) -> Vec<u32> {
    partial.partial.to_f32().expect("partials are f32").iter().map(|value| value.to_bits()).collect()
}

fn same_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A sequence of `blocks` blocks over `shards` shards, as a worker places it: partials of one query by stripe, ascending.
async fn over_shards(shards: usize, blocks: u8, rows: usize, layer: u32) -> Vec<(u64, Vec<u32>)> {
    let entries = (0..shards).map(|at| ShardEntry::new(ShardId(format!("kv-{at}")), 1));
    let map = ShardMap::new(EPOCH, entries.collect()).unwrap();
    let mut chain = KeyChain::new(tenant(""), geometry());
    chain.push(&(0..u32::from(blocks) * BLOCK_TOKENS as u32).collect::<Vec<_>>());
    let mut stripes = Vec::new();
    for entry in map.shards() {
        let shard = shard(u64::from(blocks));
        let mine: Vec<(u64, u8)> = (0..blocks)
            .filter(|at| map.owner(&chain.stripe_seed(u64::from(*at))) == Some(entry))
            .map(|at| (u64::from(at), at + 1))
            .collect();
        shard.store(&mine.iter().map(|(_, name)| *name).collect::<Vec<_>>()).await;
        let view = shard.view(&mine).await;
        // The rows do not depend on the view's id, which differs from shard to shard.
        let rows = AttendItem { view_id: view, ..item(0, u64::from(blocks) * BLOCK_TOKENS as u64, rows) };
        let answers = shard.attend(vec![query(1, layer, vec![rows])]).await;
        let (partials, _) = partials_of(&answers, 1);
        stripes.extend(partials.iter().map(|partial| (partial.stripe, bits(partial))));
    }
    stripes.sort_unstable();
    stripes
}

#[tokio::test]
async fn the_bits_do_not_depend_on_the_number_of_shards() {
    const BLOCKS: u8 = 9;
    for (rows, layer) in [(1, 0), (5, 2)] {
        let one = over_shards(1, BLOCKS, rows, layer).await;
        assert_eq!(one.len(), 5, "two blocks a stripe");
        let asked = item(0, u64::from(BLOCKS) * BLOCK_TOKENS as u64, rows);
        for (stripe, partial) in &one {
            let blocks: Vec<_> = (2 * *stripe..2 * stripe + 2).filter(|at| *at < u64::from(BLOCKS)).collect();
            let blocks: Vec<_> = blocks.iter().map(|at| (*at, *at as u8 + 1)).collect();
            assert_eq!(*partial, same_bits(&direct(&asked, layer, &blocks)), "stripe {stripe}");
        }
        for shards in [2, 3, 5] {
            assert_eq!(over_shards(shards, BLOCKS, rows, layer).await, one, "{shards} shards");
        }
    }
}

/// A worker in the same process asks without a message, and gets the same.
#[tokio::test]
async fn the_answer_here_is_that_of_the_stream() {
    let shard = shard(8);
    shard.store(&[1, 2, 3, 4, 5]).await;
    let views = [shard.view(&[(0, 1), (1, 2), (2, 3)]).await, shard.view(&[(0, 4), (1, 5)]).await];
    let items = views.map(|view| item(view, 40, 7)).to_vec();
    let asked = query(1, 2, items);
    let answers = shard.attend(vec![asked.clone()]).await;
    let (streamed, _) = partials_of(&answers, 1);
    let here = shard.shard.attend_here(&asked).expect("the shard is here").expect("the query is sound");
    assert_eq!(here.len(), 3);
    for (here, streamed) in here.iter().zip(&streamed) {
        assert_eq!((here.item, here.stripe), (streamed.item, streamed.stripe));
        assert_eq!(same_bits(&here.partial.to_interleaved()), bits(streamed));
    }
    let refused = |query: AttendQuery| shard.shard.attend_here(&query).unwrap().unwrap_err();
    let other = Identity { shard_map_epoch: EPOCH + 1, ..asked.identity };
    assert_eq!(refused(AttendQuery { identity: other, ..asked.clone() }).code, Code::FailedPrecondition);
    assert_eq!(refused(query(1, 2, vec![item(77, 0, 1)])).code, Code::NotFound);
    assert_eq!(refused(query(1, LAYERS, vec![item(views[0], 0, 1)])).code, Code::InvalidArgument);
}

#[tokio::test]
async fn causality_holds_for_rows_in_the_middle_of_the_view() {
    let shard = shard(4);
    shard.store(&[1, 2, 3]).await;
    let view = shard.view(&[(0, 1), (1, 2), (2, 3)]).await;
    let asked = item(view, 20, 6);
    let answers = shard.attend(vec![query(1, 1, vec![asked.clone()])]).await;
    let (partials, _) = partials_of(&answers, 1);
    assert_eq!(bits(&partials[0]), same_bits(&direct(&asked, 1, &[(0, 1), (1, 2)])));
    assert_eq!(bits(&partials[1]), same_bits(&direct(&asked, 1, &[(2, 3)])));
    let unseen = partials[1].partial.to_f32().unwrap();
    assert!(unseen.chunks(2 + HEAD_DIM).all(|row| row[0] == f32::NEG_INFINITY && row[1] == 0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_queries_at_a_time_give_the_bits_of_one() {
    let shard = shard(8);
    shard.store(&[1, 2, 3, 4, 5]).await;
    let views = [
        shard.view(&[(0, 1), (1, 2), (2, 3)]).await,
        shard.view(&[(0, 4), (1, 5)]).await,
        shard.view(&[]).await,
    ];
    let queries: Vec<_> = (0..60)
        .map(|id| {
            let items = views.iter().map(|view| item(*view, 48 + id, 1 + id as usize % 7)).collect();
            query(id, (id % u64::from(LAYERS)) as u32, items)
        })
        .collect();
    let together = shard.attend(queries.clone()).await;
    for query in queries {
        let alone = shard.attend(vec![query.clone()]).await;
        let (expected, _) = partials_of(&alone, query.query_id);
        let (partials, _) = partials_of(&together, query.query_id);
        let places: Vec<_> = partials.iter().map(|partial| (partial.item, partial.stripe)).collect();
        assert_eq!(places, [(0, 0), (0, 1), (1, 0)], "a view without blocks has no partials");
        assert_eq!(partials, expected, "query {}", query.query_id);
        let direct = direct(&query.items[0], query.layer, &[(0, 1), (1, 2)]);
        assert_eq!(bits(&partials[0]), same_bits(&direct));
    }
    assert_eq!(shard.stats().await.attend_total, 120);
}

#[tokio::test]
async fn long_answers_are_cut_into_messages_with_the_same_contents() {
    let fixtures = [shard(16), with_config(Config { attend_message_bytes: 1 << 10, ..config(16) })];
    let mut answers = Vec::new();
    for shard in fixtures {
        let names: Vec<u8> = (1..=12).collect();
        shard.store(&names).await;
        let blocks: Vec<_> = names.iter().map(|name| (u64::from(*name) - 1, *name)).collect();
        let view = shard.view(&blocks).await;
        let rows = AttendItem { view_id: view, ..item(0, 192, 3) };
        let all = shard.attend(vec![query(7, 0, vec![rows.clone(), rows])]).await;
        answers.push(partials_of(&all, 7));
    }
    let [(whole, one), (cut, many)] = answers.try_into().expect("two shards answered");
    assert_eq!(one, 1);
    // Partials of 3 rows, 4 heads and 10 values: 480 bytes, so two to a message of 1,024.
    assert_eq!(many, 6);
    assert_eq!(whole, cut);
    let places: Vec<_> = whole.iter().map(|partial| (partial.item, partial.stripe)).collect();
    assert!(places.is_sorted() && places.len() == 12, "{places:?}");
}
