//! The executor of the device on the emulator: the comparisons with the CPU, and what it refuses.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/counted.rs"]
mod counted;
#[path = "executor/counts.rs"]
mod counts;
#[path = "emulator/device.rs"]
mod device;
#[path = "executor/kept.rs"]
mod kept;
#[path = "executor/plan.rs"]
mod plan;
#[path = "executor/policy.rs"]
mod policy;
#[path = "executor/promised.rs"]
mod promised;
#[path = "executor/shortage.rs"]
mod shortage;

use std::sync::Arc;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, Kind, KvDtype, Queries, Tile, TileShape, Tiles,
    WorkList,
};
use longshore_cuda::{CudaExecutor, Device, selftest};

use device::Emulator;

#[test]
fn attention_is_that_of_the_cpu() {
    let device = Emulator::device();
    let by_groups = selftest::wgmma_cases().into_iter().filter(|case| case.name.starts_with("executor, "));
    for case in selftest::executor_cases().into_iter().chain(by_groups) {
        let error = case.run(&device).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        println!("{}: {error:.2e}", case.name);
        assert!(error <= case.limit, "{}: {error:e} above {:e}", case.name, case.limit);
    }
}

fn tiles(count: usize, head_dim: usize) -> Tiles {
    let shape = TileShape { block_tokens: 16, kv_heads: 1, head_dim, dtype: KvDtype::F16 };
    Tiles { shape, tiles: vec![Tile::zeroed(shape); count] }
}

fn block(tile: u32) -> ExactBlock {
    ExactBlock { tile, first_position: u64::from(tile) * 16, len: 16 }
}

#[test]
fn what_cannot_be_is_refused() {
    let executor = |pages: usize| {
        let device: Arc<dyn Device> = Emulator::new();
        CudaExecutor::new(device, CpuExecutor::serial(), pages * 16 * 2 * 64 * 2)
    };
    let heads = |head_dim| HeadShape { kv_heads: 1, group: 2, head_dim };
    let data = vec![0.5; 2 * 64];
    let queries = |head_dim: usize| Queries {
        shape: heads(head_dim),
        first_position: 1000,
        scale: 0.1,
        data: &data[..2 * head_dim],
    };
    let attend = |executor: &CudaExecutor, kv: &Tiles, work: &WorkList, head_dim| {
        executor.attend(&[AttendItem { queries: queries(head_dim), kv, work, initial: None }])
    };
    let blocks = |tiles: u32| WorkList { exact: (0..tiles).map(block).collect(), ..WorkList::default() };

    // A head size that no kernel has; a tile that is not there.
    let error = attend(&executor(9), &tiles(2, 20), &blocks(2), 20).unwrap_err();
    assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("head_dim"), "{error}");
    let error = attend(&executor(9), &tiles(2, 64), &blocks(3), 64).unwrap_err();
    assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("tile 2"), "{error}");
}

#[test]
fn nothing_gives_the_identity() {
    let device = Emulator::device();
    let executor = CudaExecutor::new(device, CpuExecutor::serial(), 1 << 20);
    let (kv, work) = (tiles(0, 64), WorkList::default());
    for rows in [0, 1, 40] {
        let data = vec![1.0; rows * 128];
        let queries = Queries {
            shape: HeadShape { kv_heads: 1, group: 2, head_dim: 64 },
            first_position: 0,
            scale: 1.0,
            data: &data,
        };
        let items = [AttendItem { queries, kv: &kv, work: &work, initial: None }];
        assert_eq!(executor.attend(&items).unwrap(), CpuExecutor::serial().attend(&items).unwrap());
    }
    assert!(executor.attend(&[]).unwrap().is_empty() && executor.attend_sparse(&[]).unwrap().is_empty());
}
