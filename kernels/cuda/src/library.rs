//! Finds CUDA's libraries at run time and opens them. A library that is missing, older than what is called, or no library at
//! all is an error with a remedy: cudarc, which loads by itself at the first call, would panic.
#![allow(unsafe_code, reason = "opening a foreign library runs its constructors; see SAFETY")]

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::Error;

/// A library of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Linear algebra.
    CublasLt,
    /// Messages between GPUs.
    Nccl,
}

impl Library {
    /// Every library.
    pub const ALL: [Self; 4] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Nccl];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda",
            Self::Nvrtc => "libnvrtc",
            Self::CublasLt => "libcublasLt",
            Self::Nccl => "libnccl",
        }
    }

    /// What to do where it is missing.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "install NVIDIA's driver, release 580 or newer, or use `--device cpu`",
            Self::Nvrtc => {
                "install CUDA 13's NVRTC, or `pip install nvidia-cuda-nvrtc==13.0.88` and name Python's `site-packages` in \
                 `cuda.library_path`"
            }
            Self::CublasLt => {
                "install CUDA 13's cuBLAS, or `pip install nvidia-cublas` and name Python's `site-packages` in \
                 `cuda.library_path`"
            }
            Self::Nccl => {
                "install NCCL 2.18 or newer, or `pip install nvidia-nccl-cu13` and name Python's `site-packages` in \
                 `cuda.library_path`"
            }
        }
    }

    /// File names, the best first; by their `SONAME`, which is what the system's loader knows.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so.1"],
            Self::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Self::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
            Self::Nccl => &["libnccl.so.2"],
        }
    }

    /// Folders of NVIDIA's wheels below `site-packages`: those of CUDA 13, then those of CUDA 12.
    fn wheels(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &[],
            Self::Nvrtc => &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
            Self::CublasLt => &["nvidia/cu13/lib", "nvidia/cublas/lib"],
            Self::Nccl => &["nvidia/nccl/lib"],
        }
    }

    /// What the file names begin with that the library opens itself, by name, when it is used.
    fn companion(self) -> Option<&'static str> {
        (self == Self::Nvrtc).then_some("libnvrtc-builtins.so.")
    }

    /// An error of this library.
    pub(crate) fn error(self, problem: impl Into<String>) -> Error {
        Error::Library { library: self.name(), problem: problem.into(), remedy: self.remedy() }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where CUDA is often installed without the system's loader being told.
const USUAL_FOLDERS: [&str; 1] = ["/usr/local/cuda/lib64"];

/// A library that was opened; it stays until the process ends, since its threads and handlers may outlive any owner of ours.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    library: Library,
    /// File, or the name that the system's loader found it by.
    pub(crate) path: String,
    handle: &'static libloading::Library,
}

/// Opens `library`: from the first of `folders` that has it (a folder of libraries, or Python's `site-packages` with NVIDIA's
/// wheels), else from where the system's loader looks, else from the usual folder of CUDA.
pub(crate) fn open(library: Library, folders: &[PathBuf]) -> Result<Opened, Error> {
    open_files(library, library.files(), folders)
}

/// The same with file names of the caller's choice.
pub(crate) fn open_files(library: Library, files: &[&str], folders: &[PathBuf]) -> Result<Opened, Error> {
    // What a folder has that somebody named is meant: if it cannot be opened, no other takes its place unseen.
    if let Some(path) = in_folders(library, files, folders).first() {
        return load(library, path).map_err(|problem| library.error(problem));
    }
    let usual = USUAL_FOLDERS.map(PathBuf::from);
    let names = files.iter().map(PathBuf::from);
    let mut faults = Vec::new();
    for path in names.chain(in_folders(library, files, &usual)) {
        match load(library, &path) {
            Ok(opened) => return Ok(opened),
            Err(problem) => faults.push(problem),
        }
    }
    let looked: String =
        folders.iter().map(|folder| format!("; nothing in `{}`", folder.display())).collect();
    Err(library.error(format!("{}{looked}", faults.join("; "))))
}

/// Files of the library that are there: by folder, then by name.
fn in_folders(library: Library, files: &[&str], folders: &[PathBuf]) -> Vec<PathBuf> {
    let below = |folder: &PathBuf| {
        let wheels = library.wheels().iter().map(|wheel| folder.join(wheel));
        std::iter::once(folder.clone()).chain(wheels).collect::<Vec<_>>()
    };
    let all =
        folders.iter().flat_map(below).flat_map(|folder| files.iter().map(move |file| folder.join(file)));
    all.filter(|path| path.exists()).collect()
}

fn load(library: Library, path: &Path) -> Result<Opened, String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let (Some(prefix), Some(folder)) = (library.companion(), folder) {
        load_companions(folder, prefix)?;
    }
    // SAFETY: the file is one of CUDA's libraries by its name, from a folder that the operator or the system names; its
    // constructors are as trusted as any library of the system.
    let handle = unsafe { libloading::Library::new(path) }.map_err(reason)?;
    Ok(Opened { library, path: path.display().to_string(), handle: Box::leak(Box::new(handle)) })
}

/// Opens what the library will ask the system's loader for by name: what is loaded already is found by its `SONAME`, in
/// whichever folder it lies.
fn load_companions(folder: &Path, prefix: &str) -> Result<(), String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("`{}`: {error}", folder.display()))?;
    let ours = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(ours) {
        // SAFETY: as for the library beside it.
        let companion = unsafe { libloading::Library::new(&path) }.map_err(reason)?;
        // It must stay loaded for as long as the library, which stays until the process ends.
        std::mem::forget(companion);
    }
    Ok(())
}

/// What the system's loader said, with the name of the file.
fn reason(error: libloading::Error) -> String {
    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Opened {
    /// Address of a function; `T` is its type.
    ///
    /// # Safety
    /// `T` must be a function pointer with the signature of `symbol`.
    pub(crate) unsafe fn function<T: Copy>(&self, symbol: &str) -> Result<T, Error> {
        // SAFETY: the caller's promise; the library is never closed.
        let found = unsafe { self.handle.get::<T>(symbol) };
        found.map(|symbol| *symbol).map_err(|_| {
            self.library.error(format!("`{}` is too old or another library: it has no `{symbol}`", self.path))
        })
    }

    /// Checks that all of `symbols` are there.
    pub(crate) fn has(&self, symbols: &[&str]) -> Result<(), Error> {
        // SAFETY: the addresses are looked up, nothing is called through them.
        symbols.iter().try_for_each(|symbol| unsafe { self.function::<*const ()>(symbol) }.map(drop))
    }
}

/// A structure of the functions of a library that are called: `functions! { struct Name { field: "symbol" (arguments) -> result, … } }`.
macro_rules! functions {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $symbol:literal ($($argument:ty),*) -> $result:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        struct $name { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl $name {
            /// Looks all of them up.
            fn of(library: &$crate::library::Opened) -> Result<Self, $crate::Error> {
                // SAFETY: the signatures are those of the library's header, with `c_int` for its enumerations: a code that this
                // version of the header does not list must not become an invalid Rust enumeration.
                unsafe { Ok(Self { $($field: library.function($symbol)?,)* }) }
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    };
}
pub(crate) use functions;

/// Makes sure that cudarc will find cuBLASLt, with the functions `symbols`, instead of panicking at its first call.
pub fn require_cublaslt(folders: &[PathBuf], symbols: &[&str]) -> Result<(), Error> {
    open(Library::CublasLt, folders)?.has(symbols)?;
    // SAFETY: looks for the library by name, which has been opened just now.
    match unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        true => Ok(()),
        false => {
            Err(Library::CublasLt.error("it was opened, but is not known by the name that its bindings use"))
        }
    }
}

/// What is there of a library, for `longshore doctor`: its file, or why it cannot be used.
pub fn locate(library: Library, folders: &[PathBuf]) -> Result<String, Error> {
    open(library, folders).map(|opened| opened.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn problem(found: Result<Opened, Error>) -> String {
        let error = found.expect_err("it is not there");
        assert!(error.kind() == Kind::Unavailable && !error.retryable(), "{error:?}");
        error.to_string()
    }

    #[test]
    fn a_missing_library_is_an_error_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        for library in Library::ALL {
            let told =
                problem(open_files(library, &["libno-such-library.so.1"], &[folder.path().to_owned()]));
            assert!(told.contains(library.name()) && told.contains(library.remedy()), "{told}");
            assert!(told.contains("libno-such-library.so.1") && told.contains("nothing in `"), "{told}");
        }
    }

    #[test]
    fn a_file_that_is_no_library_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        for content in [&b"not a library"[..], b"\x7fELF\x02\x01\x01", b""] {
            std::fs::write(folder.path().join("libnccl.so.2"), content).unwrap();
            let told = problem(open(Library::Nccl, &[folder.path().to_owned()]));
            assert!(
                told.contains("libnccl.so.2") && told.contains(&folder.path().display().to_string()),
                "{told}"
            );
        }
    }

    #[test]
    fn a_library_without_the_functions_is_too_old() {
        // Any library of the system will do: this one is there wherever the tests run.
        let opened = open_files(Library::Nvrtc, &["libc.so.6", "libc.dylib"], &[]).unwrap();
        opened.has(&["malloc"]).unwrap();
        let error = opened.has(&["malloc", "nvrtcVersion"]).unwrap_err();
        assert!(error.to_string().contains("`nvrtcVersion`") && error.kind() == Kind::Unavailable, "{error}");
    }

    #[test]
    fn wheels_are_found_below_site_packages() {
        let site = tempfile::tempdir().unwrap();
        let lib = site.path().join("nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join("libnvrtc.so.13"), b"").unwrap();
        let found = in_folders(Library::Nvrtc, Library::Nvrtc.files(), &[site.path().to_owned()]);
        assert_eq!(found, [lib.join("libnvrtc.so.13")]);
    }
}
