//! `longshore bench store`: tiles into shards and out of them by lane, beside what memory and loopback of this machine do in
//! the same run.

mod floor;
mod gpu;
mod load;
mod lookup;
mod place;
mod report;
mod ring;
mod slab;
mod usage;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use longshore_attention::{KvDtype, TileShape};

use self::{
    floor::Floor,
    load::{Load, Operation, Source},
    place::{Place, Plan, Reached},
    report::{NotRun, Point, Report},
    ring::Ring,
};
use crate::{
    cli::{BenchStoreArgs, StoreEnd, StoreLane},
    console,
    machine::Machine,
    role::blocking,
};

/// Tokens of a block and elements of a head of the shapes that are measured.
const BLOCK_TOKENS: usize = 64;
const HEAD_DIM: usize = 128;
/// Bytes of prepared tiles: more than caches of one core hold.
const SOURCE_BYTES: usize = 128 << 20;

/// Runs the command.
pub(crate) async fn store(args: BenchStoreArgs) -> Result<()> {
    ensure!(
        args.seconds > 0.0 && args.seconds < 3600.0,
        "`--seconds` must be more than 0 and less than 3600"
    );
    if args.child {
        return place::serve_child(&args).await;
    }
    let tables = args.json.as_ref().is_none_or(|path| path.as_os_str() != "-");
    let mut report = Report::new(Machine::read(), &args, tables);
    for &tile_bytes in &args.tile_bytes {
        let shape = shape(tile_bytes)?;
        let source = Arc::new(blocking(move || Ok(Source::new(shape, SOURCE_BYTES))).await?);
        let (seconds, tiles) = (args.seconds, Arc::clone(&source));
        let floor = blocking(move || Floor::measure(&tiles, seconds)).await?;
        report.floor(floor);
        for &end in &args.ends {
            for &processes in &args.processes {
                measure(&args, &mut report, &source, (shape, end, processes)).await?;
            }
        }
    }
    if !args.without_lookups {
        for &processes in &args.processes {
            report.lookup(lookup::measure(&args, processes).await?);
        }
    }
    report.finish();
    match &args.json {
        None => Ok(()),
        Some(path) if path.as_os_str() == "-" => {
            console::say(report.json()?);
            Ok(())
        }
        Some(path) => std::fs::write(path, report.json()? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display())),
    }
}

/// All points of one end, with its shard in this process or in one of its own.
async fn measure(
    args: &BenchStoreArgs,
    report: &mut Report,
    source: &Arc<Source>,
    (shape, end, processes): (TileShape, StoreEnd, u32),
) -> Result<()> {
    let plan = Plan::new(args, shape, end);
    let place = if processes == 1 { Place::here(&plan).await? } else { Place::child(&plan).await? };
    let memory = Arc::new(Ring::new(source.tile_bytes()));
    for &lane in &args.lanes {
        let shard = match place.shard(lane).await? {
            Reached::Shard(shard) => shard,
            Reached::Nowhere => continue,
            Reached::NotRun(why) => {
                report.not_run(NotRun { lane, end, processes, tile_bytes: source.tile_bytes(), why });
                continue;
            }
        };
        for &concurrency in &args.concurrency {
            let load = Arc::new(Load {
                shard: Arc::clone(&shard),
                source: Arc::clone(source),
                memory: memory.clone(),
                shape,
                layers: args.layers,
                concurrency,
                duration: Duration::from_secs_f64(args.seconds),
                verify: !args.unverified,
            });
            for operation in [Operation::Put, Operation::Get] {
                let usage = place.usage();
                let tally = load.run(operation).await.with_context(|| format!("{lane:?} {operation:?}"))?;
                let cpu_seconds = place.usage() - usage;
                let what = (lane, end, processes, operation);
                report.point(Point::new(what, source.tile_bytes(), concurrency, &tally, cpu_seconds));
            }
        }
    }
    place.end().await
}

/// Tiles of `bytes`, f16.
fn shape(bytes: u64) -> Result<TileShape> {
    let head_bytes = (2 * BLOCK_TOKENS * HEAD_DIM * 2) as u64;
    ensure!(bytes.is_multiple_of(head_bytes), "`--tile-bytes` must be multiples of {head_bytes}");
    let shape = TileShape {
        block_tokens: BLOCK_TOKENS,
        kv_heads: (bytes / head_bytes) as usize,
        head_dim: HEAD_DIM,
        dtype: KvDtype::F16,
    };
    shape.validate().context("`--tile-bytes` is no size of a tile")?;
    Ok(shape)
}

/// Whether the lane exists between two processes.
fn crosses(lane: StoreLane) -> bool {
    lane != StoreLane::Local
}
