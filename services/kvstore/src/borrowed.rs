//! Views that a reader has borrowed: their blocks stay where the budget counts them until it is done, whatever becomes of the views.

use std::sync::Arc;

use longshore_attention::Tile;
use longshore_blocks::{
    Namespace,
    pool::{ViewBlock, ViewId},
};

use crate::{
    Error,
    store::{Pool, Store},
};

/// Blocks of one view.
pub(crate) type Blocks = Arc<Vec<ViewBlock<Arc<Tile>>>>;

/// Borrowed views, returned when it is dropped: never while the pool is lent.
#[derive(Debug)]
pub(crate) struct Borrowed {
    store: Arc<Store>,
    views: Vec<ViewId>,
}

impl Borrowed {
    /// Borrows views and renews their leases; all of them or, if one is not there, none.
    pub(crate) fn of(
        store: &Arc<Store>,
        namespace: Namespace,
        views: impl Iterator<Item = ViewId>,
    ) -> Result<(Vec<Blocks>, Self), Error> {
        let views: Vec<_> = views.collect();
        let borrow = |pool: &mut Pool, now| {
            let mut blocks = Vec::with_capacity(views.len());
            for id in &views {
                match pool.borrow_view(namespace, *id, now) {
                    Ok(borrowed) => blocks.push(borrowed),
                    Err(error) => {
                        views[..blocks.len()].iter().for_each(|id| pool.return_view(*id));
                        return Err(error);
                    }
                }
            }
            Ok(blocks)
        };
        let blocks = store.with_pool(borrow)?;
        Ok((blocks, Self { store: Arc::clone(store), views }))
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.store.with_pool(|pool, _| self.views.iter().for_each(|id| pool.return_view(*id)));
    }
}
