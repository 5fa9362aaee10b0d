//! What stands for GPUs and NCCL: device memory that is memory of this process, and ranks that hand bytes to each other, or hang, die,
//! refuse and corrupt. **Nothing of CUDA or NCCL runs here.** What is between them and the fabric is the product's own.
#![allow(
    unsafe_code,
    reason = "stands for a device and for ranks, whose traits are unsafe to implement; nothing here is"
)]

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore_cuda::{Convener, Device, Error, Launch, Memory, Part, Queue, Ranks, Span, UniqueId};
use longshore_fabric::nccl::GpuLanes;

use super::gpu_lane::CudaLanes;

/// What goes wrong from now on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Nobody can join.
    Refuses,
    /// Who joins waits for ever.
    NobodyComes,
    /// Exchanges go on for ever.
    Hangs,
    /// The same, and who aborts is not noticed by the other one.
    HangsUnnoticed,
    /// One bit of each body is another when it comes.
    Corrupts,
    /// Exchanges fail at once at both sides.
    Dies,
}

/// What all ranks share.
#[derive(Debug, Default)]
pub(crate) struct Net {
    state: Mutex<State>,
    pub(crate) exchanges: AtomicUsize,
    pub(crate) joins: AtomicUsize,
}

/// What an end did with its staging memory, with the offset of the half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Up(u64),
    Down(u64),
    Begun(u64),
    Done(u64),
}

#[derive(Debug, Default)]
struct State {
    meetings: HashMap<[u8; UniqueId::BYTES], Meeting>,
    ids: u64,
    fault: Fault,
}

#[derive(Debug, Default)]
struct Meeting {
    joined: [bool; 2],
    /// As each rank knows.
    aborted: [bool; 2],
    /// What each rank sends and the other did not take yet.
    mail: [Option<Vec<u8>>; 2],
}

impl Net {
    /// One more process with a GPU.
    pub(crate) fn gpu(self: &Arc<Self>) -> Arc<dyn GpuLanes> {
        self.gpu_with_memory().0
    }

    /// The same, with what its memory sees.
    pub(crate) fn gpu_with_memory(self: &Arc<Self>) -> (Arc<dyn GpuLanes>, Arc<HostMemory>) {
        let device = Arc::new(HostMemory::default());
        let convener = StandIn { net: Arc::clone(self), device: Arc::clone(&device) };
        (Arc::new(CudaLanes::new(Arc::new(convener), Arc::clone(&device) as Arc<dyn Device>)), device)
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.state().fault = fault;
    }

    /// Communicators that some rank did not abort, or did not notice the end of.
    pub(crate) fn alive(&self) -> usize {
        self.state().meetings.values().filter(|meeting| meeting.aborted != [true; 2]).count()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Looks until `ready` gives something, the communicator is aborted, or there is no time left.
    fn look<T>(
        &self,
        (id, own): (&UniqueId, usize),
        go_on: &mut dyn FnMut() -> bool,
        mut ready: impl FnMut(Fault, &mut Meeting) -> Option<T>,
    ) -> Result<T, Error> {
        let failed = |problem: &str| Error::Communicator { call: "a stand-in", problem: problem.to_owned() };
        loop {
            {
                let mut state = self.state();
                let fault = state.fault;
                let meeting = state.meetings.entry(*id.as_bytes()).or_default();
                if meeting.aborted[own] || fault == Fault::Dies {
                    meeting.aborted = [true; 2];
                    return Err(failed("the peer is gone"));
                }
                if let Some(done) = ready(fault, meeting) {
                    return Ok(done);
                }
            }
            if !go_on() {
                self.abort(id, own);
                return Err(failed("there is no time left"));
            }
        }
    }

    fn abort(&self, id: &UniqueId, own: usize) {
        let mut state = self.state();
        let is_noticed = state.fault != Fault::HangsUnnoticed;
        let aborted = &mut state.meetings.entry(*id.as_bytes()).or_default().aborted;
        aborted[own] = true;
        aborted[1 - own] |= is_noticed;
    }
}

#[derive(Debug)]
struct StandIn {
    net: Arc<Net>,
    device: Arc<HostMemory>,
}

impl Convener for StandIn {
    fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut state = self.net.state();
        state.ids += 1;
        let mut bytes = [7; UniqueId::BYTES];
        bytes[..8].copy_from_slice(&state.ids.to_le_bytes());
        UniqueId::from_bytes(&bytes)
    }

    fn join(
        &self,
        id: &UniqueId,
        (rank, ranks): (u32, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Box<dyn Ranks>, Error> {
        assert_eq!(ranks, 2);
        if self.net.state().fault == Fault::Refuses {
            let problem = "this one refuses".to_owned();
            return Err(Error::Communicator { call: "joining", problem });
        }
        self.net.look((id, rank as usize), go_on, |fault, meeting| {
            meeting.joined[rank as usize] = true;
            (meeting.joined == [true; 2] && fault != Fault::NobodyComes).then_some(())
        })?;
        self.net.joins.fetch_add(1, Ordering::SeqCst);
        let (net, device) = (Arc::clone(&self.net), Arc::clone(&self.device));
        Ok(Box::new(Rank { net, device, id: *id, own: rank as usize }))
    }
}

/// One rank of two.
#[derive(Debug)]
struct Rank {
    net: Arc<Net>,
    device: Arc<HostMemory>,
    id: UniqueId,
    own: usize,
}

impl Ranks for Rank {
    /// As NCCL does: it ends when the peer took part, and bytes that do not fit each other are never exchanged. Nothing is done at once, so
    /// the caller is asked whether to go on; what it does with the memory of the exchange then is its fault, and is noticed.
    unsafe fn exchange(
        &mut self,
        sends: &[Part<'_>],
        receives: &[Part<'_>],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let (own, peer) = (self.own, 1 - self.own);
        let of = |part: &Part<'_>| (part.buffer.address() + part.offset as u64, part.bytes);
        for part in sends {
            assert_eq!(part.peer as usize, peer);
            let bytes = self.device.begin(of(part));
            self.net.look((&self.id, own), go_on, |fault, meeting| {
                let is_free = meeting.mail[own].is_none() && !hangs(fault);
                is_free.then(|| meeting.mail[own] = Some(bytes.clone()))
            })?;
        }
        for part in receives {
            assert_eq!(part.peer as usize, peer);
            self.device.begin(of(part));
        }
        let is_left = !go_on();
        for part in receives {
            let mut bytes =
                self.net.look((&self.id, own), &mut || !is_left && go_on(), |fault, meeting| {
                    let fits = meeting.mail[peer].as_ref().is_some_and(|mail| mail.len() == part.bytes);
                    (fits && !is_left && !hangs(fault)).then(|| meeting.mail[peer].take()).flatten()
                })?;
            if self.net.state().fault == Fault::Corrupts {
                bytes[part.bytes / 2] ^= 0x10;
            }
            self.device.write(of(part).0, &bytes);
            self.net.exchanges.fetch_add(1, Ordering::SeqCst);
        }
        if !sends.is_empty() {
            self.net.look((&self.id, own), &mut || !is_left && go_on(), |_, meeting| {
                (!is_left && meeting.mail[own].is_none()).then_some(())
            })?;
        }
        sends.iter().chain(receives).for_each(|part| self.device.done(of(part)));
        Ok(())
    }

    fn abort(&mut self) {
        self.net.abort(&self.id, self.own);
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.net.abort(&self.id, self.own);
    }
}

fn hangs(fault: Fault) -> bool {
    matches!(fault, Fault::Hangs | Fault::HangsUnnoticed)
}

/// Memory of this process by addresses that are none.
#[derive(Debug)]
pub(crate) struct HostMemory {
    /// The next address, and what there is.
    all: Mutex<(u64, BTreeMap<u64, Vec<u8>>)>,
    /// What is exchanged.
    busy: Mutex<Vec<(u64, usize)>>,
    steps: Mutex<Vec<Step>>,
    /// Copies to it fail when so many more were made.
    pub(crate) fails_after: AtomicUsize,
}

impl Default for HostMemory {
    fn default() -> Self {
        let fails_after = AtomicUsize::new(usize::MAX);
        let all = Mutex::new((256, BTreeMap::new()));
        Self { all, busy: Mutex::default(), steps: Mutex::default(), fails_after }
    }
}

impl HostMemory {
    /// What was done since this was asked last.
    pub(crate) fn take_steps(&self) -> Vec<Step> {
        std::mem::take(&mut *self.steps.lock().unwrap())
    }

    /// Notes a copy or an exchange, of memory that nothing else is exchanged in.
    fn note(&self, (address, bytes): (u64, usize), step: impl Fn(u64) -> Step) {
        let overlaps =
            |busy: &(u64, usize)| address < busy.0 + busy.1 as u64 && busy.0 < address + bytes as u64;
        assert!(!self.busy.lock().unwrap().iter().any(overlaps), "used while it is exchanged");
        let begin = *self.all.lock().unwrap().1.range(..=address).next_back().expect("an allocation").0;
        self.steps.lock().unwrap().push(step(address - begin));
    }

    /// An exchange of this memory begins. What lies there now is what is sent.
    fn begin(&self, (address, bytes): (u64, usize)) -> Vec<u8> {
        self.note((address, bytes), Step::Begun);
        self.busy.lock().unwrap().push((address, bytes));
        self.read(address, bytes)
    }

    fn done(&self, (address, bytes): (u64, usize)) {
        self.busy.lock().unwrap().retain(|busy| *busy != (address, bytes));
        self.note((address, bytes), Step::Done);
    }

    fn at<T>(&self, address: u64, bytes: usize, run: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut all = self.all.lock().unwrap();
        let (begin, memory) = all.1.range_mut(..=address).next_back().expect("an allocation");
        let offset = (address - begin) as usize;
        run(&mut memory[offset..offset + bytes])
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        self.at(address, bytes, |part| part.to_vec())
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.at(address, bytes.len(), |part| part.copy_from_slice(bytes));
    }
}

impl Device for HostMemory {
    fn name(&self) -> String {
        "memory of the host".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn capability(&self) -> u32 {
        90
    }

    fn shared_bytes_limit(&self) -> usize {
        0
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        let mut all = self.all.lock().unwrap();
        let address = all.0;
        all.0 += bytes.next_multiple_of(256) as u64 + 256;
        // What was there before is nothing that anybody may take for a body.
        all.1.insert(address, vec![0xee; bytes]);
        // SAFETY: a number that is given out once.
        Ok(unsafe { Memory::new(address, bytes) })
    }

    fn free(&self, memory: Memory) {
        let bytes = self.all.lock().unwrap().1.remove(&memory.address()).expect("allocated").len() as u64;
        // An exchange that failed is over.
        let freed = memory.address()..memory.address() + bytes;
        self.busy.lock().unwrap().retain(|(address, _)| !freed.contains(address));
    }

    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        to.check(from.len())?;
        let left = self.fails_after.load(Ordering::SeqCst);
        if left == 0 {
            return Err(Error::Invalid { field: "copy", problem: "fails, as the test wants".to_owned() });
        }
        self.fails_after.store(left.saturating_sub(usize::from(left != usize::MAX)), Ordering::SeqCst);
        self.note((to.address(), from.len()), Step::Up);
        self.write(to.address(), from);
        Ok(())
    }

    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        self.upload(to, from)
    }

    // Nothing is ever queued: whatever is marked is done.
    fn mark(&self, _: Queue) -> Result<u64, Error> {
        Ok(0)
    }

    fn hold_up(&self, _: Queue, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn forget(&self, _: u64) {}

    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        from.check(to.len())?;
        self.note((from.address(), to.len()), Step::Down);
        self.at(from.address(), to.len(), |part| to.copy_from_slice(part));
        Ok(())
    }

    fn depart(&self, _: Span<'_>) -> Result<Option<u64>, Error> {
        Ok(None)
    }

    fn collect(&self, _: u64, _: &mut [u8]) -> Result<(), Error> {
        unreachable!("nothing departs")
    }

    fn abandon(&self, _: u64) {}

    fn launch(&self, _: &Launch<'_>) -> Result<(), Error> {
        unreachable!("the lane launches no kernel")
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}
