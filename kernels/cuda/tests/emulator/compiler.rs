//! Compiles C++ to shared libraries, which stay in a folder of the target and are used by every test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The compiler's checks for what the device traps on or leaves undefined; they end in a trap, which the runtime catches.
const CHECKS: &[&str] =
    &["-fsanitize=alignment,bounds,shift,integer-divide-by-zero", "-fsanitize-undefined-trap-on-error"];

/// The runtime moves bytes between fibers and needs no checks.
pub(crate) const RUNTIME_FLAGS: &[&str] = &["-fno-sanitize=all", "-pthread"];

pub(crate) struct Compiler {
    folder: PathBuf,
    /// Texts that every unit may include.
    headers: String,
}

impl Compiler {
    pub(crate) fn new() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        fs::create_dir_all(&folder).expect("the target folder can be written");
        let sources = package().join("source");
        let mut names: Vec<PathBuf> = fs::read_dir(sources)
            .expect("the sources are there")
            .map(|entry| entry.unwrap().path())
            .collect();
        names.retain(|path| path.extension().is_some_and(|extension| extension == "cuh"));
        names.sort();
        let texts = names.iter().map(|path| fs::read_to_string(path).expect("a header is UTF-8"));
        let headers =
            texts.collect::<String>() + include_str!("emulator.h") + include_str!("emulator_group.h");
        Self { folder, headers }
    }

    /// Makes a library of `unit`, or finds it; the error is what the compiler said.
    pub(crate) fn library(&self, name: &str, unit: &str, flags: &[&str]) -> Result<PathBuf, String> {
        let flags = [architecture(), CHECKS, flags].concat();
        let stem = format!("{}-{}", name.replace('.', "-"), hash(&[&flags.join(" "), &self.headers, unit]));
        let library = self.folder.join(format!("{stem}.so"));
        // Test processes run at once and want the same libraries.
        let lock =
            File::create(self.folder.join(format!("{stem}.lock"))).map_err(|error| error.to_string())?;
        lock.lock().map_err(|error| error.to_string())?;
        if !library.exists() {
            let (source, fresh) =
                (self.folder.join(format!("{stem}.cpp")), self.folder.join(format!("{stem}.new")));
            fs::write(&source, unit).map_err(|error| error.to_string())?;
            compile(&source, &fresh, &flags)?;
            fs::rename(&fresh, &library).map_err(|error| error.to_string())?;
        }
        Ok(library)
    }
}

/// The folder of the package whose sources these are; tests of others use the emulator too.
fn package() -> PathBuf {
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut places = above.map(|folder| folder.join("kernels/cuda"));
    places.find(|folder| folder.join("source").is_dir()).expect("the package lies in the repository")
}

fn compile(source: &Path, library: &Path, flags: &[&str]) -> Result<(), String> {
    let folder = package();
    let output = Command::new("c++")
        .args(["-O2", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-DLONGSHORE_EMULATOR=1"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"])
        .args(flags)
        .arg("-I")
        .arg(folder.join("source"))
        .arg("-I")
        .arg(folder.join("tests/emulator"))
        .arg(source)
        .arg("-o")
        .arg(library)
        .output()
        .map_err(|error| format!("the emulator needs a C++ compiler, `c++`: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Instructions that this machine has, so that fused multiply-adds are no calls.
fn architecture() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    {
        return &["-mavx2", "-mfma", "-mf16c"];
    }
    &[]
}

fn hash(texts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..24].to_owned()
}
