//! Rows that stay on the device.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use longshore_model::{Activations, DeviceRead, DeviceRows};

use super::compute::{At, Compute};
use super::failed;
use super::programs::{Precision, Programs};
use super::rows::RowsIn;
use crate::{Buffer, Departure, Device, Error, Span};

/// f32 rows on the device, without gaps: what an executor of the same device reads and writes.
#[derive(Debug)]
pub struct KeptRows {
    compute: Arc<Compute>,
    buffer: Arc<Buffer>,
    rows: usize,
    width: usize,
}

impl KeptRows {
    /// Rows of no defined content.
    pub(super) fn new(compute: &Arc<Compute>, rows: usize, width: usize) -> Result<Self, Error> {
        let buffer = Arc::new(Buffer::new(&compute.device, rows * width * size_of::<f32>())?);
        Ok(Self { compute: Arc::clone(compute), buffer, rows, width })
    }

    /// As many rows of no defined content.
    pub(crate) fn beside(&self) -> Result<Self, Error> {
        Self::new(&self.compute, self.rows, self.width)
    }

    /// Some of them, in order.
    pub(crate) fn span(&self, rows: &Range<usize>) -> Result<Span<'_>, Error> {
        let row = self.width * size_of::<f32>();
        self.buffer.span(rows.start * row, rows.len() * row)
    }

    /// Where they are.
    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.compute.device
    }

    /// Rows of the host.
    pub(super) fn from_slice(compute: &Arc<Compute>, width: usize, data: &[f32]) -> Result<Self, Error> {
        let buffer = Arc::new(Buffer::from_slice(&compute.device, data)?);
        Ok(Self { compute: Arc::clone(compute), buffer, rows: data.len() / width, width })
    }

    /// Rows of the host on a device that has no model: for comparisons.
    pub(crate) fn on(device: &Arc<dyn Device>, width: usize, data: &[f32]) -> Result<Self, Error> {
        let (precision, products) = (Precision::F32, None);
        let programs = Programs::new(precision);
        let compute = Compute { device: Arc::clone(device), precision, programs, products };
        Self::from_slice(&Arc::new(compute), width, data)
    }

    /// What a device keeps of `activations`; `None` where they are in host memory, or of another kind of backend.
    pub fn of(activations: &Activations) -> Option<&Self> {
        let kept: &dyn Any = &**activations.on_device()?;
        kept.downcast_ref()
    }

    /// Whether they are on the device of `compute`.
    pub(super) fn is_on(&self, compute: &Compute) -> bool {
        Arc::ptr_eq(&self.compute.device, &compute.device)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// f32 `[rows, width]`.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    pub(super) fn at(&self) -> At<'_> {
        At::f32(self.buffer.whole(), self.width)
    }

    pub(crate) fn activations(self) -> Activations {
        Activations::from_device(self.rows, self.width, Arc::new(self))
    }

    /// The rows that `chosen` names, u32 `[rows]`; all of them in order without it.
    pub(super) fn copied(&self, rows: usize, chosen: Option<&Buffer>) -> Result<Self, Error> {
        let copy = Self::new(&self.compute, rows, self.width)?;
        let chosen = chosen.map(Buffer::whole);
        self.compute.copy(RowsIn { x: self.at(), width: self.width, chosen }, rows, copy.at())?;
        Ok(copy)
    }
}

impl DeviceRows for KeptRows {
    fn select(&self, rows: &[usize]) -> Result<Arc<dyn DeviceRows>, longshore_model::Error> {
        let chosen: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let chosen = Buffer::from_slice(&self.compute.device, &chosen).map_err(failed)?;
        Ok(Arc::new(self.copied(rows.len(), Some(&chosen)).map_err(failed)?))
    }

    fn read(&self) -> Result<Vec<f32>, longshore_model::Error> {
        self.buffer.to_vec().map_err(failed)
    }

    fn begin_read(self: Arc<Self>) -> Result<Box<dyn DeviceRead>, longshore_model::Error> {
        let departure = self.buffer.depart(0, self.buffer.bytes()).map_err(failed)?;
        Ok(Box::new(KeptRead { departure, rows: self }))
    }
}

/// Rows on their way to the host.
#[derive(Debug)]
struct KeptRead {
    /// `None`: there was no room for it.
    departure: Option<Departure>,
    rows: Arc<KeptRows>,
}

impl DeviceRead for KeptRead {
    fn finish(self: Box<Self>) -> Result<Vec<f32>, longshore_model::Error> {
        let Self { departure, rows } = *self;
        let Some(departure) = departure else { return rows.read() };
        let mut data = vec![0.0; rows.rows * rows.width];
        departure.collect(&mut data).map_err(failed)?;
        Ok(data)
    }
}
