//! Results against the f64 reference.

use longshore_attention::{CpuExecutor, Executor, HeadShape, KvDtype, Partials, WorkList};
use longshore_compute::InstructionSet;
use rand::RngExt;

use crate::case::{Case, Plan, attend, bits, generator, relative_l2};

/// Every instruction set of the machine is near the reference, and all give the same bits.
fn check(what: &str, case: &Case, limit: f64) {
    let (reference, portable) = (case.reference(), case.attend_with(&with(InstructionSet::Portable)));
    let error = relative_l2(&portable.clone().finish(), &reference);
    assert!(error <= limit, "{what}: relative L2 error {error:e}, limit {limit:e}");
    for set in InstructionSet::available() {
        assert_eq!(bits(&case.attend_with(&with(set))), bits(&portable), "{what} with {set}");
    }
}

fn with(set: InstructionSet) -> CpuExecutor {
    CpuExecutor::serial().with_instruction_set(set)
}

/// Head sizes and groups of real models, and odd ones, with every KV type; up to a full row tile of 96 packed rows and more.
#[test]
fn dense_causal_matches_on_random_shapes() {
    let mut rng = generator(11);
    for head_dim in [1, 5, 16, 17, 33, 64, 80, 96, 128, 200, 256] {
        for group in [1, 2, 3, 4, 5, 7, 8] {
            for dtype in KvDtype::ALL {
                let plan = Plan {
                    heads: HeadShape { kv_heads: rng.random_range(1..3), group, head_dim },
                    block_tokens: [16, 32, 64, 128, 256][rng.random_range(0..5)],
                    dtype,
                    prefix: rng.random_range(0..150),
                    rows: rng.random_range(1..40),
                    size: 1.0,
                };
                check(&format!("{plan:?}"), &plan.dense(&mut rng), 2e-6);
            }
        }
    }
}

/// One query row over many keys, of every type.
#[test]
fn decoding_matches() {
    let mut rng = generator(18);
    for dtype in KvDtype::ALL {
        for head_dim in [64, 128] {
            let heads = HeadShape { kv_heads: 2, group: rng.random_range(1..9), head_dim };
            let prefix = rng.random_range(1000..3000);
            let plan = Plan { heads, block_tokens: 64, dtype, prefix, rows: 1, size: 1.0 };
            check(&format!("{plan:?}"), &plan.dense(&mut rng), 2e-6);
        }
    }
}

/// What rounding keys and values costs. The reference of the other tests reads tiles back.
#[test]
fn stored_types_are_as_exact_as_they_should_be() {
    let (plan, exact) = (small(20, 1.0), small(20, 1.0).dense(&mut generator(19)).reference());
    for (dtype, limit) in [(KvDtype::F16, 1e-3), (KvDtype::Bf16, 8e-3), (KvDtype::Int8, 2e-2)] {
        let case = Plan { dtype, ..plan }.dense(&mut generator(19));
        check(dtype.name(), &case, 2e-6);
        let error = relative_l2(&case.attend().finish(), &exact);
        assert!(error < limit, "{dtype:?}: relative L2 error {error:e} against f32 keys and values");
        assert!(error > limit / 50.0, "{dtype:?}: relative L2 error {error:e}, as if nothing was rounded");
    }
}

#[test]
fn columns_and_summaries_match() {
    let mut rng = generator(12);
    for round in 0..40 {
        let plan = Plan {
            heads: HeadShape {
                kv_heads: rng.random_range(1..4),
                group: rng.random_range(1..9),
                head_dim: [24, 64, 80][rng.random_range(0..3)],
            },
            block_tokens: [16, 64][round / 4 % 2],
            dtype: KvDtype::ALL[round % 4],
            prefix: rng.random_range(0..200),
            rows: rng.random_range(1..60),
            size: 1.0,
        };
        check(&format!("{plan:?}"), &plan.sparse(&mut rng), 2e-6);
    }
}

fn small(rows: usize, size: f32) -> Plan {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    Plan { heads, block_tokens: 64, dtype: KvDtype::F32, prefix: 100, rows, size }
}

/// f32 logits of 1e4 are off by about 1e-3, and so are the probabilities: but nothing overflows.
#[test]
fn huge_logits_stay_finite() {
    let mut rng = generator(13);
    for dtype in KvDtype::ALL {
        let case = Plan { dtype, ..small(40, 1e4) }.dense(&mut rng);
        let output = case.attend().finish();
        assert!(output.iter().all(|x| x.is_finite()), "{dtype:?}");
        check(&format!("logits of 1e4, {dtype:?}"), &case, 2e-2);
    }
}

#[test]
fn equal_logits_average_the_values() {
    let mut rng = generator(14);
    for dtype in KvDtype::ALL {
        let mut case = Plan { dtype, ..small(40, 1.0) }.dense(&mut rng);
        case.q.fill(0.0);
        check(&format!("logits of 0, {dtype:?}"), &case, 1e-6);
        let partials = case.attend();
        for row in 0..case.rows() {
            let (m, l, _) = partials.row(row, 0);
            assert_eq!((m.to_bits(), l), (0, (101 + row) as f32), "row {row}, {dtype:?}");
        }
    }
}

/// Rows before all keys of the work list, in calls where other rows see some.
#[test]
fn rows_without_keys_are_zero() {
    let mut rng = generator(15);
    let mut case = small(40, 1.0).dense(&mut rng);
    case.work.exact.retain(|block| block.first_position > 100);
    assert_eq!(case.work.exact.len(), 1);
    let first_key = case.work.exact[0].first_position;
    let partials = case.attend();
    let width = case.row_width();
    let output = partials.clone().finish();
    for row in 0..case.rows() {
        let sees = case.first_position + row as u64 >= first_key;
        assert_eq!(partials.row(row, 0).0 > f32::NEG_INFINITY, sees, "row {row}");
        assert_eq!(output[row * width..][..width].iter().any(|&x| x != 0.0), sees, "row {row}");
    }
}

#[test]
fn empty_calls_give_the_identity() {
    let mut rng = generator(16);
    let case = small(7, 1.0).dense(&mut rng);
    let empty = WorkList::default();
    let identity = Partials::identity(7, 6, 64);
    assert_eq!(attend(case.item(&empty, 0, 7, None)), identity);
    assert!(identity.finish().iter().all(|&x| x == 0.0));

    for set in InstructionSet::available() {
        let found = with(set).attend(&[case.item(&empty, 0, 7, None)]).unwrap().remove(0);
        assert_eq!(bits(&found), bits(&Partials::identity(7, 6, 64)), "{set}");
    }

    let none = attend(case.item(&case.work, 0, 0, None));
    assert_eq!(none.shape(), (0, 6, 64));
}

/// A summary of weight w is w equal keys.
#[test]
fn a_summary_stands_for_its_keys() {
    let mut rng = generator(17);
    let mut case = small(1, 1.0).dense(&mut rng);
    let width = case.heads.kv_heads * case.heads.head_dim;
    let (key, value) = case.kv.tiles[0].read(5).unwrap();
    let (keys, values) = (key.repeat(64), value.repeat(64));
    assert_eq!(keys.len(), 64 * width);
    case.kv.tiles[0].write(0, &keys, &values).unwrap();
    let exact = case.attend().finish();

    case.work.exact.remove(0);
    let dim = case.heads.head_dim;
    for (kv_head, (key, value)) in key.chunks(dim).zip(value.chunks(dim)).enumerate() {
        case.work.summaries.push(longshore_attention::SummaryKey {
            kv_head: kv_head as u32,
            key: key.to_vec(),
            value: value.to_vec(),
            weight: 64.0,
            bias: 0.0,
        });
    }
    let exact: Vec<f64> = exact.iter().map(|&x| f64::from(x)).collect();
    let error = relative_l2(&case.attend().finish(), &exact);
    assert!(error < 1e-6, "relative L2 error {error:e}");
}
