//! Who takes the next piece of work: picks by load, and checks every worker before it is trusted with a request.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use longshore_blocks::Deployment;
use longshore_cluster::{ClusterView, Member, Role};
use longshore_fabric::{CallContext, Code, Connector};
use longshore_routing::{Cost, LoadLimits, LoadTable, Phase, Ticket};
use tokio::time::Instant;

use super::ended;
use crate::{Config, Error, metrics::RouterMetrics};

/// How long a worker that does not fit is left alone before it is asked again: it may have been restarted with other
/// settings where nobody knows incarnations.
const MISMATCH_TTL: Duration = Duration::from_secs(10);

/// The workers as this router knows them.
#[derive(Debug)]
pub(crate) struct Workers {
    connector: Arc<dyn Connector>,
    deployment: Deployment,
    handshake_timeout: Duration,
    retry_after: Duration,
    started: Instant,
    state: Arc<Mutex<State>>,
    metrics: RouterMetrics,
}

#[derive(Debug)]
struct State {
    loads: LoadTable,
    /// Result of the handshake by member; an incarnation or address that changes makes another member.
    checked: HashMap<Member, Verdict>,
    /// The view that departed members were last forgotten by.
    seen: Option<Arc<ClusterView>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Fits,
    Refused { problem: String, until: Instant },
}

/// A worker with a share of its load; dropping it gives the share back.
#[derive(Debug)]
pub(crate) struct Picked {
    /// The worker.
    pub(crate) member: Member,
    ticket: Ticket,
    state: Arc<Mutex<State>>,
}

impl Picked {
    /// Says that `tokens` more prompt tokens were computed.
    pub(crate) fn prefilled(&self, tokens: u64) {
        lock(&self.state).loads.prefilled(self.ticket, tokens);
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        lock(&self.state).loads.finish(self.ticket);
    }
}

impl Workers {
    pub(crate) fn new(
        connector: Arc<dyn Connector>,
        deployment: Deployment,
        config: &Config,
        metrics: RouterMetrics,
    ) -> Self {
        let loads = LoadTable::new(LoadLimits::default()).expect("the default limits are positive");
        Self {
            connector,
            deployment,
            handshake_timeout: Duration::from_millis(config.handshake_timeout_ms),
            retry_after: config.retry_after(),
            started: Instant::now(),
            state: Arc::new(Mutex::new(State { loads, checked: HashMap::new(), seen: None })),
            metrics,
        }
    }

    /// The least loaded worker of a phase that passes its handshake and is not in `excluded`.
    pub(crate) async fn pick(
        &self,
        ctx: &CallContext,
        view: &ClusterView,
        phase: Phase,
        excluded: &HashSet<String>,
        cost: Cost,
    ) -> Result<Picked, Error> {
        let mut excluded = excluded.clone();
        let mut refused = None;
        loop {
            let picked = match self.assign(view, phase, &excluded, cost) {
                Ok(picked) => picked,
                Err(error) => return Err(refused.unwrap_or(error)),
            };
            match self.handshake(ctx, &picked.member).await {
                Ok(()) => return Ok(picked),
                // No worker's fault, and no other worker mends it.
                Err(error @ (Error::Cancelled | Error::Deadline)) => return Err(error),
                Err(error) => {
                    excluded.insert(picked.member.id.clone());
                    // A worker that does not fit says more than one that is away.
                    if !matches!(refused, Some(Error::Mismatch { .. })) {
                        refused = Some(error);
                    }
                }
            }
        }
    }

    /// Notes that a worker failed: it is avoided for a while and described again before it is used again.
    pub(crate) fn failed(&self, member: &Member) {
        let now = self.now_ms();
        let mut state = lock(&self.state);
        state.checked.remove(member);
        if let Err(error) = state.loads.failed(&member.id, now) {
            tracing::debug!(worker = %member.id, %error, "failure not noted");
        }
    }

    /// Describes the worker again before it is used again.
    pub(crate) fn forget(&self, member: &Member) {
        lock(&self.state).checked.remove(member);
    }

    /// Notes that a worker did what it was asked for.
    pub(crate) fn succeeded(&self, member: &Member) {
        lock(&self.state).loads.succeeded(&member.id);
    }

    /// Whether the last use of a member did not fail.
    pub(crate) fn healthy(&self, member: &Member) -> bool {
        let state = lock(&self.state);
        let refused = matches!(state.checked.get(member), Some(Verdict::Refused { .. }));
        !refused && state.loads.load(&member.id).failures == 0
    }

    fn assign(
        &self,
        view: &ClusterView,
        phase: Phase,
        excluded: &HashSet<String>,
        cost: Cost,
    ) -> Result<Picked, Error> {
        let members: Vec<&Member> = view.with_role(role_of(phase)).collect();
        let candidates: Vec<&str> = members.iter().map(|member| member.id.as_str()).collect();
        let excluded: Vec<&str> = excluded.iter().map(String::as_str).collect();
        let mut state = lock(&self.state);
        let assigned = state.loads.assign(phase, &candidates, &excluded, cost, self.now_ms());
        let (id, ticket) = assigned.map_err(|error| self.refusal(phase, &error))?;
        let member =
            members.into_iter().find(|member| member.id == id).expect("the pick is a candidate").clone();
        Ok(Picked { member, ticket, state: Arc::clone(&self.state) })
    }

    fn refusal(&self, phase: Phase, error: &longshore_routing::Error) -> Error {
        let (role, retry_after) = (role_of(phase).as_str(), self.retry_after);
        match error {
            longshore_routing::Error::Overloaded { .. } | longshore_routing::Error::Full { .. } => {
                Error::WorkersBusy { role, last: None, retry_after }
            }
            longshore_routing::Error::NoWorker { known, excluded, .. } => {
                let why = format!("{known} known, {excluded} of them failed this request");
                Error::NoWorker { role, why, retry_after }
            }
            other => Error::Internal(other.to_string()),
        }
    }

    /// Compares what the worker serves with what this router serves. The result is kept until the worker fails, or its
    /// incarnation or address changes.
    async fn handshake(&self, ctx: &CallContext, member: &Member) -> Result<(), Error> {
        match lock(&self.state).checked.get(member) {
            Some(Verdict::Fits) => return Ok(()),
            Some(Verdict::Refused { problem, until }) if *until > Instant::now() => {
                return Err(Error::Mismatch { worker: member.id.clone(), problem: problem.clone() });
            }
            _ => {}
        }
        let hurried = ctx.time_left().is_some_and(|left| left < self.handshake_timeout);
        let problem = match self.describe(ctx, member).await {
            Ok(problem) => problem,
            Err(error) => {
                if let Some(ended) = ended(ctx) {
                    return Err(ended);
                }
                // A worker's clock may run out a little before this one.
                if hurried && error.code == Code::DeadlineExceeded {
                    return Err(Error::Deadline);
                }
                self.failed(member);
                let why = format!("`{}` at {} does not answer: {error}", member.id, member.address);
                return Err(Error::NoWorker {
                    role: member.role.as_str(),
                    why,
                    retry_after: self.retry_after,
                });
            }
        };
        let mut state = lock(&self.state);
        // Members that restarted leave entries behind that nobody asks for again.
        state.checked.retain(|known, _| known.id != member.id);
        match problem {
            None => {
                state.checked.insert(member.clone(), Verdict::Fits);
                Ok(())
            }
            Some(problem) => {
                let until = Instant::now() + MISMATCH_TTL;
                state.checked.insert(member.clone(), Verdict::Refused { problem: problem.clone(), until });
                drop(state);
                self.metrics.mismatches.inc();
                tracing::warn!(worker = %member.id, address = %member.address, %problem, "worker refused");
                Err(Error::Mismatch { worker: member.id.clone(), problem })
            }
        }
    }

    /// What does not fit, if anything.
    async fn describe(
        &self,
        ctx: &CallContext,
        member: &Member,
    ) -> Result<Option<String>, longshore_fabric::Error> {
        let client = self.connector.describer(&member.address)?;
        let ctx = ctx.child().with_timeout(self.handshake_timeout);
        let answer = client.describe(&ctx).await?;
        if answer.this.role != wire_role(member.role) {
            return Ok(Some(format!("is no {} worker but a {:?}", member.role, answer.this.role)));
        }
        if !answer.models.iter().any(|model| model.deployment == self.deployment) {
            let serves: Vec<&str> = answer.models.iter().map(|model| model.name.as_str()).collect();
            let problem = format!("serves another deployment ({})", serves.join(", "));
            return Ok(Some(problem));
        }
        Ok(None)
    }

    /// Forgets members that left the cluster, once for every view.
    pub(crate) fn retain(&self, view: &Arc<ClusterView>) {
        let mut state = lock(&self.state);
        if state.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, view)) {
            return;
        }
        let ids: Vec<&str> = view.members().iter().map(|member| member.id.as_str()).collect();
        state.loads.retain(&ids);
        state.checked.retain(|member, _| ids.contains(&member.id.as_str()));
        state.seen = Some(Arc::clone(view));
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn role_of(phase: Phase) -> Role {
    match phase {
        Phase::Prefill => Role::Prefill,
        Phase::Decode => Role::Decode,
    }
}

/// A role as it travels.
pub(crate) fn wire_role(role: Role) -> longshore_proto::types::Role {
    match role {
        Role::Router => longshore_proto::types::Role::Router,
        Role::Prefill => longshore_proto::types::Role::Prefill,
        Role::Decode => longshore_proto::types::Role::Decode,
        Role::KvStore => longshore_proto::types::Role::KvStore,
    }
}
