//! Lists as the executor runs them: every policy's, beside dense attention.

use longshore_attention::{CpuExecutor, Executor, PrefillPolicy, SparseItem, Summaries};

use crate::case::{Case, Shape, generator, policy};
use crate::cuts::policies;

/// Attention by a policy, finished.
fn attend(case: &Case, policy: &PrefillPolicy) -> Vec<f32> {
    let executor = CpuExecutor::serial();
    let mut summaries = Summaries::new(case.kv.shape, case.shape.stripe as u32, 0).unwrap();
    for block in 0..case.shape.tokens / case.shape.block {
        summaries.push(block as u64, &case.kv.tiles[block]).unwrap();
    }
    let cosines = |block: u64, kv_head: usize| summaries.cosine(block, kv_head);
    let mut input = case.input(0, case.shape.tokens);
    input.summaries = &summaries;
    let spreads = summaries.spreads();
    input.spreads = Some(&spreads);
    input.cosines = Some(&cosines);
    let work = policy.plan(&executor, &input).unwrap();
    let item = SparseItem {
        queries: input.queries,
        kv: &case.kv,
        summaries: &summaries,
        work: &work,
        earlier: None,
        stripe: None,
        skip_below: policy.skip_below(),
    };
    executor.attend_sparse(&[item]).unwrap().remove(0).finish()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    (error / size).sqrt()
}

#[test]
fn the_executor_takes_every_list() {
    for block in [16, 64] {
        let case = Shape { tokens: 1536, block, size: 2.0, ..Shape::default() }.case(&mut generator(1));
        let dense = attend(&case, &policy("exact"));
        for policy in policies() {
            let error = distance(&attend(&case, &policy), &dense);
            assert!(error > 0.0 && error < 1.0, "{policy}: {error}");
        }
        let errors = ["on", "off"].map(|correction| {
            let text = format!(
                "fast:skip=off,alpha=0.7,dense_layers=0,min_positions=0,escape=0.1,correction={correction}"
            );
            distance(&attend(&case, &policy(&text)), &dense)
        });
        assert!(errors[0] < 0.8 * errors[1], "with and without correction: {errors:?}");
        for text in ["blocks:alpha=0", "minference:vertical=0,slash=16777216", "streaming:recent=9999"] {
            assert_eq!(
                attend(&case, &policy(&format!("{text},dense_layers=0,min_positions=0"))),
                dense,
                "{text}"
            );
        }
        let columns = policy("minference:vertical=16777216,slash=0,dense_layers=0,min_positions=0");
        assert!(distance(&attend(&case, &columns), &dense) < 1e-6);
    }
}
