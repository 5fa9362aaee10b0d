//! Where tiles arrive on the device before they become pages: memory that is filled while launches before it run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Buffer, Device, Error, Mark, Queue};

/// Slots that are kept: while one becomes pages the next ones are filled, as far ahead of launches as there are slots.
const SLOTS: usize = 3;
/// Slots are at least so large: one that is too small makes way for a larger one.
const SLOT_BYTES_MIN: usize = 1 << 12;

/// Memory with what must be done before it is filled again.
#[derive(Debug)]
struct Slot {
    buffer: Buffer,
    /// Behind the last launch that reads it, or behind what used the memory before it was this slot's.
    until: Mark,
}

/// Slots that nobody fills now, those that were filled longest ago first.
#[derive(Debug, Default)]
struct Idle {
    slots: Vec<Slot>,
    /// How many there are, with those that are being filled.
    made: usize,
}

/// Slots of a device for all calls.
#[derive(Debug)]
pub(super) struct Arrivals {
    device: Arc<dyn Device>,
    idle: Mutex<Idle>,
}

impl Arrivals {
    /// Takes nothing of the device yet.
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        Self { device: Arc::clone(device), idle: Mutex::default() }
    }

    /// Has `fill` copy to memory of `bytes` bytes on [`Queue::Arrivals`], which waits for nothing but what used the memory before, and
    /// `read` queue launches that read it; these wait for the copies and not for what comes later.
    pub(super) fn bring(
        &self,
        bytes: usize,
        fill: impl FnOnce(&Buffer) -> Result<(), Error>,
        read: impl FnOnce(&Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let slot = self.take(bytes)?;
        let outcome = self.through(&slot, fill, read);
        // Whatever became of it, nobody fills the memory before what was queued to read it is done.
        match outcome.and_then(|()| Mark::new(&self.device, Queue::Compute)) {
            Ok(until) => {
                self.give(Slot { until, ..slot });
                Ok(())
            }
            Err(error) => {
                self.lock().made -= 1;
                Err(error)
            }
        }
    }

    fn through(
        &self,
        slot: &Slot,
        fill: impl FnOnce(&Buffer) -> Result<(), Error>,
        read: impl FnOnce(&Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        slot.until.hold_up(Queue::Arrivals)?;
        let filled = fill(&slot.buffer);
        // Also after a fault: the memory is given back in the order of launches, and some copies may be under way.
        let ordered =
            Mark::new(&self.device, Queue::Arrivals).and_then(|filled| filled.hold_up(Queue::Compute));
        if ordered.is_err() {
            // The first error tells more.
            let _ = self.device.synchronize();
        }
        ordered.and(filled)?;
        read(&slot.buffer)
    }

    /// A new slot as long as there are few, else the one that was filled longest ago.
    fn take(&self, bytes: usize) -> Result<Slot, Error> {
        let mut idle = self.lock();
        let oldest = (idle.made >= SLOTS && !idle.slots.is_empty()).then(|| idle.slots.remove(0));
        if let Some(slot) = oldest {
            if slot.buffer.bytes() >= bytes {
                return Ok(slot);
            }
            // Another one is made in its place.
            drop(idle);
            drop(slot);
        } else {
            idle.made += 1;
            drop(idle);
        }
        self.make(bytes).or_else(|error| {
            let mut idle = self.lock();
            idle.made -= 1;
            match idle.slots.iter().position(|slot| slot.buffer.bytes() >= bytes) {
                Some(large) if matches!(error, Error::OutOfMemory { .. }) => Ok(idle.slots.remove(large)),
                _ => Err(error),
            }
        })
    }

    fn make(&self, bytes: usize) -> Result<Slot, Error> {
        let buffer = Buffer::new(&self.device, bytes.next_power_of_two().max(SLOT_BYTES_MIN))?;
        // What has the memory before may still be queued.
        Ok(Slot { until: Mark::new(&self.device, Queue::Compute)?, buffer })
    }

    fn give(&self, slot: Slot) {
        let mut idle = self.lock();
        if idle.made > SLOTS {
            idle.made -= 1;
        } else {
            idle.slots.push(slot);
        }
    }

    /// Gives slots that nobody fills back to the device; tells their bytes.
    pub(super) fn clear(&self) -> usize {
        let mut idle = self.lock();
        idle.made -= idle.slots.len();
        idle.slots.drain(..).map(|slot| slot.buffer.bytes()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        // Each change is complete before anything can panic.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
