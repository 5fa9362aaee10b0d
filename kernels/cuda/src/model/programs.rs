//! Kernels of the forward pass, by what they compute.

use crate::{Kernel, Source};

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../../source/", $name)) }
    };
}

const FEW: Source = source!("linear_few.cu");
const MANY: Source = source!("linear_many.cu");
const FLOAT: Source = source!("linear_f32.cu");
const ROWS: Source = source!("rows.cu");
const HEADS: Source = source!("heads.cu");
const CHOOSE: Source = source!("choose.cu");

/// Element type of weights, and of rows on their way into linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32, one chain of fused multiply-adds for each output: exact, and slow.
    F32,
    /// 11 bits of mantissa, up to 65,504: for f16 and quantised weights.
    F16,
    /// 8 bits of mantissa, the range of f32: for bf16 weights.
    Bf16,
}

impl Precision {
    /// All of them, the most exact first.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// `DTYPE` of the sources.
    pub(super) fn dtype(self) -> i64 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of an element.
    pub(super) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Elements from one row to the next, of rows of `width` elements on their way into a linear layer.
    pub(super) fn stride(self, width: usize) -> usize {
        if self == Self::F32 { width } else { width.next_multiple_of(GROUP) }
    }

    /// Name as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Inputs of a group of packed weights.
pub(super) const GROUP: usize = 128;

/// How weights lie on the device; the packed forms are described in `linear_few.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// f32 `[outputs, inputs]`.
    F32,
    /// 16-bit elements.
    Plain,
    /// 8 bits, two scales for 32 weights.
    Bytes,
    /// 4 bits, a scale and a minimum for 32 weights.
    Nibbles,
}

impl Form {
    const PACKED: [Self; 3] = [Self::Plain, Self::Bytes, Self::Nibbles];

    /// `FORMAT` of the sources.
    fn format(self) -> i64 {
        match self {
            Self::F32 => unreachable!("f32 weights have kernels of their own"),
            Self::Plain => 0,
            Self::Bytes => 1,
            Self::Nibbles => 2,
        }
    }
}

/// Rows of a block of `multiply_few`, in tiles of 8: for up to 8 rows, and for more.
pub(super) const FEW_TILES: [usize; 2] = [1, 4];
/// Rows of a block of `multiply_many`.
pub(super) const MANY_ROWS: [usize; 2] = [64, 128];

/// Kernels that read weights of one form.
#[derive(Debug)]
pub(super) struct FormPrograms {
    /// By [`FEW_TILES`].
    pub(super) few: [Kernel; 2],
    pub(super) embed: Kernel,
    pub(super) expand: Kernel,
}

/// The kernels of a backend.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) norm: Kernel,
    pub(super) narrow: Kernel,
    pub(super) swiglu: Kernel,
    pub(super) copy: Kernel,
    pub(super) clear: Kernel,
    pub(super) multiply_f32: Kernel,
    forms: Option<[FormPrograms; 3]>,
    many: Option<[Kernel; 2]>,
    /// By the type of pages: f32, f16, bf16, int8.
    heads: [Kernel; 4],
    pub(super) choose_logits: Kernel,
    pub(super) choose_candidates: Kernel,
}

fn kernel(source: Source, entry: &'static str, constants: &[(&'static str, i64)]) -> Kernel {
    Kernel { source, entry, constants: constants.to_vec() }
}

fn form_programs(dtype: i64, form: Form) -> FormPrograms {
    let constants = [("DTYPE", dtype), ("FORMAT", form.format())];
    let few = FEW_TILES.map(|tiles| {
        let [dtype, format] = constants;
        kernel(FEW, "multiply_few", &[dtype, format, ("ROW_TILES", tiles as i64)])
    });
    FormPrograms { few, embed: kernel(FEW, "embed", &constants), expand: kernel(FEW, "expand", &constants) }
}

impl Programs {
    pub(super) fn new(precision: Precision) -> Self {
        let dtype = precision.dtype();
        let packed = precision != Precision::F32;
        let rows = |entry| kernel(ROWS, entry, &[("DTYPE", dtype)]);
        Self {
            norm: rows("norm_rows"),
            narrow: rows("narrow_rows"),
            swiglu: rows("swiglu_rows"),
            copy: rows("copy_rows"),
            clear: rows("clear_words"),
            multiply_f32: kernel(FLOAT, "multiply_f32", &[]),
            forms: packed.then(|| Form::PACKED.map(|form| form_programs(dtype, form))),
            many: packed.then(|| {
                let many = |rows| [("DTYPE", dtype), ("TILE_ROWS", rows as i64)];
                MANY_ROWS.map(|rows| kernel(MANY, "multiply_many", &many(rows)))
            }),
            heads: [0, 1, 2, 3].map(|dtype| kernel(HEADS, "shape_heads", &[("DTYPE", dtype)])),
            choose_logits: kernel(CHOOSE, "choose_logits", &[]),
            choose_candidates: kernel(CHOOSE, "choose_candidates", &[]),
        }
    }

    /// Kernels for weights of a packed form.
    pub(super) fn form(&self, form: Form) -> &FormPrograms {
        let forms = self.forms.as_ref().expect("only backends of 16 bits pack weights");
        &forms[form.format() as usize]
    }

    /// By [`MANY_ROWS`].
    pub(super) fn many(&self) -> &[Kernel; 2] {
        self.many.as_ref().expect("only backends of 16 bits pack weights")
    }

    /// For pages of the type with this `DTYPE`.
    pub(super) fn heads(&self, dtype: usize) -> &Kernel {
        &self.heads[dtype]
    }

    fn all(self) -> Vec<Kernel> {
        let Self { norm, narrow, swiglu, copy, clear, multiply_f32, forms, many, heads, .. } = self;
        let mut all = vec![norm, narrow, swiglu, copy, clear, multiply_f32];
        all.extend([self.choose_logits, self.choose_candidates]);
        all.extend(heads);
        all.extend(many.into_iter().flatten());
        for FormPrograms { few, embed, expand } in forms.into_iter().flatten() {
            all.extend(few);
            all.extend([embed, expand]);
        }
        all
    }
}

/// Every kernel of the forward pass, with every combination of constants that is launched.
pub(crate) fn kernels() -> Vec<Kernel> {
    let mut all: Vec<Kernel> = Vec::new();
    for kernel in Precision::ALL.into_iter().flat_map(|precision| Programs::new(precision).all()) {
        if !all.contains(&kernel) {
            all.push(kernel);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart_by_sorted_constants() {
        let all = kernels();
        assert_eq!(all.len(), 15 + 1 + 4 + 2 + 4 + 24, "every combination once");
        for kernel in &all {
            assert!(kernel.constants.is_sorted_by_key(|(name, _)| *name), "{}", kernel.entry);
            assert!(kernel.source.text.contains(&format!("KERNEL({}, ", kernel.entry)), "{}", kernel.entry);
        }
    }
}
