//! About the most that a policy can reach that does not know the future.
//!
//! The rate at which a block comes back is estimated for every class of blocks (uses so far, length of the prompt, place in it,
//! how much of it was found, whether it was the last block) and every age, **from the trace itself**: a policy would have to learn these
//! rates while it runs. Then a block counts as a hit when its rate is among the highest of as many blocks as fit, at the moment at
//! which it is needed, without having to be brought back: no policy that knows these rates but not the future has more
//! hits (Panigrahy et al. 2021 prove it for independent requests). What the classes do not tell apart, a policy cannot either,
//! unless it knows something of blocks that they leave out.

use std::collections::HashMap;

use super::read::{Request, Trace};

/// Times at which rates are compared anew.
const STEPS: u64 = 1_200;
/// Ages that are told apart: below a second, then geometric steps to almost an hour, then all above.
const AGES: usize = 40;
/// Steps while an age grows by a factor of e.
const STEPS_PER_E: f64 = 4.7;

/// Hits in blocks for each capacity.
pub(super) fn hazard_bound(trace: &Trace, capacities: &[u64]) -> Vec<u64> {
    let times = arrivals(&trace.requests);
    let mut walk = Walk::new(trace);
    let mut rates = Rates::default();
    for (request, &now) in trace.requests.iter().zip(&times) {
        walk.serve(request, now, |block| rates.came_back(block.class, now - block.since));
    }
    let end = times.last().copied().unwrap_or(0.0);
    walk.seen.iter().for_each(|block| rates.waited(block.class, end - block.since));
    let table = rates.table();

    let step = (end / STEPS as f64).max(1e-3);
    let mut walk = Walk { classes: walk.classes, ..Walk::new(trace) };
    let (mut due, mut lowest) = (0.0, vec![0.0; capacities.len()]);
    let mut hits = vec![0; capacities.len()];
    for (request, &now) in trace.requests.iter().zip(&times) {
        if now >= due {
            due = now + step;
            lowest = thresholds(&walk.seen, &table, now, capacities);
        }
        walk.serve(request, now, |block| {
            let rate = table[block.class][age(now - block.since)];
            hits.iter_mut().zip(&lowest).for_each(|(hits, lowest)| *hits += u64::from(rate >= *lowest));
        });
    }
    hits
}

/// The lowest rate that is still kept, for each capacity.
fn thresholds(seen: &[Block], table: &[[f64; AGES]], now: f64, capacities: &[u64]) -> Vec<f64> {
    let mut rates: Vec<f64> =
        seen.iter().map(|block| table[block.class][age((now - block.since).max(0.0))]).collect();
    rates.sort_unstable_by(|a, b| b.total_cmp(a));
    let lowest = |capacity: &u64| rates.get((*capacity as usize).saturating_sub(1)).copied().unwrap_or(0.0);
    capacities.iter().map(lowest).collect()
}

/// Seconds at which requests arrive: those of one time stamp are spread until the next one.
fn arrivals(requests: &[Request]) -> Vec<f64> {
    let mut times = Vec::with_capacity(requests.len());
    let mut rest = requests;
    while let Some(first) = rest.first() {
        let stamp = first.timestamp_ms;
        let (same, later) = rest.split_at(rest.iter().take_while(|r| r.timestamp_ms == stamp).count());
        let until = later.first().map_or(stamp + 1, |next| next.timestamp_ms);
        let gap = (until - stamp) as f64 / same.len() as f64;
        times.extend((0..same.len()).map(|i| (stamp as f64 + i as f64 * gap) / 1e3));
        rest = later;
    }
    times
}

fn age(seconds: f64) -> usize {
    let step = if seconds < 1.0 { 0 } else { 1 + (seconds.ln() * STEPS_PER_E) as usize };
    step.min(AGES - 1)
}

fn age_from(step: usize) -> f64 {
    if step == 0 { 0.0 } else { ((step - 1) as f64 / STEPS_PER_E).exp() }
}

#[derive(Debug, Clone, Copy)]
struct Block {
    class: usize,
    since: f64,
    uses: u32,
}

/// The blocks that were seen so far.
struct Walk {
    classes: HashMap<[u32; 5], usize>,
    index: HashMap<u64, usize>,
    seen: Vec<Block>,
}

impl Walk {
    fn new(trace: &Trace) -> Self {
        let count = trace.unique_blocks as usize;
        Self {
            classes: HashMap::new(),
            index: HashMap::with_capacity(count),
            seen: Vec::with_capacity(count),
        }
    }

    /// Counts one request; tells of the blocks in it that were seen before.
    fn serve(&mut self, request: &Request, now: f64, mut again: impl FnMut(&Block)) {
        let magnitude = |count: usize| (usize::BITS - count.leading_zeros()).min(8);
        let length = request.blocks.len();
        let found = request.blocks.iter().take_while(|block| self.index.contains_key(block)).count();
        for (depth, block) in request.blocks.iter().enumerate() {
            let at = *self.index.entry(*block).or_insert(self.seen.len());
            let uses = match self.seen.get(at) {
                Some(block) => {
                    again(block);
                    block.uses + 1
                }
                None => 1,
            };
            let is_last = u32::from(depth + 1 == length);
            let features = [uses.min(6), magnitude(length), magnitude(found), magnitude(depth), is_last];
            let next = self.classes.len();
            let block = Block { class: *self.classes.entry(features).or_insert(next), since: now, uses };
            match self.seen.get_mut(at) {
                Some(old) => *old = block,
                None => self.seen.push(block),
            }
        }
    }
}

/// By class and age: how often blocks came back, and how many seconds they were of that age.
#[derive(Default)]
struct Rates {
    came: Vec<[f64; AGES]>,
    waited: Vec<[f64; AGES]>,
}

impl Rates {
    fn came_back(&mut self, class: usize, after: f64) {
        self.waited(class, after);
        self.came[class][age(after)] += 1.0;
    }

    fn waited(&mut self, class: usize, seconds: f64) {
        if class >= self.came.len() {
            self.came.resize(class + 1, [0.0; AGES]);
            self.waited.resize(class + 1, [0.0; AGES]);
        }
        for step in 0..=age(seconds) {
            let until = if step == age(seconds) { seconds } else { age_from(step + 1) };
            self.waited[class][step] += (until - age_from(step)).max(0.0);
        }
    }

    fn table(&self) -> Vec<[f64; AGES]> {
        let rates = |(came, waited): (&[f64; AGES], &[f64; AGES])| {
            std::array::from_fn(|step| came[step] / waited[step].max(1e-9))
        };
        self.came.iter().zip(&self.waited).map(rates).collect()
    }
}
