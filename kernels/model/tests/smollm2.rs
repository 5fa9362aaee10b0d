//! The default model, as `longshore model pull` leaves it in the cache.

use std::path::PathBuf;

use longshore_model::{LoadedModel, SpecialTokens};

/// The cached file; its absence is a failure with a remedy, never a silent pass.
fn model_path() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("LONGSHORE_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("longshore")))
        .or_else(|| Some(variable("HOME")?.join(".cache/longshore")))
        .expect("one of LONGSHORE_CACHE, XDG_CACHE_HOME and HOME is set");
    let path = cache.join("models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing; hint: run `longshore model pull`", path.display());
    path
}

#[test]
fn smoke() {
    let start = std::time::Instant::now();
    let model = LoadedModel::open(&model_path(), &|_| ()).unwrap();
    println!("{:?} {:#?} {:?}", start.elapsed(), model.info, model.weights);
    let ids = model.info.tokenizer.encode("Hello world 123 <|im_end|> x", SpecialTokens::Add).unwrap();
    println!("{ids:?} {:?}", model.info.tokenizer.decode(&ids));
}
