//! Why a disk tier cannot be opened.

use std::path::PathBuf;

/// Why a disk tier cannot be opened. Faults after that are misses, with counters.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused.
    #[error(
        "`kvstore.disk.path`: cannot {action} `{}`: {problem}; hint: choose a folder that this process may write to",
        path.display()
    )]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// What the operating system said.
        problem: String,
    },
    /// Another process uses the folder.
    #[error(
        "`kvstore.disk.path`: `{}` is in use by another process; hint: give every shard its own folder, or stop the other one",
        path.display()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds something that this shard must not touch.
    #[error("`kvstore.disk.path`: `{}` {problem}; hint: choose another folder, or delete this one if nobody needs it", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// The capacity does not hold one block.
    #[error("`kvstore.disk.capacity_bytes` is {capacity_bytes}, one block needs {block_bytes}")]
    TooSmall {
        /// What was configured.
        capacity_bytes: u64,
        /// Bytes of a block on disk.
        block_bytes: u64,
    },
}
