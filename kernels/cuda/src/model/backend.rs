//! The backend itself: which rows go where.

use std::sync::Arc;

use longshore_model::{
    Activations, Backend, KeptQkv, LoadProgress, ModelConfig, Qkv, RowLogits, RowsRead, WantedRow, Weights,
};

use super::activations::KeptRows;
use super::choose::CANDIDATES;
use super::compute::At;
use super::heads::{Append, To};
use super::linear::{Linear, Then};
use super::load::{Layer, Loaded, ModelOptions, load};
use super::programs::{Form, Precision};
use super::rotations::Rotations;
use super::rows::RowsIn;
use super::scratch::{Scratch, ScratchPool, Widths};
use super::{failed, invalid};
use crate::{Buffer, Device, Error};

/// Rows whose logits are computed together: bounds their memory.
const LOGIT_ROWS: usize = 32;

type Result<T> = std::result::Result<T, longshore_model::Error>;

/// A decoder on a device.
#[derive(Debug)]
pub struct CudaBackend {
    config: ModelConfig,
    model: Loaded,
    scratch: ScratchPool,
    rotations: Rotations,
}

impl CudaBackend {
    /// Brings all weights to the device; `progress` counts their bytes in the files. Nothing of the files stays in host memory. A device
    /// without room is an error of kind `Exhausted` that says what the model needs.
    pub fn load(
        device: Arc<dyn Device>,
        config: ModelConfig,
        weights: &Weights,
        options: &ModelOptions,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self> {
        let model = load(device, &config, weights, options, progress)?;
        let widths = widths(&config, model.compute.precision);
        let expanded = |rows| matrices(&model).map(|linear| linear.expanded_bytes(rows)).max().unwrap_or(0);
        let scratch = ScratchPool::new(options.pass_rows.max(LOGIT_ROWS), widths, expanded);
        Ok(Self { config, model, scratch, rotations: Rotations::default() })
    }

    /// Bytes on the device that [`Self::load`] is going to need, scratch and rows not counted.
    pub fn expected_bytes(config: &ModelConfig, weights: &Weights, options: &ModelOptions) -> Result<u64> {
        super::load::expected_bytes(config, weights, options)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.model.compute.device
    }

    /// What linear layers compute in.
    pub fn precision(&self) -> Precision {
        self.model.compute.precision
    }

    /// What linear layers compute in and how weights are kept, for example `f16; 210 x 4 bits, 1 x 8 bits`.
    pub fn linear_description(&self) -> String {
        let count = |form| matrices(&self.model).filter(|linear| linear.form == form).count();
        let kinds = [
            (Form::F32, "f32"),
            (Form::Plain, "16 bits"),
            (Form::Bytes, "8 bits"),
            (Form::Nibbles, "4 bits"),
        ];
        let kinds = kinds.map(|(form, name)| (count(form), name)).into_iter().filter(|(count, _)| *count > 0);
        let kinds: Vec<String> = kinds.map(|(count, name)| format!("{count} x {name}")).collect();
        format!("{}; {}", self.precision().name(), kinds.join(", "))
    }

    /// [`Backend::qkv_kept`], the keys and values going straight to pages; gives the queries, f32 `[rows, query_heads * head_dim]`.
    pub fn qkv_append(
        &self,
        layer: usize,
        x: &Activations,
        positions: &[u64],
        append: &Append<'_>,
    ) -> Result<Activations> {
        append.check(&self.config, x.rows())?;
        let layer = self.layer(layer)?;
        self.check_rows(x, positions)?;
        let (q_width, _) = self.head_widths();
        let q = KeptRows::new(&self.model.compute, x.rows(), q_width).map_err(failed)?;
        let to = |first| To::Pages { append, first };
        let x = self.on_device(x)?;
        self.project(layer, &x, positions, q.at(), &to).map_err(failed)?;
        Ok(q.activations())
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        let count = self.model.layers.len();
        self.model
            .layers
            .get(layer)
            .ok_or_else(|| invalid("layer", format!("is {layer}, the model has {count}")))
    }

    fn check_width(&self, x: &Activations) -> Result<()> {
        let (found, hidden) = (x.width(), self.config.hidden);
        if found == hidden {
            return Ok(());
        }
        Err(invalid("x", format!("has rows of {found} elements, must have {hidden}")))
    }

    fn check_rows(&self, x: &Activations, positions: &[u64]) -> Result<()> {
        self.check_width(x)?;
        if positions.len() == x.rows() {
            return Ok(());
        }
        Err(invalid("positions", format!("has {} elements for {} rows", positions.len(), x.rows())))
    }

    /// Elements of a row of queries, and of keys or values.
    fn head_widths(&self) -> (usize, usize) {
        let heads = self.config.heads;
        (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim)
    }

    /// Rows of `x`, where they are on this device.
    fn kept<'a>(&self, x: &'a Activations) -> Option<&'a KeptRows> {
        KeptRows::of(x).filter(|kept| kept.is_on(&self.model.compute))
    }

    /// Rows on this device: those of `x`, or a copy of them.
    fn on_device<'a>(&self, x: &'a Activations) -> Result<Held<'a>> {
        if let Some(kept) = self.kept(x) {
            return Ok(Held::Kept(kept));
        }
        let copy = KeptRows::from_slice(&self.model.compute, x.width(), &x.to_host()?).map_err(failed)?;
        Ok(Held::Copied(copy))
    }

    /// Queries, keys and values of all rows, some rows at a time; `to(first)` says where keys and values from row `first` on go.
    fn project<'a>(
        &self,
        layer: &Layer,
        x: &KeptRows,
        positions: &[u64],
        q: At<'_>,
        to: &dyn Fn(usize) -> To<'a>,
    ) -> std::result::Result<(), Error> {
        let (compute, config) = (&self.model.compute, &self.config);
        let (q_width, kv_width) = self.head_widths();
        let width = q_width + 2 * kv_width;
        let rotations = self.rotations.at(compute, &self.model.rope, positions)?;
        for first in (0..x.rows()).step_by(self.scratch.pass_rows) {
            let rows = self.scratch.pass_rows.min(x.rows() - first);
            let scratch = self.scratch.take(compute, rows)?;
            let input = scratch.input(compute, config.hidden);
            let from = RowsIn::all(x.at().skip(first), config.hidden);
            compute.norm(from, rows, &layer.attn_norm, config.norm_eps, input)?;
            let product = At::f32(scratch.product.whole(), width);
            for part in &layer.qkv {
                let out = product.column(part.first);
                compute.multiply(&part.linear, input, rows, out, Then::Store, &scratch.expanded)?;
            }
            let table = rotations.whole().after(first * config.rope.dim * size_of::<f32>());
            compute.shape_heads(config, &layer.heads, (product, rows), table, q.skip(first), to(first))?;
        }
        Ok(())
    }

    /// Everything after attention, in place: f32 rows of the residual stream and of attention.
    fn finish_rows(
        &self,
        layer: &Layer,
        x: &KeptRows,
        attention: &KeptRows,
    ) -> std::result::Result<(), Error> {
        for first in (0..x.rows()).step_by(self.scratch.pass_rows) {
            let rows = self.scratch.pass_rows.min(x.rows() - first);
            let scratch = self.scratch.take(&self.model.compute, rows)?;
            self.finish_pass(layer, (x.at().skip(first), attention.at().skip(first)), rows, &scratch)?;
        }
        Ok(())
    }

    fn finish_pass(
        &self,
        layer: &Layer,
        (x, attention): (At<'_>, At<'_>),
        rows: usize,
        scratch: &Scratch,
    ) -> std::result::Result<(), Error> {
        let (compute, config, expanded) = (&self.model.compute, &self.config, &scratch.expanded);
        let mut input = attention;
        if compute.precision != Precision::F32 {
            input = scratch.input(compute, attention.stride);
            compute.narrow(RowsIn::all(attention, attention.stride), rows, input)?;
        }
        compute.multiply(&layer.attn_out, input, rows, x, Then::Add, expanded)?;
        let input = scratch.input(compute, config.hidden);
        compute.norm(RowsIn::all(x, config.hidden), rows, &layer.ffn_norm, config.norm_eps, input)?;
        let gated = scratch.gated(compute, config.ffn);
        if compute.gates_itself(&layer.gate_up, rows) {
            compute.multiply(&layer.gate_up, input, rows, gated, Then::Gate, expanded)?;
        } else {
            let product = At::f32(scratch.product.whole(), layer.gate_up.outputs);
            compute.multiply(&layer.gate_up, input, rows, product, Then::Store, expanded)?;
            compute.swiglu(RowsIn::all(product, config.ffn), rows, gated)?;
        }
        compute.multiply(&layer.down, gated, rows, x, Then::Add, expanded)
    }

    /// Calls `take` with some of `rows` at a time and their logits, f32 `[…, vocabulary]`.
    fn for_logits(
        &self,
        x: &Activations,
        rows: &[usize],
        mut take: impl FnMut(&[usize], &Buffer) -> Result<()>,
    ) -> Result<()> {
        self.check_width(x)?;
        if let Some(i) = rows.iter().position(|row| *row >= x.rows()) {
            return Err(invalid(
                &format!("rows[{i}]"),
                format!("is {}, there are {} rows", rows[i], x.rows()),
            ));
        }
        let x = self.on_device(x)?;
        for rows in rows.chunks(LOGIT_ROWS) {
            let logits = self.logits_of(&x, rows).map_err(failed)?;
            take(rows, &logits)?;
        }
        Ok(())
    }

    /// Of each row its likeliest tokens where these are enough, all its logits elsewhere, and also where the device has no room to choose
    /// (16.5 MB for 1,024 tokens of each of 32 rows): the logits are there already. In the order of `wanted`.
    fn choose(&self, wanted: &[WantedRow], logits: &Buffer) -> Result<Vec<RowLogits>> {
        let vocabulary = self.config.vocabulary;
        let most = CANDIDATES.min(vocabulary);
        let kept = |wanted: &WantedRow| wanted.candidates.filter(|count| *count <= most);
        let chosen = match wanted.iter().filter_map(kept).max() {
            // The launches go over all rows: they are few, and what is not wanted costs no copy.
            Some(keep) => {
                match self.model.compute.choose(logits.whole(), wanted.len(), vocabulary, keep.max(1)) {
                    Err(Error::OutOfMemory { .. }) => Vec::new(),
                    chosen => chosen.map_err(failed)?,
                }
            }
            None => Vec::new(),
        };
        let row = |(place, row): (usize, &WantedRow)| match (kept(row), chosen.get(place)) {
            (Some(_), Some(Ok(likeliest))) => Ok(RowLogits::Likeliest(likeliest.clone())),
            _ => {
                let mut all = vec![0.0; vocabulary];
                let bytes = vocabulary * size_of::<f32>();
                logits.span(place * bytes, bytes).and_then(|span| span.read(&mut all)).map_err(failed)?;
                Ok(RowLogits::All(all))
            }
        };
        wanted.iter().enumerate().map(row).collect()
    }

    fn logits_of(&self, x: &KeptRows, rows: &[usize]) -> std::result::Result<Buffer, Error> {
        let (compute, config) = (&self.model.compute, &self.config);
        let chosen: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let chosen = Buffer::from_slice(&compute.device, &chosen)?;
        let logits = Buffer::new(&compute.device, rows.len() * config.vocabulary * size_of::<f32>())?;
        let scratch = self.scratch.take(compute, rows.len())?;
        let input = scratch.input(compute, config.hidden);
        let from = RowsIn { x: x.at(), width: config.hidden, chosen: Some(chosen.whole()) };
        compute.norm(from, rows.len(), &self.model.output_norm, config.norm_eps, input)?;
        let output = self.model.output.as_ref().unwrap_or(&self.model.embedding);
        let out = At::f32(logits.whole(), config.vocabulary);
        compute.multiply(output, input, rows.len(), out, Then::Store, &scratch.expanded)?;
        Ok(logits)
    }
}

/// Rows on the device, of the caller's or our own.
enum Held<'a> {
    Kept(&'a KeptRows),
    Copied(KeptRows),
}

impl std::ops::Deref for Held<'_> {
    type Target = KeptRows;

    fn deref(&self) -> &KeptRows {
        match self {
            Self::Kept(rows) => rows,
            Self::Copied(rows) => rows,
        }
    }
}

fn matrices(model: &Loaded) -> impl Iterator<Item = &Linear> {
    let tables = [&model.embedding].into_iter().chain(&model.output);
    tables.chain(model.layers.iter().flat_map(Layer::matrices))
}

fn widths(config: &ModelConfig, precision: Precision) -> Widths {
    let heads = config.heads;
    let q_width = heads.query_heads() * heads.head_dim;
    let qkv_width = q_width + 2 * heads.kv_heads * heads.head_dim;
    Widths {
        input: precision.stride(config.hidden).max(precision.stride(q_width)),
        gated: precision.stride(config.ffn),
        product: qkv_width.max(2 * config.ffn.next_multiple_of(8)),
    }
}

impl Backend for CudaBackend {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn memory_bytes(&self) -> u64 {
        matrices(&self.model).map(|linear| linear.bytes() as u64).sum()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Activations> {
        let vocabulary = self.config.vocabulary;
        if let Some(i) = tokens.iter().position(|token| *token as usize >= vocabulary) {
            let problem = format!("is {}, the vocabulary has {vocabulary} entries", tokens[i]);
            return Err(invalid(&format!("tokens[{i}]"), problem));
        }
        let compute = &self.model.compute;
        let x = KeptRows::new(compute, tokens.len(), self.config.hidden).map_err(failed)?;
        let ids = Buffer::from_slice(&compute.device, tokens).map_err(failed)?;
        compute.look_up(&self.model.embedding, &ids, tokens.len(), x.at()).map_err(failed)?;
        Ok(x.activations())
    }

    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv> {
        let KeptQkv { q, k, v } = self.qkv_kept(layer, x, positions)?;
        let (q, k, v) = (q.begin_read()?, k.begin_read()?, v.begin_read()?);
        // The last one is waited for; then the others are there.
        let (k, v) = RowsRead::finish_both(k, v)?;
        Ok(Qkv { q: q.finish()?, k, v })
    }

    fn finish(&self, layer: usize, x: Activations, attention: &[f32]) -> Result<Activations> {
        let (q_width, _) = self.head_widths();
        if attention.len() != x.rows() * q_width {
            self.layer(layer)?;
            self.check_width(&x)?;
            let problem = format!("has {} elements for {} rows of {q_width}", attention.len(), x.rows());
            return Err(invalid("attention", problem));
        }
        let attention = KeptRows::from_slice(&self.model.compute, q_width, attention).map_err(failed)?;
        self.finish_kept(layer, x, &attention.activations())
    }

    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; rows.len() * self.config.vocabulary];
        let mut rest = &mut all[..];
        self.for_logits(x, rows, |rows, logits| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(rows.len() * self.config.vocabulary);
            rest = after;
            logits.span(0, size_of_val(part)).and_then(|span| span.read(part)).map_err(failed)
        })?;
        Ok(all)
    }

    fn candidates(&self, x: &Activations, wanted: &[WantedRow]) -> Result<Vec<RowLogits>> {
        let rows: Vec<usize> = wanted.iter().map(|wanted| wanted.row).collect();
        let mut all = Vec::with_capacity(rows.len());
        self.for_logits(x, &rows, |rows, logits| {
            all.extend(self.choose(&wanted[all.len()..][..rows.len()], logits)?);
            Ok(())
        })?;
        Ok(all)
    }

    fn qkv_kept(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<KeptQkv> {
        let layer = self.layer(layer)?;
        self.check_rows(x, positions)?;
        let (q_width, kv_width) = self.head_widths();
        let rows = |width| KeptRows::new(&self.model.compute, x.rows(), width).map_err(failed);
        let (q, k, v) = (rows(q_width)?, rows(kv_width)?, rows(kv_width)?);
        let to = |first| To::Rows { k: k.at().skip(first), v: v.at().skip(first) };
        let x = self.on_device(x)?;
        self.project(layer, &x, positions, q.at(), &to).map_err(failed)?;
        Ok(KeptQkv { q: q.activations(), k: k.activations(), v: v.activations() })
    }

    fn finish_kept(&self, layer: usize, x: Activations, attention: &Activations) -> Result<Activations> {
        let layer = self.layer(layer)?;
        self.check_width(&x)?;
        let (q_width, _) = self.head_widths();
        if (attention.rows(), attention.width()) != (x.rows(), q_width) {
            let (rows, width) = (attention.rows(), attention.width());
            let problem = format!("has {rows} rows of {width} elements for {} rows of {q_width}", x.rows());
            return Err(invalid("attention", problem));
        }
        let attention = self.on_device(attention)?;
        // Rows that nobody else holds are changed where they are.
        let alone = x.on_device().is_some_and(|kept| Arc::strong_count(kept) == 1);
        if let (true, Some(kept)) = (alone, self.kept(&x)) {
            self.finish_rows(layer, kept, &attention).map_err(failed)?;
            return Ok(x);
        }
        let copy = match self.on_device(&x)? {
            Held::Kept(kept) => kept.copied(kept.rows(), None).map_err(failed)?,
            Held::Copied(copy) => copy,
        };
        self.finish_rows(layer, &copy, &attention).map_err(failed)?;
        Ok(copy.activations())
    }
}
