//! Cutting queries and joining answers, without a stream.

use proptest::prelude::*;

use super::{expected_of, item, partial_of, query};
use crate::{
    Code,
    link::{
        answer::{Expected, Joiner},
        split::{PIECE_BYTES, Piece, split},
    },
};
use longshore_proto::types::{AttendPartial, AttendQuery, Dtype, Tensor};

fn pieces(query: &AttendQuery) -> (Expected, Vec<Piece>) {
    let expected = Expected::of(query).unwrap();
    let pieces = split(query.clone(), &expected);
    (expected, pieces)
}

fn answer(piece: &Piece, stripes: &[u64]) -> Vec<AttendPartial> {
    let items = piece.query.items.iter().zip(0..);
    items
        .flat_map(|(item, index)| stripes.iter().map(move |stripe| partial_of(item, index, *stripe)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn cut_and_joined_is_the_same(rows in proptest::collection::vec(1..700usize, 1..5), heads in 1..12usize, head_dim in 1..80usize) {
        let whole = query(rows.iter().zip(1..).map(|(rows, view)| item(view, *rows, heads, head_dim)).collect());
        let (expected, pieces) = pieces(&whole);
        let mut joiner = Joiner::new(&expected);
        for piece in &pieces {
            let bytes: usize = piece.query.items.iter().map(|item| item.queries.data.len()).sum();
            prop_assert!(bytes <= PIECE_BYTES && !piece.query.items.is_empty());
            prop_assert_eq!((piece.query.layer, piece.query.identity), (whole.layer, whole.identity));
            joiner.add(&piece.spans, answer(piece, &[9, 4])).unwrap();
        }
        let joined = joiner.finish().unwrap();
        let order: Vec<_> = joined.iter().map(|partial| (partial.item, partial.stripe)).collect();
        let wanted: Vec<_> = (0..rows.len() as u32).flat_map(|item| [(item, 4), (item, 9)]).collect();
        prop_assert_eq!(order, wanted);
        for partial in joined {
            prop_assert_eq!(partial.partial, expected_of(&whole.items[partial.item as usize], partial.stripe));
        }
    }
}

#[test]
fn rows_larger_than_a_message_go_one_by_one() {
    let wide = query(vec![item(1, 3, 600, 512)]);
    let (_, pieces) = pieces(&wide);
    assert_eq!(pieces.iter().map(|piece| piece.spans[0].first_row).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(pieces[2].query.items[0].first_position, 1002);
}

#[test]
fn queries_that_make_no_sense_are_refused() {
    let check = |spoil: fn(&mut AttendQuery), field| {
        let mut query = query(vec![item(1, 1, 2, 4), item(2, 1, 2, 4)]);
        spoil(&mut query);
        assert_eq!(Expected::of(&query).unwrap_err().field.as_deref(), Some(field));
    };
    check(|query| query.items[1].queries.shape = vec![8], "items[1].queries");
    check(|query| query.items[1].queries.shape = vec![0, 2, 4], "items[1].queries");
    check(|query| query.items[1].queries.shape = vec![u64::MAX, u64::MAX, 4], "items[1].queries");
    check(|query| query.items[1].queries.dtype = Dtype::F16, "items[1].queries");
    check(|query| query.items[1].first_position = u64::MAX, "items[1].first_position");
}

/// Spoils a good answer to a query of two pieces and expects the join to refuse it.
fn refused(spoil: impl Fn(usize, &mut Vec<AttendPartial>)) {
    let whole = query(vec![item(1, 500, 9, 64), item(2, 3, 9, 64)]);
    let (expected, pieces) = pieces(&whole);
    assert_eq!(pieces.len(), 2);
    let mut joiner = Joiner::new(&expected);
    let joined = pieces.iter().enumerate().try_for_each(|(index, piece)| {
        let mut partials = answer(piece, &[0, 1]);
        spoil(index, &mut partials);
        joiner.add(&piece.spans, partials)
    });
    let error = joined.and_then(|()| joiner.finish().map(drop)).unwrap_err();
    assert_eq!(error.code, Code::DataLoss, "{error}");
}

fn with_value(partial: &mut AttendPartial, index: usize, value: f32) {
    let mut values = partial.partial.to_f32().unwrap();
    values[index] = value;
    partial.partial = Tensor::from_f32(&partial.partial.shape, &values);
}

#[test]
fn bad_answers_are_data_loss() {
    refused(|_, partials| partials.clear());
    // One piece lacks a stripe that the other has.
    refused(|index, partials| drop(partials.remove(1 - index)));
    refused(|index, partials| {
        partials.retain(|partial| index == 0 || partial.stripe == 0 || partial.item > 0)
    });
    refused(|index, partials| partials.retain(|partial| index == 0 || partial.item == 0));
    refused(|_, partials| partials.push(partials[0].clone()));
    refused(|_, partials| partials[0].item = 7);
    refused(|_, partials| partials[0].item = u32::MAX);
    refused(|_, partials| partials[0].partial.shape.swap(0, 1));
    refused(|_, partials| partials[0].partial.dtype = Dtype::F16);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused(|_, partials| with_value(&mut partials[0], 1, value));
        refused(|_, partials| with_value(&mut partials[0], 5, value));
    }
    refused(|_, partials| with_value(&mut partials[0], 0, f32::NAN));
    refused(|_, partials| with_value(&mut partials[0], 0, f32::INFINITY));
    refused(|_, partials| with_value(&mut partials[0], 1, -1.0));
}
