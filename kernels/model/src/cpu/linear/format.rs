//! What the kernels need to know of a quantised type, at compile time.
//!
//! Every type becomes unsigned quants `u` with a zero point `z` that is a power of two or absent, a scale, and perhaps a
//! minimum: the weight is `scale * (u - z)`, or `scale * u + minimum`.

use bytemuck::Pod;
use half::f16;
use longshore_compute::SlabArray;

use super::kernel::Loads;
use super::panels::{PANEL, Scales};
use crate::files::TensorType;

/// What the second number of an output and group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Second {
    /// There is none.
    Absent,
    /// Added to every weight of the group.
    Minimum,
    /// The scale of the upper 16 inputs; the first is that of the lower ones.
    UpperScale,
}

/// A quantised type.
pub(super) trait Format {
    /// Stored type of scales and minimums.
    type Element: ScaleElement + Loads;
    /// Two quants share a byte: the low nibbles are inputs 0 to 15 of a group, the high ones 16 to 31.
    const NIBBLES: bool;
    /// Logarithm of the zero point, where there is one.
    const ZERO_SHIFT: Option<u32>;
    /// The second number.
    const SECOND: Second;
    /// Quants take all eight bits, so that 16-bit sums of two products could overflow.
    const WIDE: bool;
    /// Lanes of a panel and group.
    const LANES: usize = if Self::NIBBLES { 4 } else { 8 };
    /// Numbers of an output and group.
    const NUMBERS: usize = if matches!(Self::SECOND, Second::Absent) { 1 } else { 2 };
}

/// Scales and minimums of 16 outputs in their stored type.
pub(super) trait ScaleElement: Pod + Default + Send + Sync + 'static {
    /// Exact for numbers that came from a file of this element.
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// The numbers of a matrix of this element.
    fn view(scales: &Scales) -> &[[Self; PANEL]];
    fn wrap(scales: SlabArray<[Self; PANEL]>) -> Scales;
}

impl ScaleElement for f16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    fn view(scales: &Scales) -> &[[Self; PANEL]] {
        match scales {
            Scales::Half(scales) => scales,
            Scales::Single(_) => unreachable!("the format fixes the element"),
        }
    }

    fn wrap(scales: SlabArray<[Self; PANEL]>) -> Scales {
        Scales::Half(scales)
    }
}

impl ScaleElement for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }

    fn view(scales: &Scales) -> &[[Self; PANEL]] {
        match scales {
            Scales::Single(scales) => scales,
            Scales::Half(_) => unreachable!("the format fixes the element"),
        }
    }

    fn wrap(scales: SlabArray<[Self; PANEL]>) -> Scales {
        Scales::Single(scales)
    }
}

macro_rules! formats {
    ($($name:ident: $element:ty, nibbles $nibbles:literal, zero $zero:expr, $second:ident, wide $wide:literal;)*) => {$(
        #[doc = concat!("`", stringify!($name), "` of GGUF files.")]
        pub(super) struct $name;
        impl Format for $name {
            type Element = $element;
            const NIBBLES: bool = $nibbles;
            const ZERO_SHIFT: Option<u32> = $zero;
            const SECOND: Second = Second::$second;
            const WIDE: bool = $wide;
        }
    )*};
}

formats! {
    Q4_0: f16, nibbles true, zero Some(3), Absent, wide false;
    Q4_1: f16, nibbles true, zero None, Minimum, wide false;
    Q4K: f32, nibbles true, zero None, Minimum, wide false;
    Q5_0: f16, nibbles false, zero Some(4), Absent, wide false;
    Q5_1: f16, nibbles false, zero None, Minimum, wide false;
    Q5K: f32, nibbles false, zero None, Minimum, wide false;
    Q6K: f32, nibbles false, zero Some(5), UpperScale, wide false;
    Q8_0: f16, nibbles false, zero Some(7), Absent, wide true;
}

/// Runs `$body` with `$format` standing for the format of a quantised [`TensorType`].
macro_rules! with_format {
    ($kind:expr, $format:ident => $body:expr) => {{
        use $crate::cpu::linear::format;
        use $crate::files::TensorType;
        match $kind {
            TensorType::Q4_0 => with_format!(@ format::Q4_0, $format, $body),
            TensorType::Q4_1 => with_format!(@ format::Q4_1, $format, $body),
            TensorType::Q4K => with_format!(@ format::Q4K, $format, $body),
            TensorType::Q5_0 => with_format!(@ format::Q5_0, $format, $body),
            TensorType::Q5_1 => with_format!(@ format::Q5_1, $format, $body),
            TensorType::Q5K => with_format!(@ format::Q5K, $format, $body),
            TensorType::Q6K => with_format!(@ format::Q6K, $format, $body),
            TensorType::Q8_0 => with_format!(@ format::Q8_0, $format, $body),
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => {
                unreachable!("floating-point weights have panels of their own")
            }
        }
    }};
    (@ $type:path, $format:ident, $body:expr) => {{
        type $format = $type;
        $body
    }};
}
pub(super) use with_format;

/// Whether weights of the type are quantised.
pub(super) fn is_quantised(kind: TensorType) -> bool {
    !matches!(kind, TensorType::F32 | TensorType::F16 | TensorType::Bf16)
}
