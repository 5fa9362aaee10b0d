//! One search through all blocks: where their copies belong, whether they are there, and what to do about it.

mod counts;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use longshore_blocks::{
    BlockKey, BlockPlace, Namespace,
    quorum::CopyRule,
    repair::{Holding, Step, next_step},
};
use longshore_fabric::CallContext;
use longshore_proto::types::{Identity, Lookup};
use tokio::{sync::watch, time::Instant};

use counts::Counts;

use super::{
    peers::{Peers, Site},
    send::{self, SharedRate},
};
use crate::store::Store;

/// Blocks that are looked at together.
const STEP_BLOCKS: usize = 1_024;
/// Longest time for one answer about blocks.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long copies are dropped by what other shards answered; less than `repair.drain_settle_ms`.
const ANSWERS_GOOD_FOR: Duration = Duration::from_secs(6);

/// How a search ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every block was looked at and nothing is left to do.
    Done,
    /// Some blocks could not be dealt with.
    Undone,
    /// Something happened to a shard meanwhile.
    Outdated,
}

/// A block, what to ask about it, and whom.
struct Candidate {
    key: BlockKey,
    place: BlockPlace,
    /// Shards that should hold it now, best first.
    owners: Vec<usize>,
    /// Those and others that may.
    asked: Vec<usize>,
}

/// What blocks of one tenant are looked at with.
struct Context<'a> {
    store: &'a Arc<Store>,
    site: &'a Site,
    me: usize,
    /// This shard is being drained.
    leaving: bool,
    rule: CopyRule,
    rate: &'a SharedRate,
    identity: Identity,
}

impl Context<'_> {
    /// Whether copies may belong on a shard.
    fn may_own(&self, shard: usize) -> bool {
        if shard == self.me { !self.leaving } else { self.is_alive(shard) && !self.site.draining[shard] }
    }

    fn is_alive(&self, shard: usize) -> bool {
        shard == self.me || self.site.alive[shard].is_some()
    }
}

/// Looks at every block whose place is known.
pub(super) async fn run(
    store: &Arc<Store>,
    peers: &Peers,
    rule: CopyRule,
    rate: &SharedRate,
    changes: &watch::Receiver<u64>,
) -> Outcome {
    let (site, began, leaving) = (peers.site(), Instant::now(), store.drain.is_on());
    let (mut blocks, stored_total) =
        store.with_inventory(|pool, inventory, _| (inventory.placed(), pool.stats().stored_total));
    let mut counts = Counts::new(began, stored_total);
    let Some(me) = site.me.filter(|_| site.map.shards().len() > 1) else {
        store.repair.unchecked(0);
        counts.alone(blocks.len() as u64, rule);
        counts.tell(store);
        return Outcome::Done;
    };
    store.drain.enough_others(leaving && are_enough(&site, me, rule));
    // Tenants together, and stripes of them, whose owners are computed once; the same order every time.
    blocks.sort_unstable_by_key(|(namespace, key, place)| {
        (*namespace.as_bytes(), place.stripe_seed, place.index, *key)
    });
    let mut left = blocks.len();
    let mut room_bytes = site.room_bytes.clone();
    let mut outcome = Outcome::Done;
    for tenant in blocks.chunk_by(|a, b| a.0 == b.0) {
        for part in tenant.chunks(STEP_BLOCKS) {
            store.repair.unchecked(left);
            if changes.has_changed().unwrap_or(true) {
                return Outcome::Outdated;
            }
            let identity = Identity {
                deployment: store.identity().deployment,
                namespace: part[0].0,
                shard_map_epoch: site.map.epoch(),
            };
            let context = Context { store, site: &site, me, leaving, rule, rate, identity };
            if !mend(&context, &mut room_bytes, &mut counts, part).await {
                outcome = Outcome::Undone;
            }
            left -= part.len();
        }
    }
    store.repair.unchecked(0);
    counts.tell(store);
    outcome
}

/// Whether writers find enough shards without this one.
fn are_enough(site: &Site, me: usize, rule: CopyRule) -> bool {
    let others = (0..site.alive.len())
        .filter(|&shard| shard != me && site.alive[shard].is_some() && !site.draining[shard]);
    let hosts: HashSet<usize> = others.map(|shard| site.map.host_of(shard)).collect();
    // With one copy, writers know its owner and nobody else.
    rule.copies() > 1 && hosts.len() >= rule.write_acks()
}

/// What is to be done about some blocks.
#[derive(Default)]
struct Plan {
    /// Copies to send, by shard.
    sends: HashMap<usize, Vec<(BlockKey, BlockPlace)>>,
    /// Own copies that are one too many.
    surplus: Vec<(BlockKey, BlockPlace)>,
    /// Something is left to do even then.
    undone: bool,
}

/// What each shard that answered said of blocks.
type Answers = HashMap<usize, HashMap<BlockKey, bool>>;

/// Deals with some blocks of one tenant; false when something is left to do.
async fn mend(
    context: &Context<'_>,
    room_bytes: &mut [u64],
    counts: &mut Counts,
    blocks: &[(Namespace, BlockKey, BlockPlace)],
) -> bool {
    let &Context { store, site, me, rate, identity, .. } = context;
    let candidates = candidates(context, blocks);
    let asked_at = Instant::now();
    let answers = ask(site, me, identity, &candidates).await;
    let Plan { sends, surplus, undone } = plan(context, &candidates, &answers, room_bytes, counts);
    // Answers are good for a while only: a shard that said that it holds a block may be about to leave since.
    let are_good = asked_at.elapsed() <= ANSWERS_GOOD_FOR;
    let given_up =
        surplus.is_empty() || (are_good && give_up(store, identity.namespace, &candidates, &surplus));
    store.repair.found(sends.values().map(Vec::len).sum());
    let sending = sends.into_iter().map(|(to, blocks)| async move {
        let shard = site.alive[to].as_ref().expect("only shards that answered lack blocks");
        send::run(store, shard, identity, &blocks, rate).await
    });
    let all_sent = join_all(sending).await.into_iter().all(|sent| sent);
    counts.sent(all_sent);
    !undone && given_up && all_sent
}

fn plan(
    context: &Context<'_>,
    candidates: &[Candidate],
    answers: &Answers,
    room_bytes: &mut [u64],
    counts: &mut Counts,
) -> Plan {
    let &Context { store, me, leaving, rule, .. } = context;
    let mut plan = Plan::default();
    for Candidate { key, place, owners, asked } in candidates {
        let holding = |shard: usize| match answers.get(&shard).and_then(|held| held.get(key)) {
            Some(true) => Holding::Held,
            Some(false) => Holding::Lacking,
            None => Holding::Unknown,
        };
        plan.undone |= owners.iter().any(|&owner| owner != me && holding(owner) == Holding::Unknown);
        let step = next_step(me, owners, asked, rule.copies(), holding);
        // One too many here as soon as its owners hold theirs, which a later search finds.
        plan.undone |= step != Step::Drop && !owners.contains(&me) && owners.len() >= rule.copies();
        let sends = matches!(step, Step::Push(_));
        let mut no_room = false;
        match step {
            Step::Nothing => {}
            Step::Push(to) => {
                for to in to {
                    // A copy is not worth a block that somebody else put there.
                    if let Some(left) = room_bytes[to].checked_sub(store.block_bytes()) {
                        room_bytes[to] = left;
                        plan.sends.entry(to).or_default().push((*key, *place));
                    } else {
                        no_room = true;
                        store.repair.no_room();
                    }
                }
            }
            // Whoever leaves takes its copies along, and nobody wonders what became of them.
            Step::Drop if leaving => {}
            Step::Drop => plan.surplus.push((*key, *place)),
        }
        counts.block(context, (owners.as_slice(), asked.as_slice()), (sends, no_room), holding);
    }
    plan
}

/// Drops copies that are too many, a whole stripe or nothing of it: a view needs a stripe on one shard. False when some stay,
/// because a view pins them, somebody was promised them, or the rest of their stripe is not where it belongs yet.
fn give_up(
    store: &Store,
    namespace: Namespace,
    candidates: &[Candidate],
    surplus: &[(BlockKey, BlockPlace)],
) -> bool {
    let mut all = true;
    for stripe in surplus.chunk_by(|a, b| a.1.stripe_seed == b.1.stripe_seed) {
        let held = |candidate: &&Candidate| candidate.place.stripe_seed == stripe[0].1.stripe_seed;
        if candidates.iter().filter(held).count() > stripe.len() {
            all = false;
            continue;
        }
        for (key, _) in stripe {
            let gone = store.with_pool(|pool, now| pool.relinquish(namespace, *key, now));
            if gone {
                store.repair.dropped();
            }
            all &= gone;
        }
    }
    all
}

fn candidates(context: &Context<'_>, blocks: &[(Namespace, BlockKey, BlockPlace)]) -> Vec<Candidate> {
    let &Context { site, rule, .. } = context;
    let mut known: Option<([u8; 32], Vec<usize>, Vec<usize>)> = None;
    let mut found = Vec::with_capacity(blocks.len());
    for (_, key, place) in blocks {
        if known.as_ref().is_none_or(|(seed, ..)| *seed != place.stripe_seed) {
            let owners =
                site.map.owners_among(&place.stripe_seed, rule.copies(), |shard| context.may_own(shard));
            let mut asked = owners.clone();
            let others = site.map.candidates(&place.stripe_seed, rule.copies());
            let also = |shard: &usize| context.is_alive(*shard) && !owners.contains(shard);
            asked.extend(others.into_iter().filter(also));
            known = Some((place.stripe_seed, owners, asked));
        }
        let (_, owners, asked) = known.as_ref().expect("it was set above");
        found.push(Candidate { key: *key, place: *place, owners: owners.clone(), asked: asked.clone() });
    }
    found
}

/// What the other shards say of the blocks that they may hold. Shards that fail say nothing.
async fn ask(site: &Site, me: usize, identity: Identity, candidates: &[Candidate]) -> Answers {
    let mut keys: HashMap<usize, Vec<BlockKey>> = HashMap::new();
    for candidate in candidates {
        for &shard in candidate.asked.iter().filter(|&&shard| shard != me) {
            keys.entry(shard).or_default().push(candidate.key);
        }
    }
    let calls = keys.into_iter().filter_map(|(at, keys)| {
        let shard = site.alive[at].clone()?;
        Some(async move {
            let ctx = CallContext::new("repair").with_timeout(ASK_TIMEOUT);
            let lookup = Lookup { identity, keys: keys.clone(), peek: true };
            let answer = tokio::time::timeout(ASK_TIMEOUT, shard.lookup(&ctx, lookup)).await;
            match answer {
                Ok(Ok(held)) if held.len() == keys.len() => Some((at, keys.into_iter().zip(held).collect())),
                Ok(Err(error)) => {
                    tracing::debug!(shard = %site.map.shards()[at].id, %error, "told nothing of its blocks");
                    None
                }
                _ => None,
            }
        })
    });
    join_all(calls).await.into_iter().flatten().collect()
}
