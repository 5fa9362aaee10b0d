//! Where the tests find NVRTC: in the virtual environment that `tests/run` makes.

use std::path::{Path, PathBuf};

/// Folders for `CudaOptions::library_path`: Python's `site-packages`, when the environment is there.
pub(crate) fn library_path() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    let python = std::env::var_os("LONGSHORE_TEST_PYTHON").map_or(own, PathBuf::from);
    let Some(libraries) = python.parent().and_then(Path::parent).map(|environment| environment.join("lib"))
    else {
        return Vec::new();
    };
    let versions = std::fs::read_dir(libraries).into_iter().flatten().flatten();
    versions.map(|version| version.path().join("site-packages")).filter(|path| path.is_dir()).collect()
}
