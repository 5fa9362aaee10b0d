//! `longshore store ls`: blocks and who holds them.

use anyhow::{Context, Result};
use longshore_blocks::{BlockKey, Namespace};
use longshore_proto::types::{BlockEntry, BlockState, ListBlocks};
use serde::Serialize;

use super::{
    cluster::{Cluster, call, hex_digits, shown},
    listing::{Listing, Row},
    table::Table,
};
use crate::{cli::StoreLsArgs, console};

/// Rows that are shown together.
const ROWS_AT_A_TIME: usize = 500;

/// A block as JSON.
#[derive(Debug, Serialize)]
pub(super) struct BlockView {
    pub(super) key: String,
    /// First digits.
    pub(super) namespace: String,
    pub(super) bytes: u64,
    pub(super) copies: usize,
    /// Index in its sequence, where it is known.
    pub(super) index: Option<u64>,
    pub(super) held_by: Vec<CopyView>,
}

/// One copy as JSON.
#[derive(Debug, Serialize)]
pub(super) struct CopyView {
    pub(super) shard: String,
    pub(super) tier: String,
    pub(super) state: &'static str,
    pub(super) views: u64,
    pub(super) lease_ms: u64,
    pub(super) on_disk_too: bool,
}

/// Runs the command.
pub(super) async fn ls(args: &StoreLsArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let list = ListBlocks {
        namespace_prefix: hex_digits("`--namespace`", args.namespace.as_deref().unwrap_or(""), 64)?,
        key_prefix: hex_digits("`--prefix`", args.prefix.as_deref().unwrap_or(""), 32)?,
        after: match &args.after {
            Some(cursor) => Some(resume(&cluster, cursor).await?),
            None => None,
        },
        ..ListBlocks::default()
    };
    let limit = if args.limit == 0 { u64::MAX } else { args.limit };
    let page = u32::try_from(limit).unwrap_or(u32::MAX).min(list.limit);
    let mut listing = Listing::new(&cluster, ListBlocks { limit: page, ..list });
    let (mut rows, mut count, mut more) = (Vec::new(), 0, None);
    let mut last: Option<(Namespace, BlockKey)> = None;
    while let Some(row) = listing.next().await {
        if count == limit {
            more = last;
            break;
        }
        (count, last) = (count + 1, Some((row.namespace, row.key)));
        rows.push(row);
        if rows.len() == ROWS_AT_A_TIME {
            print(&cluster, &std::mem::take(&mut rows), args.json)?;
        }
    }
    print(&cluster, &rows, args.json)?;
    let mut failed = 0;
    for (shard, error) in listing.failures() {
        failed += 1;
        console::note(format!("shard `{}` is left out: {error}", shard.id));
    }
    if count == 0 {
        console::note(nothing(args, cluster.shards.len() - failed));
    }
    if let Some((namespace, key)) = more {
        console::note(format!("there are more: --after {}:{key}", shown(&namespace)));
    }
    Ok(())
}

/// What to say when no block was listed by so many shards.
pub(super) fn nothing(args: &StoreLsArgs, answered: usize) -> String {
    let shards =
        if answered == 1 { "the one shard that answers".to_owned() } else { format!("{answered} shards") };
    let wanted = [("`--namespace", &args.namespace), ("`--prefix", &args.prefix), ("`--after", &args.after)];
    let wanted: Vec<String> =
        wanted.iter().filter_map(|(flag, value)| Some(format!("{flag} {}`", value.as_ref()?))).collect();
    match wanted.is_empty() {
        true => format!("the store is empty: {shards} told of no block"),
        false => format!("no block matches {}: {shards} told of none", wanted.join(" and ")),
    }
}

fn print(cluster: &Cluster, rows: &[Row], json: bool) -> Result<()> {
    if json {
        for row in rows {
            console::say(serde_json::to_string(&view(cluster, row)).context("a block is JSON")?);
        }
        return Ok(());
    }
    if !rows.is_empty() {
        console::say(table(cluster, rows).text());
    }
    Ok(())
}

fn table(cluster: &Cluster, rows: &[Row]) -> Table {
    let mut table = Table::new(&["<KEY", "<NAMESPACE", "INDEX", "SIZE", "COPIES", "<HELD BY"]);
    for row in rows {
        let view = view(cluster, row);
        let held: Vec<String> = view.held_by.iter().map(CopyView::text).collect();
        table.row([
            view.key,
            view.namespace,
            view.index.map_or_else(|| "-".to_owned(), |index| index.to_string()),
            console::bytes(view.bytes),
            view.copies.to_string(),
            held.join(", "),
        ]);
    }
    table
}

impl CopyView {
    fn of(shard: &str, entry: &BlockEntry) -> Self {
        let state = match entry.state {
            BlockState::Sealed => "sealed",
            BlockState::Leaving => "leaving",
            BlockState::Rising => "rising",
        };
        Self {
            shard: shard.to_owned(),
            tier: entry.tier.clone(),
            state,
            views: entry.views,
            lease_ms: entry.lease_ms,
            on_disk_too: entry.on_disk_too,
        }
    }

    /// `kv-0 dram pinned 2 leased 8 s`.
    fn text(&self) -> String {
        let mut text = format!("{} {}", self.shard, self.tier);
        if self.on_disk_too {
            text.push_str("+disk");
        }
        if self.state != "sealed" {
            text.push_str(&format!(" {}", self.state));
        }
        if self.views > 0 {
            text.push_str(&format!(" pinned {}", self.views));
        }
        if self.lease_ms > 0 {
            text.push_str(&format!(" leased {} s", self.lease_ms.div_ceil(1_000)));
        }
        text
    }
}

pub(super) fn view(cluster: &Cluster, row: &Row) -> BlockView {
    let held_by = row.copies.iter().map(|(at, entry)| CopyView::of(&cluster.shards[*at].id, entry)).collect();
    let place = row.copies.iter().find_map(|(_, entry)| entry.place);
    BlockView {
        key: row.key.to_string(),
        namespace: shown(&row.namespace),
        bytes: row.copies.first().map_or(0, |(_, entry)| entry.bytes),
        copies: row.copies.len(),
        index: place.map(|place| place.index),
        held_by,
    }
}

/// Where a list goes on: the whole namespace is looked up, since only its first digits are ever shown.
pub(super) async fn resume(cluster: &Cluster, cursor: &str) -> Result<(Namespace, BlockKey)> {
    let form = "`--after` must be NAMESPACE:KEY as the list before told it";
    let (namespace, key) = cursor.split_once(':').context(form)?;
    let (namespace, key) = (hex_digits("`--after`", namespace, 64)?, hex_digits("`--after`", key, 32)?);
    let bytes = |digits: &str, at: usize| u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok();
    let mut whole_key = [0; 16];
    for (at, byte) in whole_key.iter_mut().enumerate() {
        *byte = bytes(&key, at).context(form)?;
    }
    for shard in &cluster.shards {
        let list = ListBlocks { namespace_prefix: namespace.clone(), limit: 1, ..ListBlocks::default() };
        if let Ok(page) = shard.client.list_blocks(&call(), list).await
            && let Some(entry) = page.blocks.first()
        {
            return Ok((entry.namespace, BlockKey(whole_key)));
        }
    }
    // Nothing of it is left: what comes after it is what comes after its last possible block.
    let mut whole = [0xff; 32];
    for (at, byte) in whole.iter_mut().enumerate().take(namespace.len() / 2) {
        *byte = bytes(&namespace, at).context(form)?;
    }
    Ok((Namespace::from_bytes(whole), BlockKey([0xff; 16])))
}
