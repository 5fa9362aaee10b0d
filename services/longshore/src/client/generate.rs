//! `longshore generate`: one prompt, one answer.

use std::io::{IsTerminal, Read};

use anyhow::{Context, Result, bail};
use longshore_fabric::CallContext;
use longshore_proto::types::PromptChunk;

use super::stream;
use crate::cli::GenerateArgs;

/// Token ids of one chunk.
const CHUNK_TOKENS: usize = 16_384;

/// Runs the command.
pub(crate) async fn generate(args: GenerateArgs) -> Result<()> {
    let mut start = stream::start(&args.sampling);
    start.skip_special_tokens = args.no_bos;
    let ctx = CallContext::new("");
    stream::run(&args.url, start, prompt(&args)?, &ctx).await.map(drop)
}

fn prompt(args: &GenerateArgs) -> Result<Vec<PromptChunk>> {
    if let Some(path) = &args.token_file {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        return token_chunks(&text);
    }
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), None) => prompt.clone(),
        (None, Some(path)) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {} as UTF-8", path.display()))?,
        (None, None) if !std::io::stdin().is_terminal() => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("cannot read the prompt from standard input as UTF-8")?;
            text
        }
        _ => bail!(
            "no prompt; hint: `longshore generate \"The capital of France is\"`, `--file`, or pipe it in"
        ),
    };
    Ok(stream::text_chunks(&text))
}

fn token_chunks(text: &str) -> Result<Vec<PromptChunk>> {
    let parse =
        |word: &str| word.parse::<u32>().with_context(|| format!("`--token-file`: `{word}` is no token id"));
    let ids: Vec<u32> = text.split_whitespace().map(parse).collect::<Result<_>>()?;
    Ok(ids.chunks(CHUNK_TOKENS).map(|chunk| PromptChunk::Tokens(chunk.to_vec())).collect())
}
