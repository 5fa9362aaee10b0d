//! Points of a queue that another one waits for.

use std::fmt;
use std::sync::Arc;

use crate::{Device, Error, Queue};

/// What was queued before it; given back when dropped.
pub struct Mark {
    device: Arc<dyn Device>,
    mark: u64,
}

impl Mark {
    /// Everything that is queued on `queue` by now.
    pub fn new(device: &Arc<dyn Device>, queue: Queue) -> Result<Self, Error> {
        Ok(Self { mark: device.mark(queue)?, device: Arc::clone(device) })
    }

    /// What is queued on `queue` from now on begins when all that is done.
    pub fn hold_up(&self, queue: Queue) -> Result<(), Error> {
        self.device.hold_up(queue, self.mark)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.device.forget(self.mark);
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mark").field("mark", &self.mark).finish_non_exhaustive()
    }
}
