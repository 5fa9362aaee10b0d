//! Attention by another executor than the CPU's: it is asked for every answer, and its faults are told as what they are.

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use longshore_attention::{
    AttendItem as ExecutorItem, CpuExecutor, Error as AttentionError, Executor, Partials, PlanInput,
    PrefillPolicy, SparseItem, SparseWork,
};
use longshore_fabric::Code;
use longshore_proto::types::SparseVisits;

use super::*;

/// The CPU's, which counts what it is asked for and fails where it is told to.
#[derive(Debug)]
struct Given {
    cpu: CpuExecutor,
    items: AtomicUsize,
    fault: Mutex<Option<AttentionError>>,
}

impl Given {
    fn new() -> Arc<Self> {
        let (items, fault) = (AtomicUsize::new(0), Mutex::new(None));
        Arc::new(Self { cpu: CpuExecutor::serial(), items, fault })
    }

    fn count(&self, items: usize) -> Result<(), AttentionError> {
        self.items.fetch_add(items, Ordering::Relaxed);
        self.fault.lock().unwrap().take().map_or(Ok(()), Err)
    }
}

impl Executor for Given {
    fn attend(&self, items: &[ExecutorItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        self.count(items.len())?;
        self.cpu.attend(items)
    }

    fn attend_sparse(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        self.count(items.len())?;
        self.cpu.attend_sparse(items)
    }

    fn plan(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<SparseWork, AttentionError> {
        self.cpu.plan(policy, input)
    }
}

fn shard_of(executor: &Arc<Given>) -> Fixture {
    let executor: Arc<dyn Executor> = Arc::clone(executor) as Arc<dyn Executor>;
    let compute = ShardCompute { pool: ComputePool::serial(), executor };
    with_compute("kv-0", config(8), compute, |tier| tier)
}

#[tokio::test]
async fn every_answer_is_the_executors() {
    let given = Given::new();
    let (own, cpu) = (shard_of(&given), shard(8));
    let mut answers = Vec::new();
    for shard in [&own, &cpu] {
        shard.store(&[1, 2, 3]).await;
        let view = shard.view(&[(0, 1), (1, 2), (2, 3)]).await;
        let sparse = Some(SparseVisits { kv_head: 1, runs: vec![0..1, 2..3], skip_below: None });
        let rows = AttendItem { view_id: view, ..item(0, 48, 3) };
        let group = HEADS / KV_HEADS;
        let values = noise(9, 2 * group * HEAD_DIM);
        let queries = Tensor::from_f32(&[2, group as u64, HEAD_DIM as u64], &values);
        let one_head = AttendItem { view_id: view, queries, sparse, ..rows.clone() };
        let asked = query(1, 1, vec![rows, one_head]);
        let (streamed, _) = partials_of(&shard.attend(vec![asked.clone()]).await, 1);
        assert_eq!(shard.shard.attend_here(&asked).unwrap().unwrap().len(), streamed.len());
        answers.push(streamed.into_iter().map(|answer| answer.partial).collect::<Vec<_>>());
    }
    assert_eq!(answers[0], answers[1], "the same arithmetic, whoever does it");
    // Two stripes of each item, asked for twice.
    assert_eq!((answers[0].len(), given.items.load(Ordering::Relaxed)), (4, 8));
}

#[tokio::test]
async fn faults_of_a_device_are_told_as_what_they_are() {
    let given = Given::new();
    let shard = shard_of(&given);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    for (fault, code) in [
        (AttentionError::Exhausted("no room".to_owned()), Code::ResourceExhausted),
        (AttentionError::Device("a fault".to_owned()), Code::Internal),
        (AttentionError::Invalid { field: "head_dim", problem: "is 8".to_owned() }, Code::InvalidArgument),
    ] {
        *given.fault.lock().unwrap() = Some(fault.clone());
        let (told, message) = shard.refused(query(1, 1, vec![item(view, 16, 2)])).await;
        assert_eq!(told, longshore_fabric::status::code_number(code), "{message}");
        *given.fault.lock().unwrap() = Some(fault);
        let error = shard.shard.attend_here(&query(1, 1, vec![item(view, 16, 2)])).unwrap().unwrap_err();
        assert_eq!((error.code, error.retryable()), (code, code == Code::ResourceExhausted), "{error}");
        // The shard goes on.
        let (partials, _) = partials_of(&shard.attend(vec![query(1, 1, vec![item(view, 16, 2)])]).await, 1);
        assert_eq!(partials.len(), 1);
    }
}
