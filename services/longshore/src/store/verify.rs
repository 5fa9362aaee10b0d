//! `longshore store verify`: every copy of blocks, checked by its holder and compared with the others.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use longshore_proto::types::{BlockEntry, ListBlocks};
use serde::Serialize;

use super::{
    cluster::{Cluster, hex_digits, shown},
    listing::{Listing, Row},
    progress::Progress,
};
use crate::{cli::StoreVerifyArgs, console};

/// Blocks of a page that is checked.
const PAGE_BLOCKS: u32 = 64;
/// Blocks with too few copies that are looked at once more: they may have been on the move.
const AGAIN_MAX: usize = 4_096;

/// A block that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) key: String,
    /// First digits.
    pub(super) namespace: String,
    /// Shards whose copy was damaged; they dropped it.
    pub(super) damaged: Vec<String>,
    /// Shards with a copy that is sound in itself and has other bytes than the first one.
    pub(super) differing: Vec<String>,
    /// Sound copies.
    pub(super) sound: usize,
    /// Copies that there should be.
    pub(super) wanted: usize,
}

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    pub(super) blocks: u64,
    pub(super) copies: u64,
    pub(super) damaged_copies: u64,
    pub(super) differing_copies: u64,
    /// Blocks with fewer sound copies than wanted.
    pub(super) short_blocks: u64,
    /// Keys that were asked for and that no shard holds.
    pub(super) missing_keys: Vec<String>,
    /// Shards that did not answer to the end, and why.
    pub(super) unanswered: BTreeMap<String, String>,
}

impl Totals {
    /// Whether every copy is there and sound.
    pub(super) fn is_sound(&self) -> bool {
        let bad = self.damaged_copies + self.differing_copies + self.short_blocks;
        bad == 0 && self.missing_keys.is_empty() && self.unanswered.is_empty()
    }
}

/// Runs the command.
pub(super) async fn verify(args: &StoreVerifyArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let (findings, totals) = run(&cluster, if args.all { None } else { Some(&args.keys) }).await?;
    for finding in &findings {
        match args.json {
            true => console::say(serde_json::to_string(finding).context("a finding is JSON")?),
            false => console::say(finding.text()),
        }
    }
    match args.json {
        true => console::say(serde_json::to_string(&totals).context("totals are JSON")?),
        false => console::say(totals.text()),
    }
    if !totals.is_sound() {
        bail!("not every copy is there and sound");
    }
    Ok(())
}

/// Verifies the blocks whose keys begin with one of `keys`, or all.
pub(super) async fn run(cluster: &Cluster, keys: Option<&[String]>) -> Result<(Vec<Finding>, Totals)> {
    let stats = cluster.stats().await;
    let known = || stats.iter().filter_map(|stats| stats.as_ref().ok());
    let wanted = known().map(|stats| stats.copies.wanted as usize).max().unwrap_or(0).max(1);
    let prefixes = match keys {
        None => vec![String::new()],
        Some(keys) => keys.iter().map(|key| hex_digits("the key", key, 32)).collect::<Result<_>>()?,
    };
    let blocks: u64 = known().map(|stats| stats.blocks).sum();
    let mut walk = Walk {
        wanted,
        copies_due: if keys.is_none() { blocks } else { 0 },
        findings: Vec::new(),
        totals: Totals::default(),
        progress: Progress::new("verify"),
    };
    for prefix in prefixes {
        walk.prefix(cluster, &prefix, keys.is_some()).await;
    }
    walk.look_again(cluster).await;
    walk.progress.end();
    Ok((walk.findings, walk.totals))
}

struct Walk {
    wanted: usize,
    /// Copies that there are about, for the progress; 0: nobody knows.
    copies_due: u64,
    findings: Vec<Finding>,
    totals: Totals,
    progress: Progress,
}

impl Walk {
    async fn prefix(&mut self, cluster: &Cluster, prefix: &str, is_asked_for: bool) {
        let list = ListBlocks {
            key_prefix: prefix.to_owned(),
            limit: PAGE_BLOCKS,
            check: true,
            ..ListBlocks::default()
        };
        let (mut listing, before) = (Listing::new(cluster, list), self.totals.blocks);
        while let Some(row) = listing.next().await {
            self.row(cluster, &row);
        }
        if is_asked_for && self.totals.blocks == before {
            self.totals.missing_keys.push(prefix.to_owned());
        }
        let failed = listing.failures().map(|(shard, error)| (shard.id.clone(), error.to_string()));
        self.totals.unanswered.extend(failed);
    }

    fn row(&mut self, cluster: &Cluster, row: &Row) {
        let id = |at: &usize| cluster.shards[*at].id.clone();
        let is_sound = |entry: &BlockEntry| entry.sound == Some(true);
        let mut finding = Finding {
            key: row.key.to_string(),
            namespace: shown(&row.namespace),
            damaged: row.copies.iter().filter(|(_, entry)| !is_sound(entry)).map(|(at, _)| id(at)).collect(),
            differing: Vec::new(),
            sound: 0,
            wanted: self.wanted,
        };
        let sound: Vec<_> = row.copies.iter().filter(|(_, entry)| is_sound(entry)).collect();
        if let Some((_, first)) = sound.first() {
            let others = sound.iter().filter(|(_, entry)| entry.checksums != first.checksums);
            finding.differing = others.map(|(at, _)| id(at)).collect();
        }
        finding.sound = sound.len() - finding.differing.len();
        self.totals.blocks += 1;
        self.totals.copies += row.copies.len() as u64;
        self.totals.damaged_copies += finding.damaged.len() as u64;
        self.totals.differing_copies += finding.differing.len() as u64;
        let found = self.findings.len() + usize::from(!finding.is_sound());
        let due = self.copies_due.max(self.totals.copies);
        self.progress.set(self.totals.copies, due, &format!("copies, {found} findings"));
        if !finding.is_sound() {
            self.findings.push(finding);
        }
    }

    /// Looks once more for copies that were missing: pages of different shards are not of one moment, and blocks move.
    async fn look_again(&mut self, cluster: &Cluster) {
        for finding in self.findings.iter_mut().filter(|finding| finding.is_short_only()).take(AGAIN_MAX) {
            let list = ListBlocks {
                key_prefix: finding.key.clone(),
                namespace_prefix: finding.namespace.clone(),
                ..ListBlocks::default()
            };
            if let Some(row) = Listing::new(cluster, list).next().await {
                finding.sound = row.copies.len();
            }
        }
        self.findings.retain(|finding| !finding.is_sound());
        let short = self.findings.iter().filter(|finding| finding.sound < finding.wanted).count();
        self.totals.short_blocks = short as u64;
    }
}

impl Finding {
    fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.differing.is_empty() && self.sound >= self.wanted
    }

    /// Nothing is wrong but that copies are missing.
    fn is_short_only(&self) -> bool {
        self.damaged.is_empty() && self.differing.is_empty() && self.sound < self.wanted
    }

    fn text(&self) -> String {
        let mut text = format!("{} of {}:", self.key, self.namespace);
        if !self.damaged.is_empty() {
            text.push_str(&format!(" damaged on {} (dropped there),", self.damaged.join(", ")));
        }
        if !self.differing.is_empty() {
            text.push_str(&format!(" other bytes on {},", self.differing.join(", ")));
        }
        text.push_str(&format!(" {} of {} copies sound", self.sound, self.wanted));
        text
    }
}

impl Totals {
    fn text(&self) -> String {
        let mut lines = vec![format!(
            "{} blocks, {} copies: {} damaged, {} with other bytes than the first, {} blocks short of copies",
            console::grouped(self.blocks),
            console::grouped(self.copies),
            self.damaged_copies,
            self.differing_copies,
            self.short_blocks
        )];
        lines.extend(self.missing_keys.iter().map(|key| format!("no shard holds a block `{key}`")));
        let unanswered = self.unanswered.iter();
        lines.extend(
            unanswered.map(|(id, error)| format!("shard `{id}` was not verified to the end: {error}")),
        );
        lines.join("\n")
    }
}
