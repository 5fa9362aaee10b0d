//! What an evaluation leaves: a Markdown table on stdout, JSON, pictures.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use longshore_compute::InstructionSet;
use serde::Serialize;

use super::subject::Subject;
use crate::{cli::OutputArgs, console, machine::Machine};

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

/// Under what everything was measured.
#[derive(Debug, Serialize)]
pub(super) struct Conditions {
    pub(super) model: String,
    pub(super) kv_dtype: &'static str,
    pub(super) position: String,
    pub(super) chunk_tokens: usize,
    pub(super) threads: usize,
}

impl Conditions {
    /// Those of a model.
    pub(super) fn of(subject: &Subject) -> Self {
        Self {
            model: subject.node.name.clone(),
            kv_dtype: subject.node.tile_shape.dtype.name(),
            position: subject.node.info.config.position_fingerprint(),
            chunk_tokens: subject.chunk_tokens(),
            threads: subject.pool.threads(),
        }
    }
}

/// All that is told.
#[derive(Debug, Serialize)]
struct Document<'a, T> {
    version: &'static str,
    evaluation: &'a str,
    #[serde(flatten)]
    conditions: &'a Conditions,
    instruction_set: &'static str,
    machine: Machine,
    results: &'a T,
}

impl<T: Serialize> Document<'_, T> {
    fn conditions(&self) -> String {
        format!(
            "longshore {} eval {}: {}, {} KV, {}, {}, {} threads",
            self.version,
            self.evaluation,
            self.conditions.model,
            self.conditions.kv_dtype,
            self.machine.processor,
            self.instruction_set,
            self.conditions.threads
        )
    }
}

/// Says what was found: conditions and tables to standard output; Markdown and JSON where the flags want them.
pub(super) fn tell<T: Serialize>(
    conditions: &Conditions,
    args: &OutputArgs,
    evaluation: &str,
    tables: &[(String, Table)],
    results: &T,
) -> Result<()> {
    let (version, machine) = (env!("CARGO_PKG_VERSION"), Machine::read());
    let instruction_set = InstructionSet::detect().name();
    let document = Document { version, evaluation, conditions, instruction_set, machine, results };
    let tables: Vec<String> =
        tables.iter().map(|(title, table)| format!("{title}\n\n{}", table.markdown())).collect();
    let text = format!("{}\n\n{}", document.conditions(), tables.join("\n"));
    console::say(&text);
    if args.json.is_none() && args.out.is_none() {
        return Ok(());
    }
    let json = serde_json::to_string_pretty(&document).context("a report is JSON")? + "\n";
    if let Some(path) = &args.json {
        fs::write(path, &json).with_context(|| format!("`--json`: cannot write `{}`", path.display()))?;
    }
    file(args, evaluation, "json", &json)?;
    file(args, evaluation, "md", &text)?;
    Ok(())
}

/// Writes a picture into the folder of `--out`, if there is one.
pub(super) fn picture(args: &OutputArgs, name: &str, svg: &str) -> Result<()> {
    if let Some(path) = file(args, name, "svg", svg)? {
        console::note(format!("drew {}", path.display()));
    }
    Ok(())
}

/// Refuses, before anything is computed, a place for results that cannot be written.
pub(super) fn check_places(args: &OutputArgs) -> Result<()> {
    if let Some(folder) = &args.out {
        fs::create_dir_all(folder)
            .with_context(|| format!("`--out`: cannot create `{}`", folder.display()))?;
    }
    if let Some(path) = &args.json {
        let open = fs::File::options().append(true).create(true).open(path);
        open.with_context(|| format!("`--json`: cannot write `{}`", path.display()))?;
    }
    Ok(())
}

/// Writes into the folder of `--out`; where to, if there is one.
fn file(args: &OutputArgs, name: &str, kind: &str, text: &str) -> Result<Option<PathBuf>> {
    let Some(folder) = &args.out else { return Ok(None) };
    fs::create_dir_all(folder).with_context(|| format!("`--out`: cannot create `{}`", folder.display()))?;
    let path = folder.join(format!("{}.{kind}", file_name(name)));
    fs::write(&path, text).with_context(|| format!("`--out`: cannot write `{}`", path.display()))?;
    Ok(Some(path))
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
