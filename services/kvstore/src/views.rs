//! Opening views: blocks are pinned, then verified, then named.

use std::sync::Arc;

use longshore_blocks::{
    BlockKey, Namespace,
    pool::{Opened, ViewId},
    tier::Tier,
};
use longshore_proto::types::{OpenView, OpenedView};

use crate::{
    Error,
    get::is_sound,
    store::{Store, check_count},
};

/// Leases that a view may have, milliseconds.
const LEASE_MS: std::ops::RangeInclusive<u32> = 1_000..=600_000;
/// Blocks that are verified in one turn on the compute pool.
const VERIFY_STEP_BLOCKS: usize = 32;
/// Largest block index: positions stay far from the end of their type.
const BLOCK_INDEX_MAX: u64 = 1 << 48;

/// Opens a view or appends to one.
pub(crate) async fn open(store: &Arc<Store>, open: OpenView) -> Result<OpenedView, Error> {
    store.check_identity(&open.identity)?;
    check(&open)?;
    let namespace = open.identity.namespace;
    let (blocks, lease_ms) = (&open.blocks, u64::from(open.lease_ms));
    // As long as a lease may be, so that none ends while its blocks are verified.
    let unnamed_ms = u64::from(*LEASE_MS.end());
    let opened = store.with_pool(|pool, now| match open.append_to {
        None => pool.open_view(namespace, blocks, unnamed_ms, now),
        Some(into) => pool.open_addition(namespace, ViewId(into), blocks, unnamed_ms, now),
    })?;
    let view = match opened {
        Opened::Missing(keys) => return Ok(OpenedView::Missing(keys)),
        Opened::Open(id) => Unnamed { store: store.clone(), id, kept: false },
    };
    // Blocks on disk are checked whenever a tile of theirs is read.
    let corrupt = verify(store, namespace, view.id).await?;
    if !corrupt.is_empty() {
        return Ok(OpenedView::Missing(corrupt));
    }
    store.with_pool(|pool, now| pool.renew_view(namespace, view.id, lease_ms, now))?;
    let view_id = match open.append_to {
        None => view.keep(),
        Some(into) => {
            store.with_pool(|pool, now| pool.append_view(namespace, ViewId(into), view.id, now))?;
            into
        }
    };
    Ok(OpenedView::Open { view_id })
}

fn check(open: &OpenView) -> Result<(), Error> {
    check_count("blocks", open.blocks.len())?;
    if !LEASE_MS.contains(&open.lease_ms) {
        let problem =
            format!("is {}, must be from {} to {}", open.lease_ms, LEASE_MS.start(), LEASE_MS.end());
        return Err(Error::invalid("lease_ms", problem));
    }
    match open.blocks.iter().find(|(index, _)| *index > BLOCK_INDEX_MAX) {
        Some((index, _)) => {
            Err(Error::invalid("block_indices", format!("has {index}, limit {BLOCK_INDEX_MAX}")))
        }
        None => Ok(()),
    }
}

/// Checks every tile of a view; drops the blocks that changed since they were stored and names them.
async fn verify(store: &Arc<Store>, namespace: Namespace, view: ViewId) -> Result<Vec<BlockKey>, Error> {
    let blocks = store.with_pool(|pool, now| pool.view(namespace, view, now))?;
    let below = blocks.iter().filter(|entry| entry.block.tier() == Tier::Disk);
    store.wish(below.map(|entry| entry.block.generation()));
    let (layers, mut broken) = (store.identity().layers, Vec::new());
    // In steps of some milliseconds, so that others get their turns between them.
    for first in (0..blocks.len()).step_by(VERIFY_STEP_BLOCKS) {
        let (turn, worker, blocks) = (store.turns().turn(namespace).await, store.clone(), blocks.clone());
        let verify = move || {
            let _turn = turn;
            let step = &blocks[first..blocks.len().min(first + VERIFY_STEP_BLOCKS)];
            let sound =
                |index: usize| step[index].block.pages().is_none_or(|pages| is_sound(&pages, 0..layers));
            let found = worker.compute_pool().map(step.len(), sound);
            let broken = step.iter().zip(found).filter(|(_, sound)| !sound);
            broken.map(|(entry, _)| entry.block.clone()).collect::<Vec<_>>()
        };
        broken.extend(store.off_reactor(verify).await?);
    }
    broken.iter().for_each(|block| store.condemn(block));
    Ok(broken.iter().map(|block| block.key()).collect())
}

/// A view that its caller does not know of yet: closed unless it is kept, also when the caller leaves meanwhile.
struct Unnamed {
    store: Arc<Store>,
    id: ViewId,
    kept: bool,
}

impl Unnamed {
    fn keep(mut self) -> u64 {
        self.kept = true;
        self.id.0
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if !self.kept {
            self.store.with_pool(|pool, _| pool.close_view(self.id));
        }
    }
}
