//! `longshore calibrate`: an offline search for what each head must visit. Prompts are read exactly; at sampled query tiles each
//! candidate is planned and attended beside them, over the same queries, keys and values.

mod budgets;
mod measure;
mod patterns;
mod projection;
mod prompts;

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

use self::prompts::Prompt;
use super::{report::Table, subject::Subject};
use crate::{
    cli::{CalibrateArgs, Search},
    console, process,
};

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn run(args: &CalibrateArgs) -> Result<()> {
    let Some(config) = process::configuration(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    let targets = budgets::targets(&args.targets)?;
    ensure!(
        args.budget > 0.0 && args.budget <= 1.0,
        "`--budget` is {}, must be above 0 and at most 1",
        args.budget
    );
    ensure!(
        args.from < args.tokens,
        "`--from` is {}, must be below `--tokens`, which is {}",
        args.from,
        args.tokens
    );
    let subject = Subject::load(&config, process::compute_pool(&config)?)?;
    let prompts = prompts::all(&subject, args)?;
    console::note(format!("prompts: {}", names(&prompts)));
    let (plan, tables) = match args.search {
        Search::Budgets => budgets::search(&subject, &prompts, args, &targets)?,
        Search::Patterns => patterns::search(&subject, &prompts, args)?,
    };
    for (title, table) in &tables {
        console::say(format!("{title}\n\n{}", table.markdown()));
    }
    write(&args.out, &plan)?;
    console::note(format!("wrote {}", args.out.display()));
    Ok(())
}

/// The text of a plan, and tables with their titles.
type Found = (String, Vec<(String, Table)>);

fn names(prompts: &[Prompt]) -> String {
    prompts.iter().map(|prompt| prompt.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
