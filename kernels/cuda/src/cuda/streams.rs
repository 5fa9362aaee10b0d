//! The streams of a device, what waits for what on them, and streams of their own for libraries that wait inside of one.
#![allow(unsafe_code, reason = "calls the driver; see SAFETY")]

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUresult, CUstream},
};

use super::CudaDevice;
use crate::{Error, Queue};

/// Streams for launches and for arrivals, both or none. The context must be current.
pub(super) fn two() -> Result<[CUstream; 2], DriverError> {
    let create = || result::stream::create(result::stream::StreamKind::NonBlocking);
    let first = create()?;
    match create() {
        Ok(second) => Ok([first, second]),
        Err(error) => {
            // SAFETY: made above and used by nothing. The first error tells more.
            let _ = unsafe { result::stream::destroy(first) };
            Err(error)
        }
    }
}

impl CudaDevice {
    pub(super) fn stream_of(&self, queue: Queue) -> CUstream {
        match queue {
            Queue::Compute => self.stream,
            Queue::Arrivals => self.arrivals,
        }
    }

    /// A new event behind what is queued on `stream`, as a number.
    pub(super) fn new_mark(&self, stream: CUstream) -> Result<u64, Error> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event = self.check("cuEventCreate", event)?;
        // SAFETY: both live.
        if let Err(error) = self.check("cuEventRecord", unsafe { result::event::record(event, stream) }) {
            self.destroy_mark(event.expose_provenance() as u64);
            return Err(error);
        }
        Ok(event.expose_provenance() as u64)
    }

    /// What is queued on `stream` from now on waits for the event.
    pub(super) fn wait_for_mark(&self, stream: CUstream, mark: u64) -> Result<(), Error> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the number came from `new_mark`, whose owner has not given it back; the stream lives.
        self.check("cuStreamWaitEvent", unsafe { result::stream::wait_event(stream, event_of(mark), flags) })
    }

    /// Gives an event back. Waits for it that were queued stay.
    pub(super) fn destroy_mark(&self, mark: u64) {
        if self.enter().is_ok() {
            // SAFETY: made by `new_mark` and given back once by its owner. A fault that lost the context is told later.
            let _ = self.check("cuEventDestroy", unsafe { result::event::destroy(event_of(mark)) });
        }
    }

    /// Another stream; its owner gives it back with [`Self::destroy_stream`].
    pub(crate) fn new_stream(&self) -> Result<CUstream, Error> {
        self.enter()?;
        self.check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))
    }

    /// Gives a stream back, of which nothing is under way or nobody cares.
    pub(crate) fn destroy_stream(&self, stream: CUstream) {
        if self.enter().is_ok() {
            // SAFETY: made by `new_stream` and given back once by its owner. A fault that lost the context is told later.
            let _ = self.check("cuStreamDestroy", unsafe { result::stream::destroy(stream) });
        }
    }

    /// What is queued on `stream` from now on begins when everything queued on the device's own stream is done.
    pub(crate) fn order_after_main(&self, stream: CUstream) -> Result<(), Error> {
        let main = self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event = self.check("cuEventCreate", event)?;
        // SAFETY: both streams and the event live. A destroyed event still ends the wait that was queued.
        let outcome = unsafe {
            let queued = result::event::record(event, main).and_then(|()| {
                result::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)
            });
            queued.and(result::event::destroy(event))
        };
        self.check("cuStreamWaitEvent", outcome)
    }

    /// Waits for everything that is queued on the device's own stream by now.
    pub(crate) fn wait_for_queued(&self) -> Result<(), Error> {
        let main = self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event = self.check("cuEventCreate", event)?;
        // SAFETY: stream and event live; nothing waits for the event when it is given back.
        let outcome = unsafe {
            let waited = result::event::record(event, main).and_then(|()| result::event::synchronize(event));
            waited.and(result::event::destroy(event))
        };
        self.check("cuEventSynchronize", outcome)
    }

    /// Waits for everything queued on `stream`.
    pub(crate) fn wait_for(&self, stream: CUstream) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the stream lives.
        self.check("cuStreamSynchronize", unsafe { result::stream::synchronize(stream) })
    }

    /// Whether everything queued on `stream` is done.
    pub(crate) fn stream_is_done(&self, stream: CUstream) -> Result<bool, Error> {
        self.enter()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(stream) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => self.check("cuStreamQuery", status.result()).map(|()| true),
        }
    }
}

fn event_of(mark: u64) -> sys::CUevent {
    std::ptr::with_exposed_provenance_mut(mark as usize)
}
