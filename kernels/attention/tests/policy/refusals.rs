//! Calls that cannot be planned.

use longshore_attention::{
    CpuExecutor, Error, HeadPattern, HeadPlan, KvDtype, PagedKv, PlanInput, PrefillPolicy, TileShape, Tiles,
};

use crate::case::{Shape, generator, policy};
use crate::cuts::policies;

#[track_caller]
fn refused(policy: &PrefillPolicy, input: &PlanInput<'_>, field: &str) {
    match policy.plan(&CpuExecutor::serial(), input) {
        Err(Error::Invalid { field: found, problem }) => assert_eq!(found, field, "{problem}"),
        other => panic!("{policy}: {field} should be refused: {:?}", other.err()),
    }
}

#[test]
fn inputs_that_do_not_fit() {
    let case = Shape::default().case(&mut generator(0));
    for policy in policies().iter().chain(&[policy("exact")]) {
        let with = |change: &dyn Fn(&mut PlanInput<'_>), field| {
            let mut input = case.input(0, 700);
            change(&mut input);
            refused(policy, &input, field);
        };
        with(&|input| input.queries.shape.group = 0, "queries");
        with(&|input| input.queries.shape.kv_heads = 3, "queries");
        with(&|input| input.queries.shape.head_dim = 9, "queries");
        with(&|input| input.queries.data = &input.queries.data[1..], "queries");
        with(&|input| input.queries.scale = f32::NAN, "scale");
        with(&|input| input.queries.first_position = u64::MAX - 3, "first_position");
        with(&|input| input.queries.first_position = 1 << 41, "first_position");
        with(&|input| input.queries.first_position = 64, "kv");
        with(&|input| input.stripe_blocks = 0, "stripe_blocks");
        with(&|input| input.stripe_blocks = 257, "stripe_blocks");
        with(&|input| input.first_block = 1, "first_block");
    }
}

#[test]
fn whatever_compares_blocks_needs_all_of_them() {
    let case = Shape { tokens: 1100, ..Shape::default() }.case(&mut generator(1));
    let kv = Tiles { tiles: case.kv.tiles[8..].to_vec(), ..case.kv.clone() };
    let mut input = case.input(512, 1100);
    (input.kv, input.first_block) = (&kv, 8);
    for policy in policies() {
        match policy.fingerprint().starts_with("streaming") {
            true => assert!(policy.plan(&CpuExecutor::serial(), &input).is_ok()),
            false => refused(&policy, &input, "first_block"),
        }
    }
}

#[test]
fn summaries_that_do_not_fit() {
    let case = Shape::default().case(&mut generator(2));
    let balanced = policy("balanced:min_positions=0");
    let mut short = case.summaries.clone();
    short.tiles.truncate(4);
    let shape = TileShape { dtype: KvDtype::F16, ..case.summaries.shape };
    let narrow = Tiles { shape, ..case.summaries.clone() };
    let odd = Tiles { tiles: vec![longshore_attention::Tile::zeroed(shape); 9], ..short };
    for summaries in [&short, &narrow, &odd] {
        let mut input = case.input(0, 700);
        input.summaries = summaries;
        refused(&balanced, &input, "summaries");
        // Nobody reads them.
        for text in ["exact", "balanced", "streaming:min_positions=0", "xattention:min_positions=0"] {
            assert!(policy(text).plan(&CpuExecutor::serial(), &input).is_ok(), "{text}");
        }
    }
    refused(&policy("balanced:min_positions=0,escape=0.5"), &case.input(0, 700), "cosines");
    let second_order = policy("blocks:scorer=second-order,min_positions=0,dense_layers=0");
    for spreads in [None, Some(&short as &dyn PagedKv), Some(&narrow)] {
        let mut input = case.input(0, 700);
        input.spreads = spreads;
        refused(&second_order, &input, "spreads");
    }
}

#[test]
fn plans_of_another_model() {
    let case = Shape::default().case(&mut generator(3));
    for (layers, heads) in [(5, 6), (6, 5), (6, 3)] {
        let plan = HeadPlan::new(vec![vec![HeadPattern::Dense; heads]; layers]).unwrap();
        let policy = PrefillPolicy::parse("heads:min_positions=0", Some(&plan)).unwrap();
        refused(&policy, &case.input(0, 700), "plan");
    }
}

#[test]
fn no_rows_are_no_tiles() {
    let case = Shape::default().case(&mut generator(4));
    for policy in policies() {
        let work = policy.plan(&CpuExecutor::serial(), &case.input(100, 100)).unwrap();
        assert_eq!(work.tiles(), 0);
    }
}
