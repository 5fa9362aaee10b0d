//! One rank of a communicator.
#![allow(unsafe_code, reason = "calls a foreign library; see SAFETY")]

use std::{ffi::c_int, fmt, sync::Arc};

use cudarc::{
    driver::sys::CUstream,
    nccl::sys::{cudaStream_t, ncclComm_t},
};

use super::{BYTES, Config, IN_PROGRESS, Nccl, SUCCESS, UniqueId, owned};
use crate::{Buffer, CudaDevice, Error};

/// Ranks of one communicator.
const RANKS_MAX: u32 = 1 << 16;

/// A range of device memory that goes to a peer or comes from it.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Rank of the peer.
    pub peer: u32,
    /// Device memory of this rank.
    pub buffer: &'a Buffer,
    /// Where in it.
    pub offset: usize,
    /// How much.
    pub bytes: usize,
}

/// One rank. It belongs to one thread at a time, which its owner gives it: every call takes it exclusively.
///
/// `go_on` of each call is asked between two looks at what is under way; it waits a little, and answers `false` when there is no
/// time left. Kernels know no clock.
pub struct Communicator {
    nccl: Nccl,
    device: Arc<CudaDevice>,
    stream: CUstream,
    /// Null once it was aborted.
    comm: ncclComm_t,
    rank: u32,
    ranks: u32,
}

// SAFETY: NCCL lets another thread go on with a communicator as long as two never call at the same time; `&mut self` sees to
// that. The stream is a handle of the driver, which any thread may use with the context current.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins the others as `rank` of `ranks`; returns when all have joined.
    pub fn join(
        nccl: &Nccl,
        device: &Arc<CudaDevice>,
        id: &UniqueId,
        (rank, ranks): (u32, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Self, Error> {
        check_rank(rank, ranks)?;
        let stream = device.new_stream()?;
        let comm = std::ptr::null_mut();
        let mut joined = Self { nccl: nccl.clone(), device: Arc::clone(device), stream, comm, rank, ranks };
        let (count, own) = (ranks as c_int, rank as c_int);
        let mut config = Config::non_blocking();
        joined.device.enter()?;
        // SAFETY: all pointers are of this frame; the device's context is current; the library reads of the settings as many
        // bytes as their `size` tells.
        let status =
            unsafe { (nccl.functions.init)(&raw mut joined.comm, count, id.foreign(), own, &raw mut config) };
        joined.settle("ncclCommInitRankConfig", status, go_on)?;
        Ok(joined)
    }

    /// Sends and receives as one operation, so that no order among peers can block; returns when all of it is done. What was
    /// queued on the device before comes first.
    ///
    /// # Safety
    /// Nobody else may use the memory of `receives` meanwhile, nor write to that of `sends`.
    pub unsafe fn exchange(
        &mut self,
        sends: &[Part<'_>],
        receives: &[Part<'_>],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        sends.iter().chain(receives).try_for_each(|part| self.check_part(part))?;
        self.alive("ncclGroupStart")?;
        self.device.order_after_main(self.stream)?;
        // SAFETY: every range lies in its buffer, which outlives this call, and the call ends when the stream is done or the
        // communicator aborted. The stream is of this device.
        let status = unsafe { self.group(sends, receives) };
        self.settle("ncclGroupEnd", status, go_on)?;
        while !self.device.stream_is_done(self.stream).inspect_err(|_| self.abort())? {
            self.settled("ncclGroupEnd")?;
            self.wait("ncclGroupEnd", go_on)?;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Self::exchange`], with ranges that were checked.
    unsafe fn group(&self, sends: &[Part<'_>], receives: &[Part<'_>]) -> c_int {
        let f = &self.nccl.functions;
        let stream: cudaStream_t = self.stream.cast();
        let address = |part: &Part<'_>| part.buffer.address() + part.offset as u64;
        let started = |status| status == SUCCESS || status == IN_PROGRESS;
        // SAFETY: the caller's promise.
        unsafe {
            let mut status = (f.group_start)();
            for part in sends.iter().filter(|part| part.bytes > 0) {
                if started(status) {
                    let from = std::ptr::without_provenance(address(part) as usize);
                    status = (f.send)(from, part.bytes, BYTES, part.peer as c_int, self.comm, stream);
                }
            }
            for part in receives.iter().filter(|part| part.bytes > 0) {
                if started(status) {
                    let to = std::ptr::without_provenance_mut(address(part) as usize);
                    status = (f.receive)(to, part.bytes, BYTES, part.peer as c_int, self.comm, stream);
                }
            }
            // A group that was begun is ended whatever happened in it.
            let ended = (f.group_end)();
            if started(status) { ended } else { status }
        }
    }

    /// Leaves in good order: waits for what is under way, and frees everything.
    pub fn finish(mut self, go_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        self.alive("ncclCommFinalize")?;
        // SAFETY: the communicator lives.
        let status = unsafe { (self.nccl.functions.finalize)(self.comm) };
        self.settle("ncclCommFinalize", status, go_on)?;
        // SAFETY: finalised, and not used again.
        unsafe { (self.nccl.functions.destroy)(self.comm) };
        self.comm = std::ptr::null_mut();
        Ok(())
    }

    /// Ends everything under way, here and at the peers. Harmless when repeated.
    pub fn abort(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: the communicator lives, and is not used again. An error has no remedy.
            unsafe { (self.nccl.functions.abort)(self.comm) };
            self.comm = std::ptr::null_mut();
            // What was queued ends with the abort; buffers are given back on another stream, which must not be ahead of that. Where
            // the wait fails the context is lost, and nothing runs any more.
            let _ = self.device.wait_for(self.stream);
        }
    }

    /// This rank and how many there are.
    pub fn place(&self) -> (u32, u32) {
        (self.rank, self.ranks)
    }

    /// Waits until a call that may only have been begun is done; aborts when it failed or there is no time left.
    fn settle(
        &mut self,
        call: &'static str,
        status: c_int,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        if status != SUCCESS && status != IN_PROGRESS {
            return Err(self.broken(call, status));
        }
        while !self.settled(call)? {
            self.wait(call, go_on)?;
        }
        Ok(())
    }

    /// Whether no call is under way; aborts when something failed, here or at a peer.
    fn settled(&mut self, call: &'static str) -> Result<bool, Error> {
        let mut state = SUCCESS;
        // SAFETY: the communicator lives; points at an integer.
        let status = unsafe { (self.nccl.functions.state)(self.comm, &raw mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, fault) | (fault, _) => Err(self.broken(call, fault)),
        }
    }

    /// Lets the caller wait; aborts when there is no time left.
    fn wait(&mut self, call: &'static str, go_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        if go_on() {
            return Ok(());
        }
        self.abort();
        Err(Error::Communicator { call, problem: "it took longer than its deadline allows".to_owned() })
    }

    fn broken(&mut self, call: &'static str, status: c_int) -> Error {
        // SAFETY: takes a communicator or null, returns a string that is never freed.
        let detail = owned(unsafe { (self.nccl.functions.last_error)(self.comm) });
        let text = self.nccl.text(status);
        let problem = detail.map_or(text.clone(), |detail| format!("{text}: {detail}"));
        self.abort();
        Error::Communicator { call, problem }
    }

    fn alive(&self, call: &'static str) -> Result<(), Error> {
        match self.comm.is_null() {
            true => Err(Error::Communicator { call, problem: "an earlier call failed".to_owned() }),
            false => Ok(()),
        }
    }

    fn check_part(&self, part: &Part<'_>) -> Result<(), Error> {
        let refuse = |field, problem| Err(Error::Invalid { field, problem });
        if part.peer >= self.ranks || part.peer == self.rank {
            return refuse("peer", format!("is {}, must be another rank below {}", part.peer, self.ranks));
        }
        let inside = part.offset.checked_add(part.bytes).is_some_and(|end| end <= part.buffer.bytes());
        match inside {
            true => Ok(()),
            false => {
                let (from, bytes, has) = (part.offset, part.bytes, part.buffer.bytes());
                refuse("bytes", format!("is {bytes} from {from} on, the buffer has {has}"))
            }
        }
    }
}

fn check_rank(rank: u32, ranks: u32) -> Result<(), Error> {
    if !(2..=RANKS_MAX).contains(&ranks) {
        let problem = format!("is {ranks}, must be from 2 to {RANKS_MAX}");
        return Err(Error::Invalid { field: "ranks", problem });
    }
    if rank >= ranks {
        return Err(Error::Invalid { field: "rank", problem: format!("is {rank}, must be below {ranks}") });
    }
    Ok(())
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
        self.device.destroy_stream(self.stream);
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank)
            .field("ranks", &self.ranks)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_cannot_be_are_refused() {
        check_rank(0, 2).unwrap();
        check_rank(1, 2).unwrap();
        for (rank, ranks, field) in
            [(0, 0, "ranks"), (0, 1, "ranks"), (2, 2, "rank"), (0, u32::MAX, "ranks"), (u32::MAX, 2, "rank")]
        {
            let error = check_rank(rank, ranks).unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{field}` ")), "{error}");
        }
    }
}
