//! What a calibration reads: texts, and generated tasks that need one place among many.

use anyhow::{Context, Result, ensure};
use longshore_model::SpecialTokens;

use crate::{
    cli::{CalibrateArgs, RulerTask},
    eval::{
        subject::Subject,
        tasks::{Kind, Task},
        text::Asker,
    },
};

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Where it comes from.
    pub(super) name: String,
    pub(super) tokens: Vec<u32>,
}

/// The project's own sources, in the order of reading: another text than evaluations read.
const OWN: [&str; 12] = [
    include_str!("../../../../../kernels/attention/src/executor.rs"),
    include_str!("../../../../../kernels/attention/src/policy.rs"),
    include_str!("../../../../../proto/longshore/v1/inference.proto"),
    include_str!("../../../../../kernels/attention/src/summaries.rs"),
    include_str!("../../../../../kernels/attention/src/partial.rs"),
    include_str!("../../../../../proto/longshore/v1/kvstore.proto"),
    include_str!("../../../../../kernels/attention/src/tile.rs"),
    include_str!("../../../../../kernels/attention/src/executor/schedule.rs"),
    include_str!("../../../../../kernels/model/src/rope.rs"),
    include_str!("../../../../../kernels/model/src/cpu.rs"),
    include_str!("../../../../../kernels/model/src/files/weights.rs"),
    include_str!("../../../../../kernels/model/src/sampler.rs"),
];

/// Tasks of the generated prompts, in turn.
const TASKS: [RulerTask; 4] =
    [RulerTask::NiahMultikey, RulerTask::Threading, RulerTask::Vt, RulerTask::NiahMultiquery];

/// Samples from this one on are of calibrations: evaluations count from 0.
const FIRST_SAMPLE: u64 = 1 << 40;

/// All prompts of the flags.
pub(super) fn all(subject: &Subject, args: &CalibrateArgs) -> Result<Vec<Prompt>> {
    subject.check_lengths(&[args.tokens])?;
    let mut prompts = Vec::new();
    if args.texts.is_empty() {
        prompts.push(text(subject, "own sources", &OWN.join("\n\n"), args.tokens)?);
    }
    for path in &args.texts {
        let read = std::fs::read_to_string(path);
        let read = read.with_context(|| format!("`--text`: cannot read {} as UTF-8", path.display()))?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        prompts.push(text(subject, &name, &read, args.tokens)?);
    }
    for (index, task) in (0..args.retrieval).zip(TASKS.iter().cycle()) {
        prompts.push(retrieval(subject, *task, args, u64::from(index))?);
    }
    Ok(prompts)
}

fn text(subject: &Subject, name: &str, text: &str, tokens: u32) -> Result<Prompt> {
    let mut ids = subject.node.info.tokenizer.encode(text, SpecialTokens::Add)?;
    ensure!(
        ids.len() >= tokens as usize,
        "`--tokens` is {tokens}, the text {name} has {}; hint: give a longer one with `--text`",
        ids.len()
    );
    ids.truncate(tokens as usize);
    Ok(Prompt { name: name.to_owned(), tokens: ids })
}

fn retrieval(subject: &Subject, task: RulerTask, args: &CalibrateArgs, index: u64) -> Result<Prompt> {
    let (kind, asker) = (Kind::Ruler(task), Asker::new(subject, true));
    let count = |task: &Task| Ok(asker.encode(task)?.len());
    let sample = FIRST_SAMPLE.wrapping_add(args.seed << 10).wrapping_add(index);
    let task = kind.fitted(args.tokens as usize, sample, &count)?;
    Ok(Prompt { name: kind.name().to_owned(), tokens: asker.encode(&task)? })
}
