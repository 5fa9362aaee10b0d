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
    /// Versions of the tiles that dense items visited.
    seen: Mutex<Vec<u64>>,
    fault: Mutex<Option<AttentionError>>,
}

impl Given {
    fn new() -> Arc<Self> {
        let (items, seen, fault) = (AtomicUsize::new(0), Mutex::default(), Mutex::new(None));
        Arc::new(Self { cpu: CpuExecutor::serial(), items, seen, fault })
    }

    fn count(&self, items: usize) -> Result<(), AttentionError> {
        self.items.fetch_add(items, Ordering::Relaxed);
        self.fault.lock().unwrap().take().map_or(Ok(()), Err)
    }
}

impl Executor for Given {
    fn attend(&self, items: &[ExecutorItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        self.count(items.len())?;
        let visited =
            items.iter().flat_map(|item| item.work.exact.iter().map(move |block| (item, block.tile)));
        let versions = visited.map(|(item, tile)| item.kv.tile(tile as usize).version());
        self.seen.lock().unwrap().extend(versions);
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
    shard_with(executor, config(8))
}

fn shard_with(executor: &Arc<Given>, config: Config) -> Fixture {
    let executor: Arc<dyn Executor> = Arc::clone(executor) as Arc<dyn Executor>;
    let compute = ShardCompute { pool: ComputePool::serial(), executor };
    with_compute("kv-0", config, compute, |tier| tier)
}

/// A device finds copies of tiles again by their versions.
#[tokio::test]
async fn tiles_that_are_read_from_disk_again_are_the_same_for_a_device() {
    let (given, folder) = (Given::new(), disk::folder());
    let shard = shard_with(&given, disk::tiers(folder.path(), 2, 12));
    let (names, blocks) = disk::names(9);
    shard.store(&names).await;
    let view = shard.view(&blocks).await;
    let ask = |layer| {
        let asked = query(1, layer, vec![AttendItem { view_id: view, ..item(0, 144, 1) }]);
        shard.shard.attend_here(&asked).expect("it is here").expect("the query is sound");
        std::mem::take(&mut *given.seen.lock().unwrap())
    };
    let (first, other, again) = (ask(0), ask(1), ask(0));
    assert_eq!((first.len(), other.len(), again.len()), (9, 9, 9));
    // Two were in memory, and may have been written out meanwhile.
    let same = first.iter().zip(&again).filter(|(first, again)| first == again).count();
    assert!(same >= 7, "{first:?}, {again:?}");
    let all: std::collections::HashSet<u64> = first.into_iter().chain(other).collect();
    assert_eq!(all.len(), 18, "each tile has its own");
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
