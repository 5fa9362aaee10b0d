//! Sparse attention and summaries of the shard in memory, by other means than those of a real shard: all heads of a tile, of which
//! one has queries and a list.

use longshore_attention::{
    CpuExecutor, ExactBlock, Executor, HeadShape, Mean, Queries, SparseItem, SparseWork, TileShape, Visit,
};
use longshore_proto::types::{
    AttendItem, AttendPartial, GetSummaries, SparseVisits, SummariesMessage, Tensor,
};

use super::shard::{StripeTiles, Stripes};

/// One partial per stripe with a visited block.
pub(super) fn attend(
    heads: HeadShape,
    shape: TileShape,
    index: usize,
    stripes: &Stripes,
    item: &AttendItem,
    visits: &SparseVisits,
) -> Vec<AttendPartial> {
    let (rows, own) = (item.queries.shape[0] as usize, visits.kv_head as usize);
    let width = heads.group * heads.head_dim;
    let mut data = vec![0.0; rows * heads.kv_heads * width];
    let queries = item.queries.to_f32().expect("queries are f32");
    for (row, queries) in queries.chunks_exact(width).enumerate() {
        data[(row * heads.kv_heads + own) * width..][..width].copy_from_slice(queries);
    }
    let first_position = item.first_position;
    let queries = Queries { shape: heads, first_position, scale: item.scale, data: &data };
    let mut partials = Vec::new();
    for (&stripe, tiles) in stripes {
        let visited = |block: u64| visits.runs.iter().any(|run| run.contains(&block));
        let list: Vec<Visit> = tiles
            .iter()
            .enumerate()
            .filter(|(_, (block, _))| visited(*block))
            .map(|(tile, (block, _))| {
                let first_position = block * shape.block_tokens as u64;
                Visit::Block(ExactBlock { tile: tile as u32, first_position, len: shape.block_tokens as u32 })
            })
            .collect();
        if list.is_empty() {
            continue;
        }
        let lists =
            (0..heads.kv_heads).map(|head| (if head == own { list.clone() } else { Vec::new() }, Vec::new()));
        let work =
            SparseWork::new(heads.kv_heads, vec![rows as u32], lists.collect()).expect("one list a head");
        let kv = StripeTiles { shape, tiles };
        let skip_below = visits.skip_below;
        let call = SparseItem {
            queries,
            kv: &kv,
            summaries: &kv,
            work: &work,
            earlier: None,
            stripe: None,
            skip_below,
        };
        let whole = CpuExecutor::serial().attend_sparse(&[call]).expect("the item is sound").remove(0);
        let mut values = Vec::new();
        for (row, head) in (0..rows).flat_map(|row| (0..heads.group).map(move |head| (row, head))) {
            let (m, l, o) = whole.row(row, own * heads.group + head);
            values.extend([m, l]);
            values.extend_from_slice(o);
        }
        let shape = [rows, heads.group, heads.head_dim + 2].map(|extent| extent as u64);
        partials.push(AttendPartial {
            item: index as u32,
            stripe,
            partial: Tensor::from_f32(&shape, &values),
        });
    }
    partials
}

/// Summaries of a view in one layer, two blocks a message.
pub(super) fn summaries(get: &GetSummaries, layer: u32, stripes: &Stripes) -> Vec<SummariesMessage> {
    let means: Vec<Mean> = stripes.values().flatten().map(|(_, tile)| Mean::of(tile)).collect();
    let chunks = means.chunks(2).enumerate();
    let message = |(index, means): (usize, &[Mean])| {
        let (heads, dim) = means[0].shape();
        let axes = [means.len(), heads, dim].map(|extent| extent as u64);
        let tensor = |axes: &[u64], part: fn(&Mean) -> &[f32]| {
            Tensor::from_f32(axes, &means.iter().flat_map(part).copied().collect::<Vec<_>>())
        };
        SummariesMessage {
            layer,
            first: 2 * index as u64,
            keys: tensor(&axes, Mean::key),
            values: get.values.then(|| tensor(&axes, Mean::value)),
            spreads: get.spreads.then(|| tensor(&axes, Mean::spread)),
            cosines: get.cosines.then(|| tensor(&axes[..2], Mean::cosines)),
        }
    };
    chunks.map(message).collect()
}
