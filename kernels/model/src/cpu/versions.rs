//! One body of plain Rust, compiled for every instruction set that [`InstructionSet`] names, so that it is vectorised as
//! wide as the machine allows. Fused multiply-adds are exact by definition, so all versions give the same bits.

/// Defines a function that runs `$body`, an `#[inline(always)]` function of the same arguments, compiled for the instruction
/// set that its first argument names.
macro_rules! versions {
    ($(#[$docs:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = $body:ident;) => {
        $(#[$docs])*
        $visibility fn $name(set: longshore_compute::InstructionSet, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                $body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                $body($($argument),*)
            }
            match set {
                #[cfg(target_arch = "x86_64")]
                longshore_compute::InstructionSet::Avx2 => {
                    #[expect(unsafe_code, reason = "the instruction set is there")]
                    // SAFETY: `InstructionSet::Avx2` is only ever given out on machines that have these features.
                    unsafe {
                        avx2($($argument),*)
                    }
                }
                #[cfg(target_arch = "x86_64")]
                longshore_compute::InstructionSet::Avx512 => {
                    #[expect(unsafe_code, reason = "the instruction set is there")]
                    // SAFETY: `InstructionSet::Avx512` is only ever given out on machines that have these features.
                    unsafe {
                        avx512($($argument),*)
                    }
                }
                _ => $body($($argument),*),
            }
        }
    };
}
pub(super) use versions;
