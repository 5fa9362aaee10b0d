//! Pages: tiles on the device. Their layout, their way from and to the layout in which tiles travel, narrower elements, checksums, summaries.

mod append;
mod checksum;
mod layout;
mod means;
mod page;
mod quantise;

use crate::Kernel;

pub use append::{AppendCall, RowAppender};
pub use checksum::Checksums;
pub use layout::PageTranscoder;
pub use means::{MeanBuilder, MeanOutputs};
pub use page::{PageElement, PageShape, page_of, tile_of};
pub use quantise::PageQuantiser;

/// Kernels of pages.
pub(crate) fn kernels() -> Vec<Kernel> {
    let moves = [append::all_kernels(), layout::all_kernels(), quantise::all_kernels()];
    [moves.concat(), vec![checksum::kernel()], means::all_kernels()].concat()
}
