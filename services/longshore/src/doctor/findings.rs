//! What can be wrong with a machine or its settings, and what to do about it.

use longshore_cluster::ClusterView;
use serde::Serialize;

use super::Examination;
use crate::{config::Config, console, members, model::ModelRef};

/// Something that is wrong, and its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    pub(super) problem: String,
    pub(super) remedy: String,
}

impl Problem {
    pub(super) fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { problem: problem.into(), remedy: remedy.into() }
    }
}

/// Models of usual sizes need about this much disk.
const FREE_DISK_BYTES: u64 = 1 << 30;

/// Appends what is wrong.
pub(super) fn look(e: &Examination, config: &Config, problems: &mut Vec<Problem>) {
    e.gpu.problems(config, problems);
    let mut add = |problem: String, remedy: &str| problems.push(Problem::new(problem, remedy));
    if e.instruction_set == "portable" {
        add(
            "the kernels have no vector unit that they know (AVX2 with FMA and F16C, AVX-512, or NEON)"
                .to_owned(),
            "use a machine that has one; a virtual machine may hide it: choose the host's processor model",
        );
    }
    let cores = e.machine.usable_cores.len();
    if cores > 0 && e.compute_threads > cores {
        add(
            format!("{} compute threads on {cores} cores take turns", e.compute_threads),
            "lower `compute.threads`, or leave it 0 for one per core",
        );
    }
    if e.model.path.is_none() {
        let reference = &e.model.reference;
        match ModelRef::parse(reference) {
            Ok(ModelRef::Path(_)) => add(
                format!("the model `{reference}` does not exist"),
                "give the path of a GGUF file or of a folder with safetensors, or a name that `longshore model list` shows",
            ),
            _ => add(
                format!("the model `{reference}` is not in the cache"),
                &format!("run `longshore model pull {reference}`, or let `longshore up` do it"),
            ),
        }
    }
    if e.model_cache_free_bytes.is_some_and(|free| free < FREE_DISK_BYTES) {
        let free = console::bytes(e.model_cache_free_bytes.unwrap_or(0));
        add(
            format!("the disk of the model cache has {free} left"),
            "free some space, or set `LONGSHORE_CACHE` to a folder of another disk",
        );
    }
    let (available, capacity) = (e.machine.memory_available_bytes, config.kvstore.capacity_bytes);
    if available > 0 && capacity > available {
        add(
            format!(
                "a shard may grow to {}, {} of memory is available",
                console::bytes(capacity),
                console::bytes(available)
            ),
            "lower `kvstore.capacity_bytes`",
        );
    }
}

/// Appends that there can never be as many copies as asked for: with so many shards of `longshore up`, or those that are listed.
pub(super) fn look_at_copies(config: &Config, shards: usize, problems: &mut Vec<Problem>) {
    let store = &config.store;
    let cluster = &config.cluster;
    let checked = if cluster.members.is_empty() && cluster.members_file.is_empty() {
        store.check_started(shards)
    } else {
        let members = members::listed(cluster).map_err(|error| console::text(&error));
        let view = members.and_then(|members| ClusterView::new(members).map_err(|error| error.to_string()));
        match view {
            Ok(view) => store.check_listed(&view.shard_map()),
            Err(error) => return problems.push(Problem::new(error, "mend the member list")),
        }
    };
    if let Err(error) = checked {
        let told = error.to_string();
        let (problem, remedy) = told.split_once("; hint: ").unwrap_or((&told, "lower `--copies`"));
        problems.push(Problem::new(problem, remedy));
    }
}

#[cfg(test)]
mod tests {
    use longshore_chassis::Sources;

    use super::*;
    use crate::{
        doctor::{Gpu, ModelState, Settings},
        machine::{Machine, Peaks},
    };

    fn examination(machine: Machine, threads: usize, set: &'static str, model: Option<&str>) -> Examination {
        Examination {
            version: "test",
            machine,
            instruction_sets: vec![set],
            instruction_set: set,
            compute_threads: threads,
            pinned_cores: Vec::new(),
            peaks: Peaks { gflops: 1.0, read_gbps: 1.0, copy_gbps: 1.0 },
            gpu: Gpu::look(&Config::default()),
            model_cache: String::new(),
            model_cache_free_bytes: Some(1 << 40),
            model: ModelState { path: model.map(str::to_owned), ..ModelState::default() },
            settings: Settings::of(&Sources::default(), &Config::default()),
            problems: Vec::new(),
        }
    }

    fn found(e: &Examination) -> Vec<String> {
        let mut problems = Vec::new();
        look(e, &Config::default(), &mut problems);
        assert!(problems.iter().all(|problem| !problem.remedy.is_empty()), "{problems:?}");
        problems.into_iter().map(|problem| problem.problem).collect()
    }

    #[test]
    fn copies_that_cannot_be_are_a_problem() {
        let look = |copies: usize, shards: usize, members: &[&str]| {
            let mut config = Config::default();
            (config.store.copies, config.store.write_acks) = (copies, 1);
            config.cluster.members = members.iter().map(|&member| member.to_owned()).collect();
            let mut problems = Vec::new();
            look_at_copies(&config, shards, &mut problems);
            problems
        };
        assert_eq!(look(1, 1, &[]), []);
        assert_eq!(look(2, 2, &[]), []);
        let [one] = &look(2, 1, &[])[..] else { panic!("one problem") };
        assert!(one.problem.contains("`store.copies` is 2") && one.remedy.contains("--shards 2"), "{one:?}");
        let listed = ["kvstore=kv-0@http://a:1", "kvstore=kv-1@http://b:1"];
        assert_eq!(look(2, 1, &listed), [], "the list counts");
        assert!(look(3, 9, &listed)[0].problem.contains("2 hosts"));
        assert!(look(1, 1, &["nonsense"])[0].problem.contains("cluster.members"));
    }

    #[test]
    fn what_is_wrong_is_found_and_nothing_else() {
        let machine = Machine {
            processor: "a processor".to_owned(),
            usable_cores: vec![0, 1],
            caches: Vec::new(),
            memory_bytes: 16 << 30,
            memory_available_bytes: 8 << 30,
            huge_pages: "madvise".to_owned(),
        };
        assert_eq!(found(&examination(machine.clone(), 2, "avx2", Some("model.gguf"))), Vec::<String>::new());
        let small = Machine { memory_available_bytes: 1 << 30, ..machine };
        let mut ill = examination(small, 3, "portable", None);
        ill.model_cache_free_bytes = Some(1);
        let told = found(&ill).join("; ");
        for sign in
            ["no vector unit", "3 compute threads on 2 cores", "not in the cache", "1 B left", "2.0 GiB"]
        {
            assert!(told.contains(sign), "`{sign}` is missing in {told}");
        }
    }
}
