//! Products of many rows by cuBLASLt. Written from cudarc's contracts and never run where this was written: no such device was there.
#![allow(unsafe_code, reason = "calls a foreign library; see SAFETY")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::mem::size_of_val;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use super::linear::{Product, Products};
use super::programs::Precision;
use crate::{Buffer, CudaDevice, Device, Error, require_cublaslt};

/// Functions of the library that are called.
const SYMBOLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// Shapes whose kernels are remembered; then all are forgotten.
const PLANS: usize = 512;
/// Workspace by NVIDIA's advice, from compute capability 9.0 on and before.
const WORKSPACE_BYTES: [usize; 2] = [32 << 20, 4 << 20];

/// cuBLASLt on a device's stream.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    device: Arc<CudaDevice>,
    /// Used by one product at a time, since they are queued in order.
    workspace: Buffer,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: the library's functions may be called from any thread with one handle; plans lie behind a lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// What the choice of a kernel depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    precision: Precision,
    outputs: usize,
    inputs: usize,
    rows: usize,
    x_stride: usize,
    out_stride: usize,
}

/// Descriptions of the operands and the kernel that was chosen.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn fault(call: &'static str) -> impl Fn(CublasError) -> Error {
    move |error| Error::Device { call, problem: error.to_string() }
}

impl CublasLt {
    /// Opens the library, from the first of `folders` that has it, for a device.
    pub fn open(device: &Arc<CudaDevice>, folders: &[PathBuf]) -> Result<Self, Error> {
        require_cublaslt(folders, SYMBOLS)?;
        device.enter()?;
        let as_device: Arc<dyn Device> = Arc::<CudaDevice>::clone(device);
        let workspace = Buffer::new(&as_device, WORKSPACE_BYTES[usize::from(device.capability() < 90)])?;
        let handle = result::create_handle().map_err(fault("cublasLtCreate"))?;
        Ok(Self { handle, device: Arc::clone(device), workspace, plans: Mutex::default() })
    }

    fn queue(&self, plan: &Plan, product: &Product, stream: CUstream) -> Result<(), Error> {
        let (alpha, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let pointer = |address: u64| address as usize as *mut c_void;
        // SAFETY: the descriptions live in the plan; the addresses have the sizes that `Product` documents, which is the caller's
        // promise as with every launch; alpha and beta are read before the call returns (host pointer mode, the default).
        let queued = unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(product.weights),
                plan.weights,
                pointer(product.x),
                plan.x,
                pointer(product.out),
                plan.out,
                pointer(product.out),
                plan.out,
                &raw const plan.algorithm,
                pointer(self.workspace.address()),
                self.workspace.bytes(),
                stream.cast(),
            )
        };
        queued.map_err(fault("cublasLtMatmul"))
    }
}

impl Products for CublasLt {
    fn multiply(&self, product: &Product) -> Result<(), Error> {
        let stream = self.device.enter()?;
        let &Product { precision, outputs, inputs, rows, x_stride, out_stride, .. } = product;
        let shape = Shape { precision, outputs, inputs, rows, x_stride, out_stride };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= PLANS && !plans.contains_key(&shape) {
            plans.clear();
        }
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let plan = Plan::new(self.handle, shape, self.workspace.bytes());
                place.insert(plan.map_err(fault("cublasLtMatmulAlgoGetHeuristic"))?)
            }
        };
        self.queue(plan, product, stream)
    }
}

impl Plan {
    /// The library counts columns first: our rows of outputs are its columns, and weights are its transposed first operand.
    fn new(handle: sys::cublasLtHandle_t, shape: Shape, workspace_bytes: usize) -> Result<Self, CublasError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
        let element = if shape.precision == Precision::F16 { CUDA_R_16F } else { CUDA_R_16BF };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let size = |size: usize| size as u64;
        let mut plan = Self {
            product: std::ptr::null_mut(),
            weights: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        // What was made before a failure is given back by `Drop`.
        plan.product = result::create_matmul_desc(compute, CUDA_R_32F)?;
        let (inputs, outputs, rows) = (size(shape.inputs), size(shape.outputs), size(shape.rows));
        plan.weights = result::create_matrix_layout(element, inputs, outputs, shape.inputs as i64)?;
        plan.x = result::create_matrix_layout(element, inputs, rows, shape.x_stride as i64)?;
        plan.out = result::create_matrix_layout(CUDA_R_32F, outputs, rows, shape.out_stride as i64)?;
        // CUBLAS_OP_T of `cublas_api.h`.
        let transposed = 1i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the description was made above; the attribute is of the type that the library's documentation gives.
        unsafe {
            let bytes = size_of_val(&transposed);
            result::set_matmul_desc_attribute(
                plan.product,
                attribute,
                (&raw const transposed).cast(),
                bytes,
            )?;
        }
        plan.algorithm = plan.choose(handle, workspace_bytes)?;
        Ok(plan)
    }

    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        workspace_bytes: usize,
    ) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let preference = result::create_matmul_pref()?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: all descriptions were made before and are alive; the preference is destroyed once, after its last use.
        unsafe {
            let bytes = size_of_val(&workspace_bytes);
            let set = result::set_matmul_pref_attribute(
                preference,
                attribute,
                (&raw const workspace_bytes).cast(),
                bytes,
            );
            let chosen = set.and_then(|()| {
                result::get_matmul_algo_heuristic(
                    handle,
                    self.product,
                    self.weights,
                    self.x,
                    self.out,
                    self.out,
                    preference,
                )
            });
            let destroyed = result::destroy_matmul_pref(preference);
            let chosen = chosen?;
            destroyed?;
            Ok(chosen.algo)
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made by the library or is null, and is given back once. Nobody could do anything about a failure.
        unsafe {
            for layout in [self.weights, self.x, self.out].into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            if !self.product.is_null() {
                let _ = result::destroy_matmul_desc(self.product);
            }
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: made by `new`, given back once; what was queued keeps what it needs.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CublasLt").field("device", &self.device).finish_non_exhaustive()
    }
}
