//! Calls that must be refused, each with the field that is wrong.

use longshore_attention::{
    AttendItem, Column, CpuExecutor, Error, ExactBlock, Executor, HeadShape, Kind, KvDtype, Partials,
    Queries, SummaryKey, Tile, TileShape,
};

use crate::case::{Case, Plan, generator};

fn case() -> Case {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 8 };
    Plan { heads, block_tokens: 16, dtype: KvDtype::F32, prefix: 20, rows: 4, size: 1.0 }
        .dense(&mut generator(31))
}

/// The call after `change`, which must be refused because of `field`.
fn refused(field: &str, change: impl FnOnce(&mut Case)) {
    let mut case = case();
    change(&mut case);
    let queries =
        Queries { shape: case.heads, first_position: case.first_position, scale: case.scale, data: &case.q };
    refused_item(field, AttendItem { queries, kv: &case.kv, work: &case.work, initial: None });
}

fn refused_item(field: &str, item: AttendItem<'_>) {
    let error = CpuExecutor::serial().attend(&[item]).expect_err(field);
    assert!(error.to_string().starts_with(&format!("`{field}` ")), "{field}: {error}");
    assert_eq!((error.kind(), error.retryable()), (Kind::InvalidInput, false));
}

#[test]
fn work_lists_outside_of_the_tiles() {
    refused("exact", |case| case.work.exact[1].tile = 2);
    refused("exact", |case| case.work.exact[1].tile = u32::MAX);
    refused("exact", |case| case.work.exact[0].len = 0);
    refused("exact", |case| case.work.exact[0].len = 17);
    refused("exact", |case| case.work.exact.push(ExactBlock { tile: 0, first_position: u64::MAX, len: 1 }));
    refused("columns", |case| case.work.columns.push(Column { tile: 2, offset: 0, position: 0 }));
    refused("columns", |case| case.work.columns.push(Column { tile: 0, offset: 16, position: 0 }));
    refused("column_bias", |case| case.work.column_bias.push(0.0));
    for bias in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused("column_bias", |case| {
            case.work.columns.push(Column { tile: 0, offset: 0, position: 0 });
            case.work.column_bias.push(bias);
        });
    }
}

#[test]
fn summaries_that_cannot_be() {
    let summary = |kv_head, key, value, weight| SummaryKey {
        kv_head,
        key: vec![0.0; key],
        value: vec![0.0; value],
        weight,
        bias: 0.0,
    };
    for wrong in [
        SummaryKey { bias: f32::NAN, ..summary(0, 8, 8, 1.0) },
        SummaryKey { bias: f32::INFINITY, ..summary(0, 8, 8, 1.0) },
        summary(2, 8, 8, 1.0),
        summary(0, 7, 8, 1.0),
        summary(0, 8, 9, 1.0),
        summary(0, 8, 8, 0.0),
        summary(0, 8, 8, -1.0),
        summary(0, 8, 8, f32::NAN),
        summary(0, 8, 8, f32::INFINITY),
    ] {
        refused("summaries", |case| case.work.summaries.push(wrong));
    }
}

#[test]
fn shapes_that_do_not_match() {
    refused("kv_heads", |case| case.heads.kv_heads = 3);
    refused("kv_heads", |case| case.kv.shape.kv_heads = 0);
    refused("head_dim", |case| case.heads.head_dim = 4);
    refused("block_tokens", |case| case.kv.shape.block_tokens = 48);
    refused("exact", |case| {
        case.kv.tiles[1] = Tile::zeroed(TileShape { dtype: KvDtype::F16, ..case.kv.shape })
    });

    let case = case();
    for (rows, heads, dim) in [(3, 6, 8), (4, 5, 8), (4, 6, 9), (0, 0, 0)] {
        let initial = Partials::identity(rows, heads, dim);
        refused_item("initial", case.item(&case.work, 0, 4, Some(&initial)));
    }
}

#[test]
fn queries_that_cannot_be() {
    let case = case();
    let item = case.item(&case.work, 0, 4, None);
    let with = |change: fn(&mut AttendItem<'_>)| {
        let mut item = item;
        change(&mut item);
        item
    };
    refused_item("group", with(|item| item.queries.shape.group = 0));
    refused_item("queries", with(|item| item.queries.data = &item.queries.data[1..]));
    refused_item("queries", with(|item| item.queries.shape.group = 7));
    refused_item("scale", with(|item| item.queries.scale = f32::NAN));
    refused_item("first_position", with(|item| item.queries.first_position = u64::MAX - 1));
}

/// One wrong item refuses the call, wherever it stands.
#[test]
fn any_item_is_checked() {
    let (good, mut bad) = (case(), case());
    bad.work.exact[0].len = 99;
    let items = [good.item(&good.work, 0, 4, None), bad.item(&bad.work, 0, 4, None)];
    assert!(matches!(CpuExecutor::serial().attend(&items), Err(Error::Invalid { field: "exact", .. })));
}
