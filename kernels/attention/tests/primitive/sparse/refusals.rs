//! Sparse calls that must be refused, each with the field that is wrong.

use longshore_attention::{
    Column, CpuExecutor, Error, ExactBlock, Executor, HeadShape, KvDtype, Partials, SparseItem, SparseWork,
    Tile, TileShape, Visit,
};

use super::case::{List, SparseCase};
use crate::case::{Plan, generator};

/// 20 rows of 2 KV heads from position 20 on, blocks of 16 and stripes of 32: lists of tiles 0 and 1 of either head.
fn case() -> SparseCase {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 8 };
    let plan = Plan { heads, block_tokens: 16, dtype: KvDtype::F16, prefix: 20, rows: 20, size: 1.0 };
    SparseCase::full(plan, 32, &mut generator(131))
}

fn refused_item(field: &str, item: SparseItem<'_>) {
    let error = CpuExecutor::serial().attend_sparse(&[item]).expect_err(field);
    assert!(error.to_string().starts_with(&format!("`{field}` ")), "{field}: {error}");
}

fn refused(field: &str, change: impl FnOnce(&mut SparseCase)) {
    let mut case = case();
    change(&mut case);
    let work = case.whole();
    refused_item(field, case.item(&work, 0..20));
}

fn refused_visit(field: &str, visit: Visit) {
    refused(field, |case| case.lists[3].0.insert(1, visit));
}

fn accepted_visit(visit: Visit) {
    let mut case = case();
    case.lists[3].0.insert(1, visit);
    case.attend();
}

#[test]
fn visits_outside_of_the_tiles() {
    let block = ExactBlock { tile: 0, first_position: 0, len: 1 };
    accepted_visit(Visit::Block(block));
    refused_visit("blocks", Visit::Block(ExactBlock { tile: 3, ..block }));
    refused_visit("blocks", Visit::Block(ExactBlock { tile: u32::MAX, ..block }));
    refused_visit("blocks", Visit::Block(ExactBlock { len: 0, ..block }));
    refused_visit("blocks", Visit::Block(ExactBlock { len: 17, ..block }));
    refused_visit("blocks", Visit::Block(ExactBlock { first_position: u64::MAX, ..block }));

    let column = Column { tile: 0, offset: 0, position: 0 };
    for wrong in [Column { tile: 3, ..column }, Column { offset: 16, ..column }] {
        refused("columns", |case| case.lists[0].1.push(wrong));
    }
    refused("columns", |case| {
        case.lists[0].1 = vec![column; 17];
        case.lists[0].0.push(Visit::Columns { first: 0, count: 17 });
    });
    refused("columns", |case| case.lists[0].0.push(Visit::Columns { first: 0, count: 0 }));
}

#[test]
fn means_that_cannot_be() {
    let means = |tile, first, keys| Visit::Means { tile, first, keys };
    accepted_visit(means(0, 0, 0xffff_ffff));
    accepted_visit(means(0, 16, 0xffff));
    for wrong in [
        means(1, 0, 1),
        means(u32::MAX, 0, 1),
        means(0, 1, 1),
        means(0, 8, 1),
        means(0, 32, 1),
        means(0, !15, 1),
        means(0, 0, 0),
        means(0, 0, 1 << 32),
        means(0, 0, u64::MAX),
        means(0, 16, 1 << 16),
    ] {
        refused_visit("means", wrong);
    }
}

#[test]
fn summaries_of_another_shape() {
    let with = |field, change: fn(&mut TileShape)| {
        refused(field, |case| {
            change(&mut case.summaries.shape);
            case.lists[0].0.push(Visit::Means { tile: 0, first: 0, keys: 1 });
        });
    };
    with("summaries", |shape| shape.kv_heads = 3);
    with("summaries", |shape| shape.head_dim = 9);
    with("summaries", |shape| shape.dtype = KvDtype::F16);
    with("means", |shape| shape.block_tokens = 64);
    with("block_tokens", |shape| shape.block_tokens = 48);
    // Nobody looks at summaries that are not visited.
    let mut case = case();
    case.summaries.shape.head_dim = 9;
    case.attend();
}

#[test]
fn lists_that_do_not_match() {
    let base = case();
    let work = base.whole();
    let more = base.item(&work, 0..20);
    refused_item("row_ends", SparseItem { queries: base.item(&work, 0..19).queries, ..more });
    refused_item("kv_heads", SparseItem { work: &SparseWork::default(), ..more });
    let three = SparseWork::new(3, vec![20], vec![List::default(); 3]).unwrap();
    refused_item("kv_heads", SparseItem { work: &three, ..more });
    for limit in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused_item("skip_below", SparseItem { skip_below: Some(limit), ..more });
    }
    for (rows, heads, dim) in [(19, 6, 8), (20, 5, 8), (20, 6, 9), (0, 0, 0)] {
        let partials = Partials::identity(rows, heads, dim);
        refused_item("earlier", SparseItem { earlier: Some(&partials), ..more });
        refused_item("stripe", SparseItem { stripe: Some(&partials), ..more });
    }
    refused("blocks", |case| {
        case.case.kv.tiles[1] = Tile::zeroed(TileShape { dtype: KvDtype::F32, ..case.case.kv.shape });
    });
    let mut item = more;
    item.queries.scale = f32::NAN;
    refused_item("scale", item);
    item = more;
    item.queries.shape.group = 0;
    refused_item("group", item);
}

/// One wrong item refuses the call, wherever it stands.
#[test]
fn any_item_is_checked() {
    let (good, mut bad) = (case(), case());
    bad.lists[2].0.push(Visit::Means { tile: 0, first: 0, keys: 0 });
    let (good_work, bad_work) = (good.whole(), bad.whole());
    let items = [good.item(&good_work, 0..20), bad.item(&bad_work, 0..20)];
    let found = CpuExecutor::serial().attend_sparse(&items);
    assert!(matches!(found, Err(Error::Invalid { field: "means", .. })), "{found:?}");
}
