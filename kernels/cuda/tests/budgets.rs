//! Every kernel compiles for every architecture, within its budget of registers, without spills. Needs NVRTC, no GPU.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use longshore_cuda::{
    Architecture, BUDGETS, Budget, Kernel, Nvrtc, Resources, argument_bytes, kernels, kernels_for, resources,
};

#[path = "nvrtc/kept.rs"]
mod kept;
#[path = "nvrtc/library_path.rs"]
mod library_path;

/// NVRTC. Where there is a wheel of it for this machine, the tests must not pass without it.
fn nvrtc() -> Option<Nvrtc> {
    let folders: Vec<PathBuf> = library_path::library_path();
    match Nvrtc::open(&folders, None) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) if cfg!(all(target_os = "linux", target_arch = "x86_64")) => {
            panic!(
                "{error}\nhint: `tests/run` makes the environment that has it; or set LONGSHORE_TEST_PYTHON to its Python"
            )
        }
        Err(error) => {
            eprintln!("KERNELS WERE NOT COMPILED: {error}");
            None
        }
    }
}

/// Kernels by what is compiled: a source with its constants has several entries. What devices of several capabilities launch is
/// compiled once.
fn units(capabilities: &[u32]) -> BTreeMap<String, Vec<Kernel>> {
    let (mut units, mut seen) = (BTreeMap::<String, Vec<Kernel>>::new(), HashSet::new());
    let all = capabilities.iter().flat_map(|&capability| kernels_for(capability));
    for kernel in all.filter(|kernel| seen.insert(kernel.clone())) {
        let constants: String =
            kernel.constants.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        units.entry(format!("{}{constants}", kernel.source.name)).or_default().push(kernel);
    }
    units
}

/// Kernels of devices of these capabilities, which run the same code.
fn check(capabilities: &[u32]) {
    let Some(nvrtc) = nvrtc() else { return };
    let architecture = Architecture::of(capabilities[0]).unwrap();
    let (mut faults, mut rows) = (Vec::new(), Vec::new());
    for (unit, entries) in units(capabilities) {
        let compiled = match kept::compile(&nvrtc, &entries[0], architecture) {
            Ok(compiled) => compiled,
            Err(error) => {
                faults.push(format!("{unit}: {error}"));
                continue;
            }
        };
        let reports = resources(&compiled.log);
        faults.extend(complaints(&compiled.log).map(|complaint| format!("{unit}: {complaint}")));
        for kernel in &entries {
            match reports.iter().find(|report| report.entry == kernel.entry) {
                Some(report) => {
                    rows.push(row(&unit, report));
                    faults.extend(overdrawn(&unit, report));
                }
                None => faults
                    .push(format!("{unit}: no entry `{}`, or no report: {}", kernel.entry, compiled.log)),
            }
            if let Err(error) = argument_bytes(&compiled.cubin, kernel.entry) {
                faults.push(format!("{unit}: {error}"));
            }
        }
    }
    let table = format!("{architecture}\nunit | entry | registers | stack | spilled\n{}", rows.join("\n"));
    assert!(faults.is_empty(), "{}\n\n{table}", faults.join("\n"));
    println!("{table}");
}

/// What the assembler says where it gives up products of warp groups that overlap, or registers that move between them.
fn complaints(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| ["serialized", "setmaxnreg"].iter().any(|word| line.contains(word)))
}

fn row(unit: &str, r: &Resources) -> String {
    format!(
        "{unit} | {} | {} | {} | {}",
        r.entry,
        r.registers,
        r.stack_bytes,
        r.spill_store_bytes + r.spill_load_bytes
    )
}

/// What a kernel takes beyond its budget.
fn overdrawn(unit: &str, r: &Resources) -> Vec<String> {
    let Some(budget) = BUDGETS.iter().find(|budget| budget.entry == r.entry) else {
        return vec![format!("{unit}: `{}` has no budget; it takes {} registers", r.entry, r.registers)];
    };
    let what = [
        ("bytes of local memory", r.stack_bytes, 0),
        ("bytes of spilled registers", r.spill_store_bytes + r.spill_load_bytes, 0),
        ("bytes of static shared memory", r.static_shared_bytes, 0),
    ];
    let over = what.into_iter().filter(|(_, taken, most)| taken > most);
    let over = over.map(|(what, taken, most)| format!("takes {taken} {what}, its budget is {most}"));
    let all = budget.refuses(r.registers).into_iter().chain(over);
    all.map(|problem| format!("{unit}: `{}` {problem}", r.entry)).collect()
}

#[test]
fn kernels_keep_their_budget_on_sm_80() {
    check(&[80, 86]);
}

#[test]
fn kernels_keep_their_budget_on_sm_90() {
    check(&[90]);
}

#[test]
fn kernels_keep_their_budget_on_sm_100() {
    check(&[100]);
}

#[test]
fn every_kernel_has_one_budget_and_every_budget_a_kernel() {
    let mut budgets: Vec<&str> = BUDGETS.iter().map(|budget| budget.entry).collect();
    let sorted = budgets.is_sorted();
    budgets.dedup();
    let mut entries: Vec<&str> = kernels().iter().map(|kernel| kernel.entry).collect();
    entries.sort_unstable();
    entries.dedup();
    assert!(sorted, "by name, so that additions do not collide: {budgets:?}");
    assert_eq!(budgets, entries);
}

#[test]
fn products_that_were_made_one_by_one_are_found() {
    let log = "ptxas info    : 0 bytes gmem\nptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are \
               serialized due to insufficient register resources\nptxas info    : setmaxnreg ignored";
    assert_eq!(complaints(log).count(), 2);
}

#[test]
fn kernels_beyond_their_budget_are_found() {
    let within = Resources {
        entry: BUDGETS[0].entry.to_owned(),
        registers: BUDGETS[0].registers,
        stack_bytes: 0,
        spill_store_bytes: 0,
        spill_load_bytes: 0,
        static_shared_bytes: 0,
    };
    assert_eq!(overdrawn("u", &within), Vec::<String>::new());
    let Budget { registers, .. } = BUDGETS[0];
    let exact = BUDGETS.iter().find(|budget| budget.exactly).unwrap();
    assert_eq!((exact.entry, exact.registers), ("attend_prefill_wgmma", 168));
    let shared_out = |registers| Resources { entry: exact.entry.to_owned(), registers, ..within.clone() };
    assert_eq!(overdrawn("u", &shared_out(168)), Vec::<String>::new());
    for registers in [160, 176] {
        let told = overdrawn("u", &shared_out(registers));
        assert!(told.len() == 1 && told[0].contains("must have 168"), "{told:?}");
    }
    let beyond = [
        Resources { registers: registers + 1, ..within.clone() },
        Resources { stack_bytes: 8, ..within.clone() },
        Resources { spill_load_bytes: 4, ..within.clone() },
        Resources { static_shared_bytes: 1, ..within.clone() },
        Resources { entry: "unknown".to_owned(), ..within },
    ];
    for resources in beyond {
        assert_eq!(overdrawn("u", &resources).len(), 1, "{resources:?}");
    }
}
