//! What a launch must be like, whatever device it is for.

use crate::{Error, Launch};

/// Threads of a warp.
pub(crate) const WARP: u32 = 32;
/// Most threads of a block.
const THREADS_MAX: u32 = 1024;
/// Most blocks by dimension of the grid.
const GRID_MAX: [u32; 3] = [(1 << 31) - 1, 65_535, 65_535];
/// Bytes of arguments that every supported device takes.
const ARGUMENT_BYTES_MAX: usize = 4096;

/// Refuses a launch that no device would take, or that asks for more than `shared_bytes_limit` bytes of shared memory.
pub fn check(launch: &Launch<'_>, shared_bytes_limit: usize) -> Result<(), Error> {
    let entry = launch.kernel.entry;
    let refuse =
        |field, problem: String| Err(Error::Invalid { field, problem: format!("of `{entry}` {problem}") });
    if launch.threads == 0 || launch.threads > THREADS_MAX || !launch.threads.is_multiple_of(WARP) {
        let problem = format!("is {}, must be a multiple of {WARP} up to {THREADS_MAX}", launch.threads);
        return refuse("threads", problem);
    }
    if launch.grid.iter().zip(GRID_MAX).any(|(&blocks, most)| blocks == 0 || blocks > most) {
        return refuse("grid", format!("is {:?}, must be from 1 to {GRID_MAX:?}", launch.grid));
    }
    if launch.shared_bytes as usize > shared_bytes_limit {
        return refuse(
            "shared_bytes",
            format!("is {}, the device has {shared_bytes_limit}", launch.shared_bytes),
        );
    }
    if launch.argument.len() > ARGUMENT_BYTES_MAX {
        return refuse(
            "argument",
            format!("has {} bytes, {ARGUMENT_BYTES_MAX} is the most", launch.argument.len()),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kernel, Kind, Source};

    #[test]
    fn launches_that_no_device_takes_are_refused() {
        let kernel = Kernel { source: Source { name: "", text: "" }, entry: "k", constants: Vec::new() };
        let good = Launch::new(&kernel, [1 << 20, 65_535, 2], 1024, &[0_u64; 4]).shared(1000);
        check(&good, 1000).unwrap();
        let refused = [
            ("threads", Launch { threads: 0, ..good }),
            ("threads", Launch { threads: 33, ..good }),
            ("threads", Launch { threads: 1056, ..good }),
            ("grid", Launch { grid: [0, 1, 1], ..good }),
            ("grid", Launch { grid: [1, 65_536, 1], ..good }),
            ("grid", Launch { grid: [u32::MAX, 1, 1], ..good }),
            ("shared_bytes", good.shared(1001)),
            ("argument", Launch { argument: &[0; 4097], ..good }),
        ];
        for (field, launch) in refused {
            let error = check(&launch, 1000).unwrap_err();
            assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("`k`"), "{error}");
            assert!(error.to_string().starts_with(&format!("`{field}`")), "{error}");
        }
    }
}
