//! What an evaluation leaves: a Markdown table on stdout, JSON, pictures.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use longshore_compute::InstructionSet;
use serde::Serialize;

use super::subject::Subject;
use crate::{cli::EvalArgs, console, machine::Machine};

/// A Markdown table.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub(super) fn new<T: Into<String>>(head: impl IntoIterator<Item = T>) -> Self {
        Self { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row; it must have as many cells as there are columns.
    pub(super) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        debug_assert_eq!(cells.len(), self.head.len());
        self.rows.push(cells);
    }

    /// Its text.
    pub(super) fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule: Vec<String> = self.head.iter().map(|_| "---".to_owned()).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.head) + &line(&rule) + &rows
    }
}

/// Under what everything was measured, and what was found.
#[derive(Debug, Serialize)]
struct Document<'a, T> {
    version: &'static str,
    evaluation: &'a str,
    model: &'a str,
    kv_dtype: &'static str,
    position: String,
    chunk_tokens: usize,
    threads: usize,
    instruction_set: &'static str,
    machine: Machine,
    results: &'a T,
}

/// Says what was found: conditions and tables to standard output, JSON and pictures where the flags want them.
pub(super) fn tell<T: Serialize>(
    subject: &Subject,
    args: &EvalArgs,
    evaluation: &str,
    tables: &[(String, Table)],
    results: &T,
) -> Result<()> {
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        evaluation,
        model: &subject.node.name,
        kv_dtype: subject.node.tile_shape.dtype.name(),
        position: subject.node.info.config.position_fingerprint(),
        chunk_tokens: subject.chunk_tokens(),
        threads: subject.pool.threads(),
        instruction_set: InstructionSet::detect().name(),
        machine: Machine::read(),
        results,
    };
    console::say(format!(
        "longshore {} eval {evaluation}: {}, {} KV, {}, {}, {} threads\n",
        document.version,
        document.model,
        document.kv_dtype,
        document.machine.processor,
        document.instruction_set,
        document.threads
    ));
    for (title, table) in tables {
        console::say(format!("{title}\n\n{}", table.markdown()));
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&document).context("a report is JSON")? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}

/// Writes a picture into the folder of `--out`, if there is one.
pub(super) fn picture(args: &EvalArgs, name: &str, svg: &str) -> Result<()> {
    let Some(folder) = &args.out else { return Ok(()) };
    fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
    let path = folder.join(Path::new(&file_name(name)).with_extension("svg"));
    fs::write(&path, svg).with_context(|| format!("cannot write `{}`", path.display()))?;
    console::note(format!("drew {}", path.display()));
    Ok(())
}

/// A name without what file systems dislike.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// A share as a percentage.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_markdown() {
        let mut table = Table::new(["policy", "score"]);
        table.row(["exact", "1"]);
        assert_eq!(table.markdown(), "| policy | score |\n| --- | --- |\n| exact | 1 |\n");
        assert_eq!(file_name("needle balanced:alpha=0.1"), "needle-balanced-alpha-0-1");
        assert_eq!(percent(0.985), "98.5 %");
    }
}
