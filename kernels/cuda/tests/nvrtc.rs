//! The run-time compiler and its cache, as they are: NVRTC needs no GPU.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

use std::path::Path;

use longshore_cuda::{
    Architecture, Compiler, CudaOptions, Error, HEADERS, Kernel, Kind, Nvrtc, Source, argument_bytes,
    resources,
};

#[path = "nvrtc/library_path.rs"]
mod library_path;
use library_path::library_path;

const SOURCE: Source = Source {
    name: "small.cu",
    text: "struct Params { u64 to; u32 count; u32 factor; };
KERNEL(fill, 128, 4, Params) {
    u32* to = reinterpret_cast<u32*>(p.to);
    u32 at = block_index_x() * block_threads() + thread_index();
    if (at < p.count) to[at] = at * p.factor + ADDEND;
}
",
};

fn fill(addend: i64) -> Kernel {
    Kernel { source: SOURCE, entry: "fill", constants: vec![("ADDEND", addend)] }
}

fn nvrtc() -> Nvrtc {
    Nvrtc::open(&library_path(), None)
        .unwrap_or_else(|error| panic!("{error}\nhint: `tests/run` makes the environment"))
}

fn sm_90() -> Architecture {
    Architecture::of(90).unwrap()
}

#[test]
fn a_kernel_is_compiled_for_every_architecture_with_its_report() {
    let nvrtc = nvrtc();
    assert!(nvrtc.version().major >= 12, "{}", nvrtc.version());
    for architecture in Architecture::CHECKED {
        let compiled = nvrtc.compile(&fill(3), HEADERS, architecture).unwrap();
        assert_eq!(argument_bytes(&compiled.cubin, "fill").unwrap(), 16, "{architecture}");
        let reports = resources(&compiled.log);
        assert!(reports.len() == 1 && reports[0].entry == "fill", "{}", compiled.log);
        assert!((1..=32).contains(&reports[0].registers), "{reports:?}");
    }
}

#[test]
fn faults_of_sources_are_told_with_file_and_line() {
    let missing = Kernel { constants: Vec::new(), ..fill(0) };
    let error = nvrtc().compile(&missing, HEADERS, sm_90()).unwrap_err();
    let text = error.to_string();
    assert!(error.kind() == Kind::Internal && text.contains("sm_90a") && text.contains("`fill`"), "{text}");
    assert!(text.contains("small.cu(5)") && text.contains("ADDEND"), "{text}");
}

#[test]
fn what_cannot_be_compiled_at_all_is_refused() {
    let nvrtc = nvrtc();
    let error = nvrtc.compile(&fill(0), HEADERS, Architecture::of(990).unwrap()).unwrap_err();
    assert!(error.kind() == Kind::Unavailable && error.to_string().contains("knows no sm_990"), "{error}");
    let zero = Kernel { source: Source { name: "zero.cu", text: "int x;\0" }, ..fill(0) };
    assert!(matches!(nvrtc.compile(&zero, HEADERS, sm_90()), Err(Error::Invalid { field: "source", .. })));
    let hostile = Kernel { constants: vec![("ADDEND=0 -DX\0", 1)], ..fill(0) };
    assert!(matches!(
        nvrtc.compile(&hostile, HEADERS, sm_90()),
        Err(Error::Invalid { field: "constants", .. })
    ));
}

#[test]
fn too_old_a_driver_gets_no_code_that_it_cannot_run() {
    // The wheel of CUDA 13 is the only one here: for a driver of CUDA 12 there is none.
    let found = Nvrtc::open(&library_path(), Some(longshore_cuda::Version::new(12, 8)));
    match found {
        Err(error) => assert!(error.to_string().contains("libnvrtc.so.12"), "{error}"),
        Ok(nvrtc) => assert_eq!(nvrtc.version().major, 12),
    }
}

fn entries(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn code_is_kept_found_again_and_replaced_when_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        CudaOptions { library_path: library_path(), cache_path: Some(folder.path().join("kernels")) };
    let cache = options.cache_path.clone().unwrap();
    let compiler = Compiler::open(&options, None).unwrap();
    let first = compiler.cubin(&fill(1), sm_90()).unwrap();
    assert_eq!(entries(&cache).len(), 1);
    // Everything that the code depends on makes another entry.
    let other = compiler.cubin(&fill(2), sm_90()).unwrap();
    assert_ne!(first, other);
    compiler.cubin(&fill(1), Architecture::of(80).unwrap()).unwrap();
    let renamed = Source { name: "renamed.cu", ..SOURCE };
    compiler.cubin(&Kernel { source: renamed, ..fill(1) }, sm_90()).unwrap();
    assert_eq!(entries(&cache).len(), 4);
    // The same entry of another process, found and not written again.
    let written = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = entries(&cache).iter().map(|path| written(path)).collect();
    assert_eq!(Compiler::open(&options, None).unwrap().cubin(&fill(1), sm_90()).unwrap(), first);
    assert_eq!(entries(&cache).iter().map(|path| written(path)).collect::<Vec<_>>(), before);
    // Hostile content: every entry holds the code of another kernel, or rubbish.
    for path in entries(&cache) {
        let mut content = std::fs::read(&path).unwrap();
        let last = content.len() - 1;
        content[last] ^= 1;
        std::fs::write(&path, content).unwrap();
    }
    assert_eq!(compiler.cubin(&fill(1), sm_90()).unwrap(), first);
    assert_eq!(compiler.cubin(&fill(2), sm_90()).unwrap(), other);
}
