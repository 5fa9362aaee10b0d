//! A linear layer on its own, for measurements and tests.

use std::sync::Arc;

use longshore_model::{StoredMatrix, TensorType};

use super::compute::{At, Compute};
use super::linear::{Linear, Then};
use super::load::ModelOptions;
use super::pack::Problem;
use super::programs::{Form, Precision, Programs};
use super::rows::RowsIn;
use super::upload::{Fault, upload};
use crate::{Buffer, Device, Error};

/// Weights `[outputs, inputs]` as a backend keeps them, with the kernels that it uses.
#[derive(Debug)]
pub struct CudaLinear {
    compute: Compute,
    linear: Linear,
}

impl CudaLinear {
    /// Packs weights as files store them: `bytes` holds `outputs` rows of `inputs` elements of type `kind`, row by row.
    pub fn new(
        device: &Arc<dyn Device>,
        options: &ModelOptions,
        kind: TensorType,
        [outputs, inputs]: [usize; 2],
        bytes: &[u8],
    ) -> Result<Self, Error> {
        let invalid = |field, problem| Error::Invalid { field, problem };
        if let Some((field, problem)) = kind.fault_of_matrix([outputs, inputs], bytes.len()) {
            return Err(invalid(field, problem));
        }
        let precision = options.precision_of(kind);
        let programs = Programs::new(precision);
        let products = options.products.clone();
        let compute = Compute { device: Arc::clone(device), precision, programs, products };
        let matrix = StoredMatrix { kind, rows: outputs, cols: inputs, bytes: bytes.into() };
        let form = Form::of(precision, kind, options.keep_quantised);
        let linear = upload(&compute, &options.pool, form, &[&matrix], outputs, &|row| Some((0, row)));
        let linear = linear.map_err(|fault| match fault {
            Fault::Device(error) => error,
            Fault::Weights { problem: Problem::NotFinite, .. } => {
                invalid("bytes", "holds a value that is not finite".to_owned())
            }
            Fault::Weights { problem: Problem::TooLarge(x), .. } => invalid(
                "bytes",
                format!("holds {x}, more than {} can; hint: use bf16 or f32", precision.name()),
            ),
        })?;
        Ok(Self { compute, linear })
    }

    /// What it computes in.
    pub fn precision(&self) -> Precision {
        self.compute.precision
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// Rows on the device, ready to be multiplied: `x` is f32 `[rows, inputs]`.
    pub fn input(&self, x: &[f32]) -> Result<Buffer, Error> {
        let (compute, inputs) = (&self.compute, self.linear.inputs);
        let stride = compute.precision.stride(inputs);
        let rows = x.len() / inputs;
        let wide = Buffer::from_slice(&compute.device, x)?;
        let input = Buffer::new(&compute.device, rows * stride * compute.precision.bytes())?;
        let from = RowsIn::all(At::f32(wide.whole(), inputs), inputs);
        compute.narrow(from, rows, self.at(&input))?;
        Ok(input)
    }

    fn at<'a>(&self, input: &'a Buffer) -> At<'a> {
        let precision = self.compute.precision;
        At::new(input.whole(), precision.stride(self.linear.inputs), precision.bytes())
    }

    /// Queues `out = input · weightsᵀ`, f32 `[rows, outputs]`, for what [`Self::input`] made of `rows` rows. `room` has
    /// [`Self::room_bytes`] of any content.
    pub fn launch(&self, input: &Buffer, rows: usize, out: &Buffer, room: &Buffer) -> Result<(), Error> {
        let to = At::f32(out.whole(), self.linear.outputs);
        self.compute.multiply(&self.linear, self.at(input), rows, to, Then::Store, room)
    }

    /// Bytes that products of `rows` rows need beside the weights.
    pub fn room_bytes(&self, rows: usize) -> usize {
        self.linear.expanded_bytes(rows)
    }

    /// `x · weightsᵀ`: `x` f32 `[rows, inputs]`; gives f32 `[rows, outputs]`.
    pub fn multiply(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let rows = x.len() / self.linear.inputs;
        let device = &self.compute.device;
        let out = Buffer::new(device, rows * self.linear.outputs * size_of::<f32>())?;
        let room = Buffer::new(device, self.room_bytes(rows))?;
        self.launch(&self.input(x)?, rows, &out, &room)?;
        out.to_vec()
    }
}
