//! The lane `nccl` of a measurement: a GPU for the clients in this process, and one for the shard.

use std::{path::PathBuf, sync::Arc};

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_cuda::{CudaDevice, CudaOptions};
use longshore_fabric::{CallContext, Error, Shard, nccl::GpuLanes};
use longshore_proto::types::GetBlocks;

use super::load::identity;
use crate::{
    cli::{BenchStoreArgs, StoreLane},
    cuda,
    role::blocking,
};

/// Which side of the lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Shard,
}

/// What makes ends of the lane at one side, or why there is none.
pub(super) type Lanes = Result<Arc<dyn GpuLanes>, String>;

/// What makes ends of the lane at one side. Clients have the first GPU and shards the second where there is one: NCCL refuses two ranks on
/// one GPU, unless it is told to take them. Nothing is opened where the lane is not asked for.
pub(super) async fn lanes(args: &BenchStoreArgs, side: Side) -> Lanes {
    if !args.lanes.contains(&StoreLane::Nccl) {
        return Err("it was not asked for".to_owned());
    }
    let options = options(&args.library_path);
    let opened = blocking(move || cuda::lanes_of(index(side, &options), &options));
    opened.await.map_err(|error| format!("{error:#}"))
}

fn options(folders: &[PathBuf]) -> CudaOptions {
    CudaOptions { library_path: folders.to_vec(), cache_path: None }
}

fn index(side: Side, options: &CudaOptions) -> u32 {
    let is_second = side == Side::Shard && CudaDevice::examine(1, options).is_ok();
    u32::from(is_second)
}

/// Whether the lane works: one call over it, whatever is read.
pub(super) async fn works(shard: &Arc<dyn Shard>) -> Result<(), Error> {
    let get = GetBlocks::whole(identity(), vec![BlockKey([0xff; 16])]);
    let mut tiles = shard.get_blocks(&CallContext::new("bench"), get).await?;
    while let Some(tile) = tiles.next().await {
        tile?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        args: BenchStoreArgs,
    }

    #[tokio::test]
    async fn where_there_is_none_it_is_said_why() {
        let of = |flags: &[&str]| Flags::parse_from([&["x"], flags].concat()).args;
        assert_eq!(lanes(&of(&["--lanes", "tcp"]), Side::Client).await.unwrap_err(), "it was not asked for");
        // An empty folder has no library; machines with a GPU find the system's own.
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().display().to_string();
        let args = of(&["--lanes", "tcp,nccl", "--library-path", &folder]);
        for side in [Side::Client, Side::Shard] {
            if let Err(why) = lanes(&args, side).await {
                assert!(why.len() > 20 && !why.contains("asked for"), "{why}");
            }
        }
    }
}
