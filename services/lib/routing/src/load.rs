//! Who has how much to do, and who takes the next request.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::Error;

/// The part of a request that a worker is picked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Turning a prompt into KV.
    Prefill,
    /// Generating.
    Decode,
}

impl Phase {
    fn role(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Work of one request on one worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Prompt tokens still to compute.
    pub prefill_tokens: u64,
    /// Sequences that generate.
    pub decode_sequences: u32,
}

/// Bounds of a [`LoadTable`]; all at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadLimits {
    /// Workers that are remembered.
    pub workers_max: usize,
    /// Requests under way over all workers.
    pub tickets_max: usize,
    /// Prompt tokens under way on one worker. A longer prompt is taken by a worker that has nothing else to prefill.
    pub prefill_tokens_max: u64,
    /// Sequences on one worker.
    pub decode_sequences_max: u32,
    /// How long a worker is avoided after its first failure; twice as long after each further one.
    pub backoff_first_ms: u64,
    /// The longest time that a worker is avoided.
    pub backoff_max_ms: u64,
}

impl Default for LoadLimits {
    fn default() -> Self {
        Self {
            workers_max: 4096,
            tickets_max: 65_536,
            prefill_tokens_max: 4 << 20,
            decode_sequences_max: 256,
            backoff_first_ms: 200,
            backoff_max_ms: 10_000,
        }
    }
}

/// Names work that was begun. Give it back with [`LoadTable::finish`], whatever happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a worker has to do, and whether it is avoided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerLoad {
    /// Prompt tokens still to compute.
    pub prefill_tokens: u64,
    /// Sequences that generate.
    pub decode_sequences: u32,
    /// Requests under way.
    pub tickets: usize,
    /// Failures since the last success.
    pub failures: u32,
    /// Avoided before this time.
    pub suspended_until_ms: u64,
}

impl WorkerLoad {
    fn forgettable(&self, now_ms: u64) -> bool {
        self.tickets == 0 && self.suspended_until_ms <= now_ms
    }
}

#[derive(Debug, Clone)]
struct Begun {
    worker: String,
    cost: Cost,
}

/// Outstanding work by worker. Knows no clock: `now_ms` is any time that never goes back.
#[derive(Debug, Clone)]
pub struct LoadTable {
    limits: LoadLimits,
    workers: BTreeMap<String, WorkerLoad>,
    tickets: BTreeMap<Ticket, Begun>,
    next: u64,
}

impl LoadTable {
    /// An empty table.
    pub fn new(limits: LoadLimits) -> Result<Self, Error> {
        let checks = [
            ("workers_max", limits.workers_max == 0),
            ("tickets_max", limits.tickets_max == 0),
            ("prefill_tokens_max", limits.prefill_tokens_max == 0),
            ("decode_sequences_max", limits.decode_sequences_max == 0),
            ("backoff_first_ms", limits.backoff_first_ms == 0),
        ];
        if let Some((field, _)) = checks.into_iter().find(|(_, zero)| *zero) {
            return Err(Error::Invalid { field, problem: "is 0, must be at least 1".to_owned() });
        }
        if limits.backoff_max_ms < limits.backoff_first_ms {
            let problem = format!("is {}, must be at least `backoff_first_ms`", limits.backoff_max_ms);
            return Err(Error::Invalid { field: "backoff_max_ms", problem });
        }
        Ok(Self { limits, workers: BTreeMap::new(), tickets: BTreeMap::new(), next: 0 })
    }

    /// The candidate with the least work of this phase, then of the other phase, then the smallest id. Workers in `excluded`
    /// have failed this request and are left out. Suspended ones are taken only when there are no others, the one whose
    /// suspension ends first: a single worker that is back is found at once.
    pub fn pick(
        &self,
        phase: Phase,
        candidates: &[&str],
        excluded: &[&str],
        cost: Cost,
        now_ms: u64,
    ) -> Result<String, Error> {
        let role = phase.role();
        let allowed: Vec<(&str, WorkerLoad)> =
            candidates.iter().filter(|id| !excluded.contains(id)).map(|id| (*id, self.load(id))).collect();
        if allowed.is_empty() {
            let known = candidates.len();
            let excluded = candidates.iter().filter(|id| excluded.contains(id)).count();
            return Err(Error::NoWorker { role, known, excluded });
        }
        let awake = |load: &WorkerLoad| load.suspended_until_ms <= now_ms;
        let any_awake = allowed.iter().any(|(_, load)| awake(load));
        let best = allowed
            .iter()
            .filter(|(_, load)| (awake(load) || !any_awake) && self.has_room(phase, load, cost))
            .min_by_key(|(id, load)| {
                let (prefill, decode) = (load.prefill_tokens, u64::from(load.decode_sequences));
                let work = match phase {
                    Phase::Prefill => (prefill, decode),
                    Phase::Decode => (decode, prefill),
                };
                (load.suspended_until_ms.saturating_sub(now_ms), work, *id)
            });
        best.map(|(id, _)| (*id).to_owned()).ok_or(Error::Overloaded { role })
    }

    fn has_room(&self, phase: Phase, load: &WorkerLoad, cost: Cost) -> bool {
        match phase {
            Phase::Prefill => {
                let after = load.prefill_tokens.saturating_add(cost.prefill_tokens);
                load.prefill_tokens == 0 || after <= self.limits.prefill_tokens_max
            }
            Phase::Decode => {
                let after = load.decode_sequences.saturating_add(cost.decode_sequences);
                after <= self.limits.decode_sequences_max
            }
        }
    }

    /// Picks a worker and begins the work on it.
    pub fn assign(
        &mut self,
        phase: Phase,
        candidates: &[&str],
        excluded: &[&str],
        cost: Cost,
        now_ms: u64,
    ) -> Result<(String, Ticket), Error> {
        let worker = self.pick(phase, candidates, excluded, cost, now_ms)?;
        let ticket = self.begin(&worker, cost, now_ms)?;
        Ok((worker, ticket))
    }

    /// Counts work against a worker.
    pub fn begin(&mut self, worker: &str, cost: Cost, now_ms: u64) -> Result<Ticket, Error> {
        if self.tickets.len() >= self.limits.tickets_max {
            return Err(Error::Full { what: "requests under way", limit: self.limits.tickets_max });
        }
        let load = self.entry(worker, now_ms)?;
        let prefill_tokens = load.prefill_tokens.checked_add(cost.prefill_tokens);
        let decode_sequences = load.decode_sequences.checked_add(cost.decode_sequences);
        let (Some(prefill_tokens), Some(decode_sequences)) = (prefill_tokens, decode_sequences) else {
            // Saturating would leave a rest behind that no `finish` takes off.
            let problem = "is more than can be counted".to_owned();
            return Err(Error::Invalid { field: "cost", problem });
        };
        load.prefill_tokens = prefill_tokens;
        load.decode_sequences = decode_sequences;
        load.tickets += 1;
        self.next += 1;
        let ticket = Ticket(self.next);
        self.tickets.insert(ticket, Begun { worker: worker.to_owned(), cost });
        Ok(ticket)
    }

    /// Says that `tokens` more prompt tokens of a ticket are computed. Unknown tickets are no error.
    pub fn prefilled(&mut self, ticket: Ticket, tokens: u64) {
        if let Some(begun) = self.tickets.get_mut(&ticket) {
            let tokens = tokens.min(begun.cost.prefill_tokens);
            begun.cost.prefill_tokens -= tokens;
            if let Some(load) = self.workers.get_mut(&begun.worker) {
                load.prefill_tokens -= tokens;
            }
        }
    }

    /// Takes a ticket's work off its worker; false when it was finished before.
    pub fn finish(&mut self, ticket: Ticket) -> bool {
        let Some(begun) = self.tickets.remove(&ticket) else { return false };
        if let Some(load) = self.workers.get_mut(&begun.worker) {
            load.prefill_tokens -= begun.cost.prefill_tokens;
            load.decode_sequences -= begun.cost.decode_sequences;
            load.tickets -= 1;
        }
        true
    }

    /// Notes that a worker failed; returns the time until which it is avoided. Failures of requests that were under way
    /// together count once: a worker that is suspended already is not suspended for longer.
    pub fn failed(&mut self, worker: &str, now_ms: u64) -> Result<u64, Error> {
        let limits = self.limits;
        let load = self.entry(worker, now_ms)?;
        if load.suspended_until_ms <= now_ms {
            let doublings = load.failures.min(63);
            let pause = limits.backoff_first_ms.saturating_mul(1 << doublings).min(limits.backoff_max_ms);
            load.failures = load.failures.saturating_add(1);
            load.suspended_until_ms = now_ms.saturating_add(pause);
        }
        Ok(load.suspended_until_ms)
    }

    /// Notes that a worker answered: it is no longer avoided, and its next failure is its first.
    pub fn succeeded(&mut self, worker: &str) {
        if let Some(load) = self.workers.get_mut(worker) {
            load.failures = 0;
            load.suspended_until_ms = 0;
        }
    }

    /// What a worker has to do; nothing when it is unknown.
    pub fn load(&self, worker: &str) -> WorkerLoad {
        self.workers.get(worker).copied().unwrap_or_default()
    }

    /// Every remembered worker, sorted by id.
    pub fn workers(&self) -> impl Iterator<Item = (&str, WorkerLoad)> {
        self.workers.iter().map(|(id, load)| (id.as_str(), *load))
    }

    /// Requests under way over all workers.
    pub fn tickets(&self) -> usize {
        self.tickets.len()
    }

    /// Forgets workers that are not in `members` and have nothing under way.
    pub fn retain(&mut self, members: &[&str]) {
        self.workers.retain(|id, load| load.tickets > 0 || members.contains(&id.as_str()));
    }

    fn entry(&mut self, worker: &str, now_ms: u64) -> Result<&mut WorkerLoad, Error> {
        if !self.workers.contains_key(worker) {
            if self.workers.len() >= self.limits.workers_max {
                self.workers.retain(|_, load| !load.forgettable(now_ms));
            }
            if self.workers.len() >= self.limits.workers_max {
                return Err(Error::Full { what: "workers", limit: self.limits.workers_max });
            }
        }
        Ok(self.workers.entry(worker.to_owned()).or_default())
    }
}
