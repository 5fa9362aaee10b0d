//! One panel over one block of rows, on every instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod loads;
mod portable;

use longshore_compute::InstructionSet;

use super::floats::{FloatPanels, Stored};
use super::format::{Format, with_format};
use super::input::{BLOCK_ROWS, Planes};
use super::panels::{PANEL, QuantPanels};

#[cfg(target_arch = "x86_64")]
pub(super) use loads::Loads;

/// Stored elements that vectors can be loaded from; all of them, without vectors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) trait Loads {}
#[cfg(not(target_arch = "x86_64"))]
impl<T> Loads for T {}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::quantise as quantise_avx512;

/// Outputs of one panel for the rows of a block.
pub(super) type Sums = [[f32; PANEL]; BLOCK_ROWS];

/// Runs `$function::<$generic, size>` for a block size.
#[cfg(target_arch = "x86_64")]
macro_rules! sized {
    ($size:expr, [$($n:literal),*], $function:ident::<$generic:ty>, $arguments:tt) => {
        match $size {
            $($n => $function::<$generic, $n> $arguments,)*
            other => unreachable!("no kernel takes blocks of {other} rows"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use sized;

/// Multiplies a panel of quantised weights with `x`; fills the first `size` rows of `sums`.
pub(super) fn quantised(
    set: InstructionSet,
    panels: &QuantPanels,
    panel: usize,
    x: Planes<'_>,
    size: usize,
    sums: &mut Sums,
) {
    with_format!(panels.kind, F => quantised_as::<F>(set, panels, panel, x, size, sums));
}

fn quantised_as<F: Format>(
    set: InstructionSet,
    panels: &QuantPanels,
    panel: usize,
    x: Planes<'_>,
    size: usize,
    sums: &mut Sums,
) {
    let panel = panels.panel::<F>(panel);
    match set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => avx2::quantised(panel, x, size, sums),
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => avx512::quantised(panel, x, size, sums),
        _ => portable::quantised(&panel, x, size, sums),
    }
}

/// Multiplies one or two panels of floating-point weights with `x` `[inputs][size]`.
pub(super) fn floats<E: Stored>(
    set: InstructionSet,
    panels: &FloatPanels<E>,
    first: usize,
    x: &[f32],
    size: usize,
    sums: &mut [Sums],
) {
    match (set, sums) {
        #[cfg(target_arch = "x86_64")]
        (InstructionSet::Avx512, [a, b]) => {
            avx512::two_float_panels([panels.panel(first), panels.panel(first + 1)], x, size, [a, b]);
        }
        (_, sums) => {
            for (i, sums) in sums.iter_mut().enumerate() {
                let panel = panels.panel(first + i);
                match set {
                    #[cfg(target_arch = "x86_64")]
                    InstructionSet::Avx512 => avx512::float_panel(panel, x, size, sums),
                    #[cfg(target_arch = "x86_64")]
                    InstructionSet::Avx2 => avx2::float_panel(panel, x, size, sums),
                    _ => portable::float_panel(panel, x, size, sums),
                }
            }
        }
    }
}
