//! The shards of a running cluster, found through any of its processes or in a member list.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use futures::future::join_all;
use longshore_blocks::Namespace;
use longshore_cluster::{ClusterView, Labels, Member, Role};
use longshore_fabric::{CallContext, Connector, Error, GrpcConnector, GrpcOptions, Shard};
use longshore_proto::types::{self, Describe, ModelDescription, ShardStats};

use crate::{cli::ClusterArgs, config::ClusterConfig, console, members};

/// Longest time for an answer that takes no work.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Digits of a namespace that are shown: the whole keys the hashes of its tenant.
const NAMESPACE_DIGITS: usize = 16;

/// The shards of a cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    /// Its shard map.
    pub(super) view: ClusterView,
    /// By id.
    pub(super) shards: Vec<ShardAt>,
    connector: Arc<dyn Connector>,
}

/// A shard and the way to it.
#[derive(Debug, Clone)]
pub(super) struct ShardAt {
    pub(super) id: String,
    pub(super) address: String,
    pub(super) client: Arc<dyn Shard>,
}

/// A context for a call that takes no work.
pub(super) fn call() -> CallContext {
    CallContext::new("store").with_timeout(CALL_TIMEOUT)
}

/// The first digits of a namespace.
pub(super) fn shown(namespace: &Namespace) -> String {
    console::hex(&namespace.as_bytes()[..NAMESPACE_DIGITS / 2])
}

/// At most `digits_max` hexadecimal digits, in lower case.
pub(super) fn hex_digits(what: &str, text: &str, digits_max: usize) -> Result<String> {
    ensure!(
        text.len() <= digits_max && text.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{what} `{text}` must be up to {digits_max} hexadecimal digits"
    );
    Ok(text.to_ascii_lowercase())
}

impl Cluster {
    /// The cluster that the flags name.
    pub(super) async fn find(args: &ClusterArgs) -> Result<Self> {
        let connector: Arc<dyn Connector> = Arc::new(GrpcConnector::new(GrpcOptions::default()));
        let members = match &args.members_file {
            Some(file) => listed(file)?,
            None => described(connector.as_ref(), &args.endpoints).await?,
        };
        Self::of(members, connector)
    }

    /// The shards among `members`.
    pub(super) fn of(members: Vec<Member>, connector: Arc<dyn Connector>) -> Result<Self> {
        let shards = members.into_iter().filter(|member| member.role == Role::KvStore).collect();
        let view = ClusterView::new(shards).context("the member list makes no sense")?;
        let mut shards = Vec::new();
        for Member { id, address, .. } in view.members().iter().cloned() {
            ensure!(
                !address.starts_with("local:"),
                "shard `{id}` lies inside another process (`{address}`) and cannot be reached; hint: start the cluster with \
                 `longshore up --processes`, or shards of their own with `longshore kvstore`"
            );
            let client = connector.shard(&address).with_context(|| format!("shard `{id}`"))?;
            shards.push(ShardAt { id, address, client });
        }
        ensure!(
            !shards.is_empty(),
            "the cluster lists no shard; hint: add `kvstore=ID@http://HOST:PORT` to its members"
        );
        Ok(Self { view, shards, connector })
    }

    /// Position of the shard with this id.
    pub(super) fn position(&self, id: &str) -> Result<usize> {
        self.shards.iter().position(|shard| shard.id == id).with_context(|| {
            let ids: Vec<_> = self.shards.iter().map(|shard| format!("`{}`", shard.id)).collect();
            format!("there is no shard `{id}`; the cluster has {}", ids.join(", "))
        })
    }

    /// What every shard says of itself, or why it does not.
    pub(super) async fn stats(&self) -> Vec<Result<ShardStats, Error>> {
        join_all(self.shards.iter().map(|shard| async move { shard.client.stats(&call()).await })).await
    }

    /// The same of one, which must answer.
    pub(super) async fn stats_of(&self, at: usize) -> Result<ShardStats> {
        let shard = &self.shards[at];
        shard.client.stats(&call()).await.with_context(|| unreachable(shard))
    }

    /// What the shards hold blocks of; asks one after the other until one answers.
    pub(super) async fn model(&self) -> Result<ModelDescription> {
        let mut failure = None;
        for shard in &self.shards {
            match describe(self.connector.as_ref(), &shard.address).await {
                Ok(described) => {
                    let model = described.models.into_iter().next();
                    return model.with_context(|| format!("shard `{}` tells no model", shard.id));
                }
                Err(error) => failure = Some(anyhow::Error::new(error).context(unreachable(shard))),
            }
        }
        Err(failure.expect("there is at least one shard"))
    }
}

/// What to say of a shard that does not answer.
pub(super) fn unreachable(shard: &ShardAt) -> String {
    format!("shard `{}` at {} does not answer; hint: is it running?", shard.id, shard.address)
}

fn listed(file: &Path) -> Result<Vec<Member>> {
    let members_file = file.to_str().context("`--members-file` is not UTF-8")?.to_owned();
    members::listed(&ClusterConfig { members_file, ..ClusterConfig::default() })
}

async fn describe(connector: &dyn Connector, url: &str) -> Result<Describe, Error> {
    connector.describer(url)?.describe(&call()).await
}

/// The shards that the processes at `endpoints` know, all together. One that answers is enough.
async fn described(connector: &dyn Connector, endpoints: &[String]) -> Result<Vec<Member>> {
    let mut members = BTreeMap::new();
    let (mut answers, mut failures) = (0, Vec::new());
    for endpoint in endpoints {
        if let Err(error) = connector.describer(endpoint) {
            bail!("`--endpoint` (or LONGSHORE_URL) is `{endpoint}`: {error}");
        }
        match describe(connector, endpoint).await {
            Ok(described) => {
                answers += 1;
                let shards =
                    described.members.into_iter().filter(|member| member.role == types::Role::KvStore);
                members.extend(shards.map(|member| (member.id.clone(), own(member))));
            }
            Err(error) => failures.push(format!("{endpoint}: {error}")),
        }
    }
    if answers == 0 {
        bail!(
            "nobody answers ({}); hint: is the cluster running? start one with `longshore up --processes`, or name one of its \
             processes with `--endpoint http://HOST:PORT`",
            failures.join("; ")
        );
    }
    Ok(members.into_values().collect())
}

fn own(member: types::Member) -> Member {
    Member {
        id: member.id,
        role: Role::KvStore,
        address: member.address,
        incarnation: member.incarnation,
        weight: member.weight,
        labels: Labels { host: member.host, zone: member.zone },
    }
}
