//! The default model in the user's cache.

use std::path::PathBuf;
use std::sync::LazyLock;

use longshore_model::LoadedModel;

/// The model, read once.
pub(crate) static MODEL: LazyLock<LoadedModel> =
    LazyLock::new(|| LoadedModel::open(&model_path(), &|_| ()).expect("the model opens"));

/// The cached file; its absence is a failure with a remedy, never a silent pass.
pub(crate) fn model_path() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("LONGSHORE_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("longshore")))
        .or_else(|| Some(variable("HOME")?.join(".cache/longshore")))
        .expect("one of LONGSHORE_CACHE, XDG_CACHE_HOME and HOME is set");
    let path = cache.join("models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing; hint: run `longshore model pull`", path.display());
    path
}
