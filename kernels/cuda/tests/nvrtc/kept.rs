//! Kernels that tests compile are compiled once.

use std::{fs, path::Path};

use longshore_cuda::{Architecture, Compiled, Error, HEADERS, Kernel, Nvrtc};

/// What was compiled before is kept in the target folder, by everything that it depends on: kernels change rarely, and all of them
/// take a minute.
pub(crate) fn compile(nvrtc: &Nvrtc, kernel: &Kernel, architecture: Architecture) -> Result<Compiled, Error> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    fs::create_dir_all(&folder).expect("the target folder can be written");
    let mut hasher = blake3::Hasher::new();
    let how = format!("{} {architecture} {:?}", nvrtc.version(), kernel.constants);
    let texts =
        HEADERS.iter().map(|header| header.text).chain([kernel.source.text, kernel.source.name, &how]);
    for text in texts.chain([include_str!("../../src/nvrtc.rs")]) {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let place = |kind: &str| folder.join(format!("{}.{kind}", hasher.finalize().to_hex()));
    if let (Ok(cubin), Ok(log)) = (fs::read(place("cubin")), fs::read_to_string(place("log"))) {
        return Ok(Compiled { cubin, log });
    }
    let compiled = nvrtc.compile(kernel, HEADERS, architecture)?;
    // By renames, the log last: what is found is whole, whoever else compiles the same at the same time.
    for (kind, content) in [("cubin", &compiled.cubin[..]), ("log", compiled.log.as_bytes())] {
        let fresh = place(&format!("{}.{kind}.new", std::process::id()));
        let kept = fs::write(&fresh, content).and_then(|()| fs::rename(&fresh, place(kind)));
        kept.expect("the target folder can be written");
    }
    Ok(compiled)
}
