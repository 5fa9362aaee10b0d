//! A long natural text: a file, or the project's own documents and licence.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use longshore_model::SpecialTokens;

use super::subject::Subject;

/// In the order of reading.
const OWN: [&str; 12] = [
    include_str!("../../../../README.md"),
    include_str!("../../../../docs/architecture.md"),
    include_str!("../../../../LICENSE"),
    include_str!("../../../../docs/sparse-prefill.md"),
    include_str!("../../../../docs/operations.md"),
    include_str!("../../../../docs/protocol.md"),
    include_str!("../../../../docs/performance.md"),
    include_str!("../../../../docs/adr/0001-bits-never-depend-on-placement.md"),
    include_str!("../../../../docs/adr/0002-the-store-holds-full-blocks.md"),
    include_str!("../../../../docs/adr/0005-compute-pool.md"),
    include_str!("../../../../docs/adr/0006-int8-activations.md"),
    include_str!("../../../../docs/glossary.md"),
];

/// The first `tokens` tokens of the text.
pub(super) fn read(subject: &Subject, file: Option<&Path>, tokens: u32) -> Result<Vec<u32>> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("`--text`: cannot read {} as UTF-8", path.display()))?,
        None => OWN.join("\n\n"),
    };
    let mut ids = subject.node.info.tokenizer.encode(&text, SpecialTokens::Add)?;
    ensure!(
        ids.len() >= tokens as usize,
        "`--tokens` is {tokens}, the text has {}; hint: give a longer one with `--text`",
        ids.len()
    );
    ids.truncate(tokens as usize);
    Ok(ids)
}
