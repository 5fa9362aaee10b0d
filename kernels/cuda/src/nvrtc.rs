//! NVRTC: from the sources in the binary to machine code of one architecture. Works on machines without a GPU.
//!
//! Called through a table of our own instead of cudarc's: NVRTC may lie in a folder that the system's loader does not search,
//! and a code or a function that this version of its header does not list must be an error, not a panic.
#![allow(unsafe_code, reason = "calls a foreign library; see SAFETY")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::PathBuf,
};

use crate::{
    Architecture, Error, Kernel, Library, Source, Version,
    library::{self, Opened, functions},
};

type Program = *mut c_void;

functions! {
    struct Functions {
        version: "nvrtcVersion"(*mut c_int, *mut c_int) -> c_int,
        error_string: "nvrtcGetErrorString"(c_int) -> *const c_char,
        architecture_count: "nvrtcGetNumSupportedArchs"(*mut c_int) -> c_int,
        architectures: "nvrtcGetSupportedArchs"(*mut c_int) -> c_int,
        create: "nvrtcCreateProgram"(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int,
        destroy: "nvrtcDestroyProgram"(*mut Program) -> c_int,
        compile: "nvrtcCompileProgram"(Program, c_int, *const *const c_char) -> c_int,
        log_size: "nvrtcGetProgramLogSize"(Program, *mut usize) -> c_int,
        log: "nvrtcGetProgramLog"(Program, *mut c_char) -> c_int,
        cubin_size: "nvrtcGetCUBINSize"(Program, *mut usize) -> c_int,
        cubin: "nvrtcGetCUBIN"(Program, *mut c_char) -> c_int,
    }
}

const SUCCESS: c_int = 0;
const INVALID_OPTION: c_int = 5;
const COMPILATION: c_int = 6;

/// Options of every compilation. `-v` makes the assembler report registers, stack and spills in the log.
pub(crate) const OPTIONS: &[&str] = &["--std=c++17", "--ptxas-options=-v"];

/// A log is cut here: the first errors tell what is wrong.
const LOG_BYTES_MAX: usize = 16 << 10;

/// Code larger than this is no kernel of ours.
const CUBIN_BYTES_MAX: usize = 64 << 20;

/// The compiler.
#[derive(Debug, Clone)]
pub struct Nvrtc {
    functions: Functions,
    version: Version,
    path: String,
    /// Compute capabilities that it compiles for.
    capabilities: Vec<u32>,
}

/// A compiled kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code, an ELF file.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said.
    pub log: String,
}

impl Nvrtc {
    /// Opens the newest one that makes code for a driver of CUDA `driver` (`None`: the newest), looking in `folders` first.
    pub fn open(folders: &[PathBuf], driver: Option<Version>) -> Result<Self, Error> {
        // Code of one major version runs under every driver of that version and of later ones.
        let files: &[&str] = match driver {
            Some(driver) if driver.major < 13 => &["libnvrtc.so.12"],
            _ => &["libnvrtc.so.13", "libnvrtc.so.12"],
        };
        let opened = library::open_files(Library::Nvrtc, files, folders)?;
        Self::of(&opened)
    }

    fn of(opened: &Opened) -> Result<Self, Error> {
        let functions = Functions::of(opened)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point at integers.
        let status = unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        let mut nvrtc = Self {
            functions,
            version: Version::new(major.unsigned_abs(), minor.unsigned_abs()),
            path: opened.path.clone(),
            capabilities: Vec::new(),
        };
        nvrtc.check("nvrtcVersion", status)?;
        nvrtc.capabilities = nvrtc.supported()?;
        Ok(nvrtc)
    }

    fn supported(&self) -> Result<Vec<u32>, Error> {
        let mut count = 0;
        // SAFETY: points at an integer.
        self.check("nvrtcGetNumSupportedArchs", unsafe {
            (self.functions.architecture_count)(&raw mut count)
        })?;
        let mut found = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: there is room for as many as were told.
        self.check("nvrtcGetSupportedArchs", unsafe { (self.functions.architectures)(found.as_mut_ptr()) })?;
        Ok(found.into_iter().map(c_int::unsigned_abs).collect())
    }

    /// Its version, which is that of its CUDA.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it was found.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Compiles the source of `kernel` with its constants. The first of `headers` comes before it, the others where they are
    /// included.
    pub fn compile(
        &self,
        kernel: &Kernel,
        headers: &[Source],
        architecture: Architecture,
    ) -> Result<Compiled, Error> {
        if !self.capabilities.contains(&architecture.capability()) {
            let problem = format!("NVRTC {} at `{}` knows no {architecture}", self.version, self.path);
            return Err(Library::Nvrtc.error(problem));
        }
        let program = self.program(kernel, headers)?;
        let options = options(kernel, architecture)?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive; the strings live past the call.
        let status = unsafe { (self.functions.compile)(program.handle, count(&pointers), pointers.as_ptr()) };
        let log = program.log();
        match status {
            SUCCESS => Ok(Compiled { cubin: program.cubin()?, log }),
            COMPILATION | INVALID_OPTION => Err(Error::Compile {
                kernel: kernel.entry.to_owned(),
                architecture: architecture.to_string(),
                log: shortened(log),
            }),
            // It lacks its built-in functions, or memory: told by its log, where there is one.
            other => Err(Library::Nvrtc.error(format!("{}: {}", self.text(other), shortened(log).trim()))),
        }
    }

    fn program<'a>(&'a self, kernel: &Kernel, headers: &[Source]) -> Result<Unit<'a>, Error> {
        // Sources need not include what every source needs; their lines keep their numbers.
        let prelude =
            headers.first().map(|header| format!("#include \"{}\"\n", header.name)).unwrap_or_default();
        let unit = format!("{prelude}#line 1 \"{}\"\n{}", kernel.source.name, kernel.source.text);
        let (text, name) = (c_string(&unit, "source")?, c_string(kernel.source.name, "source")?);
        let texts =
            headers.iter().map(|header| c_string(header.text, "header")).collect::<Result<Vec<_>, _>>()?;
        let names =
            headers.iter().map(|header| c_string(header.name, "header")).collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (text_pointers, name_pointers) = (pointers(&texts), pointers(&names));
        let mut handle = std::ptr::null_mut();
        // SAFETY: every string ends with a zero and lives as long as the program, which may refer to them.
        let status = unsafe {
            (self.functions.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                count(&text_pointers),
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        Ok(Unit { nvrtc: self, handle, _strings: (text, name, texts, names) })
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<(), Error> {
        match status {
            SUCCESS => Ok(()),
            other => Err(Library::Nvrtc.error(format!("{call}: {}", self.text(other)))),
        }
    }

    fn text(&self, status: c_int) -> String {
        // SAFETY: it takes any number and returns a string that is never freed.
        let text = unsafe { (self.functions.error_string)(status) };
        if text.is_null() {
            return format!("code {status}");
        }
        // SAFETY: a string of the library, ended with a zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A program under compilation. Keeps the strings that it was made from.
struct Unit<'a> {
    nvrtc: &'a Nvrtc,
    handle: Program,
    _strings: (CString, CString, Vec<CString>, Vec<CString>),
}

impl Unit<'_> {
    /// What the compiler said; empty when it does not tell.
    fn log(&self) -> String {
        let f = &self.nvrtc.functions;
        let log = self.bytes(f.log_size, f.log).unwrap_or_default();
        String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, Error> {
        let f = &self.nvrtc.functions;
        self.bytes(f.cubin_size, f.cubin).ok_or_else(|| Library::Nvrtc.error("it gives no code"))
    }

    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Option<Vec<u8>> {
        let mut bytes = 0_usize;
        // SAFETY: the program is alive and the size has a place.
        if unsafe { size(self.handle, &raw mut bytes) } != SUCCESS || bytes > CUBIN_BYTES_MAX {
            return None;
        }
        let mut buffer = vec![0_u8; bytes];
        // SAFETY: there is room for as many bytes as were told.
        (unsafe { content(self.handle, buffer.as_mut_ptr().cast()) } == SUCCESS).then_some(buffer)
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram`, destroyed once.
        unsafe { (self.nvrtc.functions.destroy)(&raw mut self.handle) };
    }
}

/// All options as they are given.
fn options(kernel: &Kernel, architecture: Architecture) -> Result<Vec<CString>, Error> {
    let constants = kernel.constants.iter().map(|(name, value)| format!("-D{name}={value}"));
    let fixed = OPTIONS.iter().map(|option| (*option).to_owned());
    let all = std::iter::once(format!("--gpu-architecture={architecture}")).chain(fixed).chain(constants);
    all.map(|option| c_string(&option, "constants")).collect()
}

fn c_string(text: &str, field: &'static str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Invalid { field, problem: "has a zero byte".to_owned() })
}

fn count<T>(of: &[T]) -> c_int {
    c_int::try_from(of.len()).expect("a kernel has few constants and headers")
}

/// At most [`LOG_BYTES_MAX`] bytes.
fn shortened(mut log: String) -> String {
    if log.len() > LOG_BYTES_MAX {
        let end = (0..=LOG_BYTES_MAX).rev().find(|at| log.is_char_boundary(*at)).unwrap_or(0);
        log.truncate(end);
        log.push_str("\n…");
    }
    log
}
