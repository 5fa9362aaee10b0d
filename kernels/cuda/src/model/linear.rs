//! Linear layers on the device: which kernel multiplies, and how.

use bytemuck::{Pod, Zeroable};

use super::compute::{At, Compute, number};
use super::programs::{FEW_TILES, Form, GROUP, MANY_ROWS, Precision};
use crate::{Buffer, Error, Span};

/// Parts that the inputs of a sum are cut into at most; warps of a block of `multiply_few`.
const CHUNKS: usize = 8;
const TILE_OUTPUTS: usize = 128;
const STAGES: usize = 3;
/// Outputs and rows of a block of `multiply_f32`.
const FLOAT_TILE: usize = 64;
/// Inputs that it takes at once.
const FLOAT_INPUTS: usize = 16;

/// Rows up to which `multiply_few` reads plain weights.
const FEW_PLAIN_ROWS: usize = 32;
/// Rows up to which it reads quantised weights: `multiply_many` would first write and read them as 16 bits, which is as much as
/// reading 4 or 8 bits again for every 32 rows.
const FEW_QUANTISED_ROWS: usize = 96;
/// Bytes of quantised weights that are made plain at once; they fit into the L2 cache.
const PANEL_BYTES: usize = 32 << 20;

/// `Linear` of `linear_few.cu` and `linear_many.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinearParams {
    weights: u64,
    constants: u64,
    x: u64,
    out: u64,
    outputs: u32,
    rows: u32,
    groups: u32,
    chunks: u32,
    x_stride: u32,
    out_stride: u32,
    then: u32,
    reserved: u32,
}

/// `Linear` of `linear_f32.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct FloatParams {
    weights: u64,
    x: u64,
    out: u64,
    outputs: u32,
    rows: u32,
    inputs: u32,
    out_stride: u32,
    then: u32,
    reserved: u32,
}

/// `Table` of `linear_few.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TableParams {
    weights: u64,
    constants: u64,
    tokens: u64,
    out: u64,
    rows: u32,
    width: u32,
    groups: u32,
    first: u32,
}

/// Weights `[outputs, inputs]` on the device.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) form: Form,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) weights: Buffer,
    /// Of quantised forms.
    pub(super) constants: Option<Buffer>,
}

/// What becomes of products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// They fill f32 rows.
    Store,
    /// They are added to f32 rows.
    Add,
    /// Outputs are eight gates and eight ups in turn; `silu(gate) * up` fills rows on their way into the next layer.
    Gate,
}

/// A product that a library computes: `out = x · weightsᵀ`, or `out += …`, added up in f32.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Element type of `weights` and `x`: f16 or bf16.
    pub precision: Precision,
    /// Address of weights `[outputs, inputs]`, row by row without gaps; a multiple of 16.
    pub weights: u64,
    /// Address of `[rows, inputs]`, `x_stride` elements from row to row.
    pub x: u64,
    /// Address of f32 `[rows, outputs]`, `out_stride` elements from row to row.
    pub out: u64,
    /// Columns of `out`.
    pub outputs: usize,
    /// Columns of `weights` and `x`: a multiple of 128, those past a layer's own are zero.
    pub inputs: usize,
    /// Rows.
    pub rows: usize,
    /// Elements from row to row.
    pub x_stride: usize,
    /// Elements from row to row.
    pub out_stride: usize,
    /// Whether products are added to what is there.
    pub add: bool,
}

/// A library of matrix products, which queues them in the order of the calls of the backend's device. With one, a row's bits depend on which rows
/// are in the call with it (ADR 17).
pub trait Products: Send + Sync + std::fmt::Debug {
    /// Queues a product.
    fn multiply(&self, product: &Product) -> Result<(), Error>;
}

/// Elements of a row that so many outputs fill.
fn written(outputs: usize, then: Then) -> usize {
    if then == Then::Gate { outputs.div_ceil(2) } else { outputs }
}

impl Linear {
    /// Groups of inputs.
    pub(super) fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        self.weights.bytes() + self.constants.as_ref().map_or(0, Buffer::bytes)
    }

    fn constants(&self) -> u64 {
        self.constants.as_ref().map_or(0, Buffer::address)
    }

    /// Rows up to which weights are multiplied as they are read.
    fn few_rows(&self) -> usize {
        match self.form {
            Form::F32 => usize::MAX,
            Form::Plain => FEW_PLAIN_ROWS,
            Form::Bytes | Form::Nibbles => FEW_QUANTISED_ROWS,
        }
    }

    /// Outputs that are made plain at once.
    fn panel_outputs(&self) -> usize {
        let rows = PANEL_BYTES / (self.groups() * GROUP * 2);
        (rows / TILE_OUTPUTS * TILE_OUTPUTS).max(TILE_OUTPUTS)
    }

    /// Bytes that products of `rows` rows need beside the weights.
    pub(super) fn expanded_bytes(&self, rows: usize) -> usize {
        let quantised = matches!(self.form, Form::Bytes | Form::Nibbles);
        match quantised && rows > self.few_rows() {
            true => self.panel_outputs().min(self.outputs) * self.groups() * GROUP * 2,
            false => 0,
        }
    }
}

impl Compute {
    /// Whether products become gates in the kernel that multiplies.
    pub(super) fn gates_itself(&self, linear: &Linear, rows: usize) -> bool {
        linear.form != Form::F32 && (self.products.is_none() || rows <= linear.few_rows())
    }

    /// Multiplies rows: f32 rows of `inputs` elements with weights of [`Form::F32`], else rows in the backend's precision.
    /// `expanded` has [`Linear::expanded_bytes`].
    pub(super) fn multiply(
        &self,
        linear: &Linear,
        x: At<'_>,
        rows: usize,
        out: At<'_>,
        then: Then,
        expanded: &Buffer,
    ) -> Result<(), Error> {
        if linear.form == Form::F32 {
            return self.multiply_f32(linear, x, rows, out, then);
        }
        if rows <= linear.few_rows() {
            return self.multiply_few(linear, x, rows, out, then);
        }
        if linear.form == Form::Plain {
            return self.multiply_many(
                linear.weights.whole(),
                linear,
                linear.outputs,
                (x, rows),
                (out, then),
            );
        }
        let panel = linear.panel_outputs();
        assert!(expanded.bytes() >= linear.expanded_bytes(rows), "there is room for a panel");
        for first in (0..linear.outputs).step_by(panel) {
            let outputs = panel.min(linear.outputs - first);
            self.expand(linear, first, outputs, expanded)?;
            let column = if then == Then::Gate { first / 2 } else { first };
            self.multiply_many(expanded.whole(), linear, outputs, (x, rows), (out.column(column), then))?;
        }
        Ok(())
    }

    fn multiply_f32(
        &self,
        linear: &Linear,
        x: At<'_>,
        rows: usize,
        out: At<'_>,
        then: Then,
    ) -> Result<(), Error> {
        assert!(then != Then::Gate && x.stride == linear.inputs, "f32 rows have no gaps, and no gates");
        let argument = FloatParams {
            weights: linear.weights.whole().for_kernel(
                "weights",
                &[linear.outputs, linear.inputs],
                size_of::<f32>(),
            )?,
            x: x.rows("x", rows, linear.inputs)?,
            out: out.rows("out", rows, linear.outputs)?,
            outputs: number(linear.outputs, "outputs")?,
            rows: number(rows, "rows")?,
            inputs: number(linear.inputs, "inputs")?,
            out_stride: number(out.stride, "out_stride")?,
            then: then as u32,
            reserved: 0,
        };
        let grid = [linear.outputs.div_ceil(FLOAT_TILE), rows.div_ceil(FLOAT_TILE), 1];
        let shared = 2 * FLOAT_INPUTS * (FLOAT_TILE + 1) * size_of::<f32>();
        self.launch(&self.programs.multiply_f32, grid, 256, shared, &argument)
    }

    fn params(
        weights: u64,
        linear: &Linear,
        outputs: usize,
        (x, rows): (At<'_>, usize),
        (out, then): (At<'_>, Then),
    ) -> Result<LinearParams, Error> {
        Ok(LinearParams {
            weights,
            constants: linear.constants(),
            x: x.rows("x", rows, linear.groups() * GROUP)?,
            out: out.rows("out", rows, written(outputs, then))?,
            outputs: number(outputs, "outputs")?,
            rows: number(rows, "rows")?,
            groups: number(linear.groups(), "inputs")?,
            chunks: linear.groups().min(CHUNKS) as u32,
            x_stride: number(x.stride, "x_stride")?,
            out_stride: number(out.stride, "out_stride")?,
            then: then as u32,
            reserved: 0,
        })
    }

    fn multiply_few(
        &self,
        linear: &Linear,
        x: At<'_>,
        rows: usize,
        out: At<'_>,
        then: Then,
    ) -> Result<(), Error> {
        let argument =
            Self::params(linear.weights.address(), linear, linear.outputs, (x, rows), (out, then))?;
        let wide = usize::from(rows > 8 * FEW_TILES[0]);
        let block_rows = 8 * FEW_TILES[wide];
        let shared = CHUNKS * block_rows * 16 * size_of::<f32>();
        let grid = [linear.outputs.div_ceil(16), rows.div_ceil(block_rows), 1];
        let kernel = &self.programs.form(linear.form).few[wide];
        self.launch(kernel, grid, 32 * CHUNKS as u32, shared, &argument)
    }

    fn multiply_many(
        &self,
        weights: Span<'_>,
        linear: &Linear,
        outputs: usize,
        (x, rows): (At<'_>, usize),
        (out, then): (At<'_>, Then),
    ) -> Result<(), Error> {
        // Of 16 bits each.
        let weights = weights.for_kernel("weights", &[outputs, linear.groups() * GROUP], 2)?;
        if let Some(products) = &self.products {
            assert!(then != Then::Gate, "a library gates nothing");
            let product = Product {
                precision: self.precision,
                weights,
                x: x.rows("x", rows, linear.groups() * GROUP)?,
                out: out.rows("out", rows, outputs)?,
                outputs,
                inputs: linear.groups() * GROUP,
                rows,
                x_stride: x.stride,
                out_stride: out.stride,
                add: then == Then::Add,
            };
            return products.multiply(&product);
        }
        let argument = Self::params(weights, linear, outputs, (x, rows), (out, then))?;
        let wide = usize::from(rows > MANY_ROWS[0]);
        let shared = STAGES * (TILE_OUTPUTS + MANY_ROWS[wide]) * 128;
        let grid = [rows.div_ceil(MANY_ROWS[wide]), outputs.div_ceil(TILE_OUTPUTS), 1];
        self.launch(&self.programs.many()[wide], grid, 256, shared, &argument)
    }

    /// Makes `outputs` rows of quantised weights plain.
    fn expand(&self, linear: &Linear, first: usize, outputs: usize, to: &Buffer) -> Result<(), Error> {
        let to = to.whole().for_kernel("expanded", &[outputs, linear.groups() * GROUP], 2)?;
        let argument = Self::table(linear, 0, to, outputs, first)?;
        self.launch(&self.programs.form(linear.form).expand, [outputs, 1, 1], 128, 0, &argument)
    }

    /// Rows of the weights as f32 `[rows, inputs]`; `tokens` holds u32 `[rows]`.
    pub(super) fn look_up(
        &self,
        linear: &Linear,
        tokens: &Buffer,
        rows: usize,
        out: At<'_>,
    ) -> Result<(), Error> {
        if linear.form == Form::F32 {
            let from = super::rows::RowsIn {
                x: At::f32(linear.weights.whole(), linear.inputs),
                width: linear.inputs,
                chosen: Some(tokens.whole()),
            };
            return self.copy(from, rows, out);
        }
        let tokens = tokens.whole().for_kernel("tokens", &[rows], size_of::<u32>())?;
        let argument = Self::table(linear, tokens, out.rows("out", rows, linear.inputs)?, rows, 0)?;
        self.launch(&self.programs.form(linear.form).embed, [rows, 1, 1], 128, 0, &argument)
    }

    fn table(
        linear: &Linear,
        tokens: u64,
        out: u64,
        rows: usize,
        first: usize,
    ) -> Result<TableParams, Error> {
        Ok(TableParams {
            weights: linear.weights.address(),
            constants: linear.constants(),
            tokens,
            out,
            rows: number(rows, "rows")?,
            width: number(linear.inputs, "inputs")?,
            groups: number(linear.groups(), "inputs")?,
            first: number(first, "outputs")?,
        })
    }
}
