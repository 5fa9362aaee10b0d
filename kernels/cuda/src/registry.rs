//! Every kernel that the host code can ask for, and what each may take of a multiprocessor. The one place where kernels are
//! listed: a test compiles all of them for every architecture and holds them to their budget.

use std::collections::HashSet;

use crate::{Kernel, attend, model, rates, select, tile};

/// What a kernel may take at most, whatever its constants and the architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Its entry.
    pub entry: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Whether it must have just so many: its thread blocks share out what they have by `setmaxnreg`, and with fewer they would wait for
    /// ever.
    pub exactly: bool,
}

impl Budget {
    /// What is wrong with so many registers of a thread; `None`: nothing.
    pub fn refuses(&self, registers: u32) -> Option<String> {
        let Self { registers: budget, exactly, .. } = *self;
        match exactly {
            true if registers != budget => Some(format!(
                "has {registers} registers a thread, must have {budget}: with others it would hang the device"
            )),
            false if registers > budget => {
                Some(format!("takes {registers} registers, its budget is {budget}"))
            }
            _ => None,
        }
    }
}

const fn budget(entry: &'static str, registers: u32) -> Budget {
    Budget { entry, registers, exactly: false }
}

const fn exactly(entry: &'static str, registers: u32) -> Budget {
    Budget { entry, registers, exactly: true }
}

/// The registers that code for `entry` must have; `None`: it may have any number.
pub(crate) fn exact_budget(entry: &str) -> Option<&'static Budget> {
    BUDGETS.iter().find(|budget| budget.exactly && budget.entry == entry)
}

/// Budgets by entry. No kernel may spill a register or keep an array in local memory, and none has static shared memory: that
/// needs no table.
pub const BUDGETS: &[Budget] = &[
    budget("append_rows", 64),
    budget("attend_decode", 255),
    budget("attend_prefill", 255),
    exactly("attend_prefill_wgmma", 168),
    budget("attend_scalar", 160),
    budget("block_means", 64),
    budget("checksum_tiles", 64),
    budget("choose_candidates", 64),
    budget("choose_logits", 64),
    budget("clear_words", 64),
    budget("copy_rows", 64),
    budget("copy_words", 64),
    budget("count_visits", 64),
    budget("embed", 64),
    budget("expand", 64),
    budget("expand_blocks", 64),
    budget("expand_pages", 64),
    budget("expand_visits", 64),
    budget("merge_partials", 128),
    budget("multiply_bf16", 64),
    budget("multiply_f32", 96),
    budget("multiply_few", 128),
    budget("multiply_many", 208),
    budget("narrow_rows", 64),
    budget("norm_rows", 64),
    budget("panels_to_rows", 64),
    budget("place_items", 64),
    budget("quantise_pages", 64),
    budget("read_words", 64),
    budget("rows_to_panels", 64),
    budget("scan_counts", 64),
    budget("score_blocks", 255),
    budget("score_pages", 64),
    budget("select_blocks", 64),
    budget("shape_heads", 64),
    budget("swiglu_rows", 64),
];

/// Every kernel, with every combination of constants that is launched on a device of some compute capability.
pub fn kernels_for(capability: u32) -> Vec<Kernel> {
    let modules: &[fn() -> Vec<Kernel>] = &[model::kernels, rates::kernels, select::kernels, tile::kernels];
    let others = modules.iter().flat_map(|kernels| kernels());
    attend::kernels(capability).into_iter().chain(others).collect()
}

/// Every kernel, of devices of any compute capability.
pub fn kernels() -> Vec<Kernel> {
    let mut seen = HashSet::new();
    let all = [80, 86, 90, 100].into_iter().flat_map(kernels_for);
    all.filter(|kernel| seen.insert(kernel.clone())).collect()
}
