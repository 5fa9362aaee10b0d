//! What waits for what: who copies beside launches must have them wait for each other.

use std::collections::{BTreeMap, HashMap};

use longshore_cuda::Queue;

/// How much was queued on each queue.
type Clock = [u64; 2];

fn index(queue: Queue) -> usize {
    match queue {
        Queue::Compute => 0,
        Queue::Arrivals => 1,
    }
}

/// A copy that no launch may count on yet.
pub(crate) struct Copy {
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
    /// Its number on its queue.
    number: u64,
}

impl Copy {
    fn meets(&self, start: u64, end: u64) -> bool {
        self.to < end && start < self.to + self.bytes.len() as u64
    }
}

/// The queues of a device. Copies beside launches happen as late as they may: when launches were told to wait for them.
#[derive(Default)]
pub(crate) struct Order {
    queued: Clock,
    /// By queue: how much of each is done before what is queued there next.
    known: [Clock; 2],
    marks: HashMap<u64, Clock>,
    next_mark: u64,
    under_way: Vec<Copy>,
    /// Of each copy: how many launches and other copies were queued that it does not wait for.
    pub(crate) leads: Vec<u64>,
    /// Memory that launches may use, by its start: its end, and how many launches and copies there were before.
    used: BTreeMap<u64, (u64, u64)>,
}

impl Order {
    /// Something is done in the order of launches.
    pub(crate) fn compute(&mut self) {
        self.queued[0] += 1;
    }

    /// Launches may use this memory from now on.
    pub(crate) fn allocated(&mut self, address: u64, bytes: usize) {
        self.used.insert(address, (address + bytes as u64, self.queued[0]));
        self.queued[0] += 1;
    }

    /// Memory is given back.
    pub(crate) fn freed(&mut self, address: u64, bytes: usize) -> Result<(), String> {
        let end = address + bytes.max(1) as u64;
        let inside: Vec<u64> = self.used.range(address..end).map(|(&start, _)| start).collect();
        for start in inside {
            self.used.remove(&start);
        }
        let outcome = self.done(address, bytes, "is given back");
        self.under_way.retain(|copy| !copy.meets(address, end));
        outcome
    }

    /// Refuses a use of what is still being copied.
    pub(crate) fn done(&self, address: u64, bytes: usize, what: &str) -> Result<(), String> {
        match self.under_way.iter().find(|copy| copy.meets(address, address + bytes as u64)) {
            Some(copy) => Err(format!(
                "memory at {address:#x} {what} while {} bytes are copied to {:#x}, which launches were not told to wait for",
                copy.bytes.len(),
                copy.to
            )),
            None => Ok(()),
        }
    }

    /// A copy beside launches begins. Refuses one to memory that launches may still use.
    pub(crate) fn copy(&mut self, to: u64, bytes: &[u8]) -> Result<(), String> {
        let end = to + bytes.len() as u64;
        self.done(to, bytes.len(), "is copied to")?;
        let known = self.known[1][0];
        let earlier = self.used.range(..end).rev().find(|(start, (until, _))| **start < end && to < *until);
        if let Some((start, (_, since))) = earlier.filter(|(_, (_, since))| known <= *since) {
            return Err(format!(
                "{} bytes at {to:#x} are copied to while launches may use them since the {since}th, at {start:#x}: the copy waits for {known}",
                bytes.len()
            ));
        }
        self.leads.push(self.queued[0] - known);
        self.queued[1] += 1;
        self.under_way.push(Copy { to, bytes: bytes.to_vec(), number: self.queued[1] });
        Ok(())
    }

    pub(crate) fn mark(&mut self, queue: Queue) -> u64 {
        let mut clock = self.known[index(queue)];
        clock[index(queue)] = self.queued[index(queue)];
        self.next_mark += 1;
        self.marks.insert(self.next_mark, clock);
        self.next_mark
    }

    /// What is on `queue` waits for a mark; gives the copies that launches may use now.
    pub(crate) fn hold_up(&mut self, queue: Queue, mark: u64) -> Result<Vec<Copy>, String> {
        let clock = *self.marks.get(&mark).ok_or_else(|| format!("there is no mark {mark}"))?;
        let known = &mut self.known[index(queue)];
        *known = [known[0].max(clock[0]), known[1].max(clock[1])];
        if queue != Queue::Compute {
            return Ok(Vec::new());
        }
        let until = known[1];
        let (done, under_way) =
            std::mem::take(&mut self.under_way).into_iter().partition(|copy: &Copy| copy.number <= until);
        self.under_way = under_way;
        for copy in &done {
            let copy: &Copy = copy;
            self.used.insert(copy.to, (copy.to + copy.bytes.len() as u64, self.queued[0]));
        }
        Ok(done)
    }

    pub(crate) fn forget(&mut self, mark: u64) -> Result<(), String> {
        self.marks.remove(&mark).map(drop).ok_or_else(|| format!("there is no mark {mark} to forget"))
    }

    /// Everything is waited for; gives the copies that were under way.
    pub(crate) fn synchronize(&mut self) -> Vec<Copy> {
        self.known = [self.queued; 2];
        std::mem::take(&mut self.under_way)
    }

    /// What nobody gave back.
    pub(crate) fn left(&self) -> Option<String> {
        (!self.marks.is_empty()).then(|| format!("{} marks were not given back", self.marks.len()))
    }
}
