//! Views: the blocks of one sequence, pinned while somebody uses them.

use std::{collections::HashSet, sync::Arc};

use super::{BlockPool, Generation, Resource, SealedBlock};
use crate::{BlockKey, Error, Namespace};

/// Names a view; never 0, unique in its pool and unguessable without the pool's secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ViewId(pub u64);

/// A block of a view.
#[derive(Debug)]
pub struct ViewBlock<T> {
    /// Index in the sequence: position of the first token / block_tokens.
    pub index: u64,
    /// The block.
    pub block: Arc<SealedBlock<T>>,
}

impl<T> Clone for ViewBlock<T> {
    fn clone(&self) -> Self {
        Self { index: self.index, block: self.block.clone() }
    }
}

/// What became of a request for a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// All blocks are there and pinned.
    Open(ViewId),
    /// Nothing was opened because these are not held.
    Missing(Vec<BlockKey>),
}

/// An open view.
#[derive(Debug)]
pub(super) struct View<T> {
    pub(super) namespace: Namespace,
    /// Ascending by index. Shared with readers, copied when it changes under them.
    blocks: Arc<Vec<ViewBlock<T>>>,
    lease_ms: u64,
    pub(super) expires_at_ms: u64,
    /// When it was last used.
    used_ms: u64,
    /// A block of it failed a check.
    corrupt: Option<BlockKey>,
    /// As what it counts: as a view, or as one that is to be appended to another.
    pub(super) share: Resource,
    /// Readers that have not returned it: its blocks stay pinned for them although it is closed.
    borrowed: u64,
}

impl<T> View<T> {
    pub(super) fn condemn(&mut self, generation: Generation) {
        if let Some(bad) = self.blocks.iter().find(|entry| entry.block.generation() == generation) {
            self.corrupt = Some(bad.block.key());
        }
    }

    fn touch(&mut self, now_ms: u64) {
        self.expires_at_ms = self.expires_at_ms.max(now_ms.saturating_add(self.lease_ms));
        self.used_ms = self.used_ms.max(now_ms);
    }

    /// Its blocks, with multiplicity.
    pub(super) fn count(&self) -> u64 {
        self.blocks.len() as u64
    }
}

impl<T> BlockPool<T> {
    /// Opens a view of (index in the sequence, key), strictly ascending by index, and pins its blocks until it is closed or
    /// not used for `lease_ms`. A view without blocks is allowed: it is appended to later.
    pub fn open_view(
        &mut self,
        namespace: Namespace,
        blocks: &[(u64, BlockKey)],
        lease_ms: u64,
        now_ms: u64,
    ) -> Result<Opened, Error> {
        let limit = self.config.views_max as u64;
        if self.shares.all(Resource::Views) >= limit {
            return Err(Error::Full { what: "views", limit });
        }
        self.pin_view(namespace, blocks, lease_ms, now_ms, Resource::Views)
    }

    /// Opens a view like [`Self::open_view`] of blocks that are to be appended to `into`: it counts apart from the views that its tenant
    /// may have, so that whoever has as many as it may can still append. Renews the lease of `into`.
    pub fn open_addition(
        &mut self,
        namespace: Namespace,
        into: ViewId,
        blocks: &[(u64, BlockKey)],
        lease_ms: u64,
        now_ms: u64,
    ) -> Result<Opened, Error> {
        self.view(namespace, into, now_ms)?;
        let limit = self.config.views_max as u64;
        if self.shares.all(Resource::Additions) >= limit {
            return Err(Error::Full { what: "additions to views", limit });
        }
        self.pin_view(namespace, blocks, lease_ms, now_ms, Resource::Additions)
    }

    fn pin_view(
        &mut self,
        namespace: Namespace,
        blocks: &[(u64, BlockKey)],
        lease_ms: u64,
        now_ms: u64,
        share: Resource,
    ) -> Result<Opened, Error> {
        self.check_size(blocks.len())?;
        check_order(blocks)?;
        let found: Vec<_> =
            blocks.iter().map(|(_, key)| self.index.get(&(namespace, *key)).copied()).collect();
        if found.contains(&None) {
            let missing = blocks.iter().zip(&found).filter(|(_, found)| found.is_none());
            return Ok(Opened::Missing(missing.map(|((_, key), _)| *key).collect()));
        }
        self.shares.ask(namespace, share, 1, self.config.views_max as u64)?;
        self.ask_to_view(namespace, blocks.len())?;
        let is_new = |generation: &&Generation| self.held.get(*generation).is_some_and(|held| held.pins == 0);
        let fresh = found.iter().flatten().filter(is_new).count() as u64;
        self.ask_to_keep(namespace, fresh)?;
        self.shares.take(namespace, share);
        self.shares.take_more(namespace, Resource::ViewedBlocks, blocks.len() as u64);
        let pinned = blocks.iter().zip(found.into_iter().flatten());
        let blocks =
            pinned.map(|((index, _), found)| ViewBlock { index: *index, block: self.pin(found, now_ms) });
        let blocks = Arc::new(blocks.collect());
        let id = self.next_view_id();
        let (expires_at_ms, used_ms, corrupt, borrowed) = (0, now_ms, None, 0);
        let mut view = View { namespace, blocks, lease_ms, expires_at_ms, used_ms, corrupt, share, borrowed };
        view.touch(now_ms);
        self.views.insert(id, view);
        Ok(Opened::Open(id))
    }

    /// Moves the blocks of `from` to the end of `into`, whose lease becomes that of `from` and starts again. Blocks that
    /// `into` has already, with the same key at the same index, are let go: a caller may repeat an append whose answer it
    /// did not get. `from` is closed in any case.
    pub fn append_view(
        &mut self,
        namespace: Namespace,
        into: ViewId,
        from: ViewId,
        now_ms: u64,
    ) -> Result<(), Error> {
        let appended = self.append_fresh(namespace, into, from, now_ms);
        self.close_view(from);
        appended
    }

    fn append_fresh(
        &mut self,
        namespace: Namespace,
        into: ViewId,
        from: ViewId,
        now_ms: u64,
    ) -> Result<(), Error> {
        let added = self.view(namespace, from, now_ms)?;
        let lease_ms = self.view_mut(namespace, from)?.lease_ms;
        let fresh = self.fresh_blocks(namespace, into, &added, now_ms)?;
        self.ask_to_view(namespace, fresh.len())?;
        self.shares.take_more(namespace, Resource::ViewedBlocks, fresh.len() as u64);
        for entry in &fresh {
            self.pin(entry.block.generation(), now_ms);
        }
        let view = self.view_mut(namespace, into)?;
        Arc::make_mut(&mut view.blocks).extend(fresh);
        view.lease_ms = lease_ms;
        view.touch(now_ms);
        Ok(())
    }

    /// The blocks among `added` that `into` does not have yet.
    fn fresh_blocks(
        &mut self,
        namespace: Namespace,
        into: ViewId,
        added: &[ViewBlock<T>],
        now_ms: u64,
    ) -> Result<Vec<ViewBlock<T>>, Error> {
        let old = self.view(namespace, into, now_ms)?;
        let last = old.last().map(|entry| entry.index);
        let split = last.map_or(0, |last| added.partition_point(|entry| entry.index <= last));
        let (repeated, fresh) = added.split_at(split);
        let same = |entry: &ViewBlock<T>| {
            old.binary_search_by_key(&entry.index, |old| old.index)
                .is_ok_and(|at| old[at].block.key() == entry.block.key())
        };
        if let Some(other) = repeated.iter().find(|entry| !same(entry)) {
            let problem = format!("has {}, which is not after the view's last block", other.index);
            return Err(Error::Invalid { field: "block_indices", problem });
        }
        self.check_size(old.len() + fresh.len())?;
        Ok(fresh.to_vec())
    }

    /// Blocks of a view, ascending by index; renews its lease. The view of another namespace is as unknown as one that
    /// never was.
    pub fn view(
        &mut self,
        namespace: Namespace,
        id: ViewId,
        now_ms: u64,
    ) -> Result<Arc<Vec<ViewBlock<T>>>, Error> {
        let view = self.view_mut(namespace, id)?;
        view.touch(now_ms);
        match view.corrupt {
            Some(key) => Err(Error::Corrupt {
                what: format!("block `{key}` of view `{}`", id.0),
                problem: "a tile does not match its checksum".to_owned(),
            }),
            None => Ok(view.blocks.clone()),
        }
    }

    /// The blocks of a view as [`Self::view`] tells them, which stay pinned until [`Self::return_view`], although the view is closed or
    /// expires before.
    pub fn borrow_view(
        &mut self,
        namespace: Namespace,
        id: ViewId,
        now_ms: u64,
    ) -> Result<Arc<Vec<ViewBlock<T>>>, Error> {
        let blocks = self.view(namespace, id, now_ms)?;
        self.view_mut(namespace, id)?.borrowed += 1;
        Ok(blocks)
    }

    /// A reader that borrowed a view is done.
    ///
    /// # Panics
    /// When nobody borrowed it.
    pub fn return_view(&mut self, id: ViewId) {
        let view = self.views.get_mut(&id).or_else(|| self.closed_views.get_mut(&id));
        let view = view.expect("a borrowed view is kept until it is returned");
        view.borrowed = view.borrowed.checked_sub(1).expect("only borrowed views are returned");
        if view.borrowed == 0
            && let Some(view) = self.closed_views.remove(&id)
        {
            self.let_go(view);
        }
    }

    /// Ends a view: nobody finds it any more, and its blocks are let go as soon as nobody borrows it. Unknown views are no error.
    pub fn close_view(&mut self, id: ViewId) {
        let Some(view) = self.views.remove(&id) else { return };
        if view.borrowed > 0 {
            self.closed_views.insert(id, view);
        } else {
            self.let_go(view);
        }
    }

    /// Renews the lease of a view, which is `lease_ms` from now on.
    pub fn renew_view(
        &mut self,
        namespace: Namespace,
        id: ViewId,
        lease_ms: u64,
        now_ms: u64,
    ) -> Result<(), Error> {
        let view = self.view_mut(namespace, id)?;
        view.touch(now_ms);
        view.lease_ms = lease_ms;
        view.expires_at_ms = now_ms.saturating_add(lease_ms);
        Ok(())
    }

    fn let_go(&mut self, view: View<T>) {
        self.shares.give(view.namespace, view.share);
        self.shares.give_more(view.namespace, Resource::ViewedBlocks, view.count());
        // Last block first: the tail then goes before the head, without which it is worth nothing.
        let used_ms = view.used_ms;
        view.blocks.iter().rev().for_each(|entry| self.unpin(entry.block.generation(), used_ms));
    }

    fn view_mut(&mut self, namespace: Namespace, id: ViewId) -> Result<&mut View<T>, Error> {
        let view = self.views.get_mut(&id).filter(|view| view.namespace == namespace);
        view.ok_or_else(|| Error::NotFound { what: format!("view `{}`", id.0) })
    }

    fn check_size(&self, blocks: usize) -> Result<(), Error> {
        let limit = self.config.view_blocks_max;
        if blocks > limit {
            let problem = format!("make a view of {blocks} blocks, limit {limit}");
            return Err(Error::Invalid { field: "blocks", problem });
        }
        Ok(())
    }

    /// Refuses when views of `tenant` may have no `blocks` more.
    fn ask_to_view(&mut self, tenant: Namespace, blocks: usize) -> Result<(), Error> {
        let limit = self.config.view_blocks_max as u64;
        self.shares.ask(tenant, Resource::ViewedBlocks, blocks as u64, limit)
    }

    fn next_view_id(&mut self) -> ViewId {
        loop {
            let count = self.next_id();
            let digest = blake3::keyed_hash(&self.config.view_secret, &count.to_le_bytes());
            let (word, _) = digest.as_bytes().split_first_chunk::<8>().expect("a digest has 32 bytes");
            let id = ViewId(u64::from_le_bytes(*word));
            if id.0 != 0 && !self.views.contains_key(&id) && !self.closed_views.contains_key(&id) {
                return id;
            }
        }
    }

    /// Pins of every generation, counted anew from the views.
    #[cfg(test)]
    pub(super) fn count_pins(&self) -> std::collections::HashMap<Generation, u64> {
        let mut pins = std::collections::HashMap::new();
        for entry in self.all_views().flat_map(|view| view.blocks.iter()) {
            *pins.entry(entry.block.generation()).or_default() += 1;
        }
        pins
    }

    /// Views that pin blocks, whether they can be found or not.
    #[cfg(test)]
    pub(super) fn all_views(&self) -> impl Iterator<Item = &View<T>> {
        self.views.values().chain(self.closed_views.values())
    }
}

/// A view has its blocks in the order of the sequence, and none of them twice: two of a sequence never have one key, as each key follows
/// from all that is before.
fn check_order(blocks: &[(u64, BlockKey)]) -> Result<(), Error> {
    if blocks.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
        return Err(Error::Invalid { field: "block_indices", problem: "are not ascending".to_owned() });
    }
    let mut seen = HashSet::with_capacity(blocks.len());
    match blocks.iter().find(|(_, key)| !seen.insert(*key)) {
        Some((_, twice)) => Err(Error::Invalid { field: "keys", problem: format!("have `{twice}` twice") }),
        None => Ok(()),
    }
}
