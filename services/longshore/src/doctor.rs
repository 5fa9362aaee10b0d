//! `longshore doctor`: what this machine has, what was chosen, what applies, and what is wrong with a remedy for each.

mod findings;
mod gpu;
mod places;
mod settings;

use anyhow::{Context, Result, ensure};
use longshore_compute::InstructionSet;
use serde::Serialize;

use self::{findings::Problem, gpu::Gpu, settings::Settings};
use crate::{
    cli::DoctorArgs,
    config::Config,
    console,
    machine::{Machine, Peaks, describe_cores, free_disk_bytes},
    model::{Cache, ModelRef},
    process,
};

/// Everything that is looked at.
#[derive(Debug, Serialize)]
struct Examination {
    version: &'static str,
    machine: Machine,
    instruction_sets: Vec<&'static str>,
    instruction_set: &'static str,
    compute_threads: usize,
    pinned_cores: Vec<usize>,
    peaks: Peaks,
    gpu: Gpu,
    model_cache: String,
    model_cache_free_bytes: Option<u64>,
    model: ModelState,
    settings: Settings,
    problems: Vec<Problem>,
}

/// The configured model in the cache.
#[derive(Debug, Default, Serialize)]
struct ModelState {
    reference: String,
    /// Where it lies; `None`: it was not fetched.
    path: Option<String>,
    /// Shape in a few words.
    description: Option<String>,
    file_bytes: Option<u64>,
}

/// Arrays of this many caches are read; a doctor is asked for seconds, not minutes.
const CACHES_READ: u64 = 4;
const BURSTS: usize = 5;

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let sources = process::sources(&args.up.serve, args.up.settings());
    let mut problems = Vec::new();
    // What is wrong with the configuration is one more finding; the rest is looked at with the defaults then.
    let loaded = longshore_chassis::load::<Config>(&sources);
    if let Err(error) = &loaded {
        problems.push(Problem::new(error.to_string(), "mend the values that are named"));
    }
    let (is_sound, config) = (loaded.is_ok(), loaded.unwrap_or_default());
    let machine = Machine::read();
    let pool = process::compute_pool(&config)?;
    let array_bytes = (machine.last_cache_bytes() * CACHES_READ).clamp(64 << 20, 512 << 20);
    let peaks = Peaks::measure(&pool, array_bytes, BURSTS);
    let cache = Cache::of_user()?;
    let model = model_state(&cache, &config, &mut problems);
    let examination = Examination {
        version: env!("CARGO_PKG_VERSION"),
        instruction_sets: InstructionSet::available().into_iter().map(InstructionSet::name).collect(),
        instruction_set: InstructionSet::detect().name(),
        compute_threads: pool.threads(),
        pinned_cores: config.compute.pool_options().pin,
        peaks,
        gpu: Gpu::look(&config),
        model_cache: cache.models().display().to_string(),
        model_cache_free_bytes: free_disk_bytes(&cache.models()),
        model,
        settings: Settings::of(&sources, &config),
        problems: Vec::new(),
        machine,
    };
    findings::look(&examination, &config, &mut problems);
    findings::look_at_copies(&config, args.up.shards.into(), &mut problems);
    if is_sound {
        places::look(&config, &mut problems);
    }
    let examination = Examination { problems, ..examination };
    tell(&examination, args.json)?;
    let found = examination.problems.len();
    ensure!(found == 0, "{found} {} found", if found == 1 { "problem was" } else { "problems were" });
    Ok(())
}

fn model_state(cache: &Cache, config: &Config, problems: &mut Vec<Problem>) -> ModelState {
    let reference = config.model.reference.clone();
    let found = ModelRef::parse(&reference).ok().and_then(|reference| cache.find(&reference));
    let Some(path) = found else { return ModelState { reference, ..ModelState::default() } };
    let mut state = ModelState { reference, path: Some(path.display().to_string()), ..ModelState::default() };
    match longshore_model::ModelInfo::open(&path) {
        Ok(info) => {
            let (c, per_token) = (&info.config, crate::model::kv_bytes_per_token(&info, config.kv_dtype()));
            state.file_bytes = Some(info.file_bytes);
            state.description = Some(format!(
                "{}, {} layers, {}, {} per token of KV ({})",
                c.architecture,
                c.layers,
                info.quantization,
                console::bytes(per_token),
                config.kv_dtype().name()
            ));
        }
        Err(error) => {
            let remedy = format!("remove it and run `longshore model pull {}`", state.reference);
            problems.push(Problem::new(format!("the model cannot be read: {error}"), remedy));
        }
    }
    state
}

fn tell(examination: &Examination, as_json: bool) -> Result<()> {
    if as_json {
        console::say(serde_json::to_string_pretty(examination).context("findings are JSON")?);
        return Ok(());
    }
    for (key, value) in lines(examination) {
        console::say(format!("{key:18} {value}"));
    }
    console::say("");
    if examination.problems.is_empty() {
        console::say("no problem found");
    }
    for problem in &examination.problems {
        console::say(format!("problem: {}\n  remedy: {}", problem.problem, problem.remedy));
    }
    Ok(())
}

fn lines(e: &Examination) -> Vec<(&'static str, String)> {
    let unknown = || "unknown".to_owned();
    let size = |bytes: u64| if bytes == 0 { unknown() } else { console::bytes(bytes) };
    let m = &e.machine;
    let caches: Vec<_> =
        m.caches.iter().map(|cache| format!("L{} {}", cache.level, console::bytes(cache.bytes))).collect();
    let pinned = match e.pinned_cores.is_empty() {
        true => "not pinned".to_owned(),
        false => format!("on cores {}", describe_cores(&e.pinned_cores)),
    };
    let model = match (&e.model.path, &e.model.description) {
        (None, _) => format!("{}, not fetched", e.model.reference),
        (Some(path), None) => format!("{} at {path}, cannot be read", e.model.reference),
        (Some(path), Some(description)) => format!("{} at {path}: {description}", e.model.reference),
    };
    let free = e.model_cache_free_bytes.map_or_else(unknown, console::bytes);
    let mut lines = vec![
        ("longshore", e.version.to_owned()),
        ("processor", m.processor.clone()),
        ("cores", if m.usable_cores.is_empty() { unknown() } else { describe_cores(&m.usable_cores) }),
        ("caches", if caches.is_empty() { unknown() } else { caches.join(", ") }),
        ("memory", format!("{}, {} available", size(m.memory_bytes), size(m.memory_available_bytes))),
        ("huge pages", m.huge_pages.clone()),
        ("instruction set", format!("{} of {}", e.instruction_set, e.instruction_sets.join(", "))),
        ("compute threads", format!("{}, {pinned}", e.compute_threads)),
        ("multiply-adds", format!("{:.0} GFLOP/s (f32, all compute threads)", e.peaks.gflops)),
        ("memory read", format!("{:.1} GB/s", e.peaks.read_gbps)),
    ];
    lines.extend(e.gpu.lines());
    lines.extend([("model cache", format!("{}, {free} free", e.model_cache)), ("model", model)]);
    lines.extend(e.settings.lines());
    lines
}
