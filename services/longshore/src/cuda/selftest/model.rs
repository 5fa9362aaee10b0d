//! The model whose greedy tokens the self-test compares.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result, ensure};
use longshore_cuda::selftest::Greedy;
use longshore_model::{LoadedModel, SpecialTokens};

use crate::{
    config::Config,
    model::{Cache, DEFAULT_MODEL, ModelRef},
    process,
};

/// Tokens that are compared.
const TOKENS: usize = 64;
/// What they follow.
const PROMPT: &str = "The harbour master kept a book of every ship that came in. He wrote down its name, the port it had left, \
    what it carried, and how many days it had been at sea. One morning a ship came in that had no name, and";

/// The model of the configuration, with its prompt; else why there is nothing to compare: the default model is not in the cache. Nothing
/// is fetched. Refuses a model that was asked for and is not there.
pub(super) fn greedy(config: &Config) -> Result<Result<Greedy, String>> {
    let path = match find(&config.model.reference, &Cache::of_user()?)? {
        Ok(path) => path,
        Err(reason) => return Ok(Err(reason)),
    };
    let model = LoadedModel::open(&path, &|_| ())
        .with_context(|| format!("cannot read the model `{}`", path.display()))?;
    let prompt = model.info.tokenizer.encode(PROMPT, SpecialTokens::Add)?;
    ensure!(!prompt.is_empty(), "`{}` makes no tokens of text", config.model.reference);
    let pool = process::compute_pool(config)?;
    Ok(Ok(Greedy { model: Arc::new(model), prompt, count: TOKENS, pool }))
}

fn find(reference: &str, cache: &Cache) -> Result<Result<PathBuf, String>> {
    let parsed = ModelRef::parse(reference)?;
    let found = cache.find(&parsed);
    if reference == DEFAULT_MODEL {
        let missing =
            || format!("`{reference}` is not in the cache; hint: `longshore model pull`, or `--model`");
        return Ok(found.ok_or_else(missing));
    }
    let missing = || {
        format!(
            "`--model {reference}` is not there; hint: give a path, or `longshore model pull {reference}`"
        )
    };
    found.map(Ok).with_context(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_model_may_be_missing_and_others_may_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(folder.path());
        let reason = find(DEFAULT_MODEL, &cache).unwrap().unwrap_err();
        assert!(reason.contains("not in the cache") && reason.contains("longshore model pull"), "{reason}");
        for reference in ["/no/such/model.gguf", "pypi:some-model==1.0", "hf:org/name"] {
            let error = find(reference, &cache).unwrap_err().to_string();
            assert!(error.contains("--model") && error.contains("hint: "), "{error}");
        }
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, "").unwrap();
        assert_eq!(find(path.to_str().unwrap(), &cache).unwrap().unwrap(), path);
    }
}
