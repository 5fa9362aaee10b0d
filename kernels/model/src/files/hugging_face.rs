//! Model directories as Hugging Face lays them out: `config.json`, weights, `tokenizer.json`, and what else says which tokens
//! begin and end a text.

mod config;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::fault::{Fault, quote};
use super::mapping::Mapping;
use super::safetensors::Shards;
use super::weights::{Naming, Weights};
use super::{LoadProgress, LoadedModel, describe, digest};
use crate::tokenizer::{JsonTokens, token_text};
use crate::{ChatTemplate, Error, Tokenizer};

pub(crate) use config::model_config;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Small files may not be larger: they are parsed into memory.
const JSON_BYTES_MAX: usize = 64 << 20;

/// Opens a directory.
pub(crate) fn open(directory: &Path, progress: &dyn Fn(LoadProgress)) -> Result<LoadedModel, Error> {
    let folder = Folder { directory };
    let config_file = folder.required(CONFIG)?;
    let config_json = folder.parse(CONFIG, &config_file)?;
    let stem = directory.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    let config = model_config(&config_json, &stem).map_err(|fault| fault.at(&directory.join(CONFIG)))?;

    let generation = folder.optional("generation_config.json")?;
    let tokenizer_config = folder.optional("tokenizer_config.json")?;
    let template_file = folder.optional("chat_template.jinja")?;
    let tokenizer_file = folder.required(TOKENIZER)?;
    let generation_json = folder.parse_optional("generation_config.json", &generation)?;
    let tokenizer_json = folder.parse_optional("tokenizer_config.json", &tokenizer_config)?;

    let tokens = tokens(&config_json, &generation_json, &tokenizer_json);
    let at_tokenizer = |fault: Fault| fault.at(&directory.join(TOKENIZER));
    let tokenizer = Tokenizer::from_json(&tokenizer_file, &tokens).map_err(at_tokenizer)?;
    tokenizer.check_fits(config.vocabulary).map_err(at_tokenizer)?;
    let chat_template = template(template_file.as_deref(), &tokenizer_json, &tokens)
        .map_err(|fault| fault.at(&directory.join("tokenizer_config.json")))?;

    let shards = Shards::open(directory)?;
    let mut parts: Vec<(&str, &Mapping)> = vec![(CONFIG, &config_file), (TOKENIZER, &tokenizer_file)];
    let optional = [
        ("generation_config.json", &generation),
        ("tokenizer_config.json", &tokenizer_config),
        ("chat_template.jinja", &template_file),
    ];
    parts.extend(optional.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?))));
    parts.extend(shards.names.iter().map(String::as_str).zip(shards.files.iter().map(Arc::as_ref)));
    let digest = digest(&parts, progress);
    let weights = Weights::new(Naming::HuggingFace, shards.files, shards.tensors, &config)
        .map_err(|fault| fault.at(directory))?;
    let info = describe(directory, config, tokenizer, chat_template, digest, &weights);
    Ok(LoadedModel { info, weights })
}

/// The directory's small files.
struct Folder<'a> {
    directory: &'a Path,
}

impl Folder<'_> {
    fn required(&self, name: &str) -> Result<Mapping, Error> {
        let file = Mapping::open(&self.directory.join(name))?;
        if file.len() > JSON_BYTES_MAX {
            let problem = format!("has {} bytes, where {JSON_BYTES_MAX} are the limit", file.len());
            return Err(Fault::corrupt("file", problem).at(file.path()));
        }
        Ok(file)
    }

    fn optional(&self, name: &str) -> Result<Option<Mapping>, Error> {
        match self.required(name) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn parse(&self, name: &str, file: &Mapping) -> Result<Value, Error> {
        let value: Result<Value, _> = serde_json::from_slice(file);
        let problem = match value {
            Ok(value) if value.is_object() => return Ok(value),
            Ok(_) => "is not a JSON object".to_owned(),
            Err(error) => format!("is not valid JSON: {}", quote(&error.to_string())),
        };
        Err(Fault::corrupt(name, problem).at(&self.directory.join(name)))
    }

    fn parse_optional(&self, name: &str, file: &Option<Mapping>) -> Result<Value, Error> {
        file.as_ref().map_or(Ok(Value::Null), |file| self.parse(name, file))
    }
}

/// Which tokens begin and end a text. The generation configuration knows best what ends an answer.
fn tokens(config: &Value, generation: &Value, tokenizer: &Value) -> JsonTokens {
    let mut eos_ids = Vec::new();
    for source in [generation, config] {
        match &source["eos_token_id"] {
            Value::Array(ids) => eos_ids.extend(ids.iter().filter_map(Value::as_u64)),
            id => eos_ids.extend(id.as_u64()),
        }
    }
    JsonTokens {
        bos: token_text(&tokenizer["bos_token"]),
        eos: token_text(&tokenizer["eos_token"]),
        eos_ids,
        add_bos: tokenizer["add_bos_token"].as_bool(),
    }
}

/// The template in its own file or in the tokenizer's configuration, where it is a string or a list with names.
fn template(
    file: Option<&[u8]>,
    tokenizer: &Value,
    tokens: &JsonTokens,
) -> Result<Option<ChatTemplate>, Fault> {
    let own = file.map(std::str::from_utf8).transpose();
    let own = own.map_err(|_| Fault::corrupt("chat_template.jinja", "is not valid UTF-8"))?;
    let configured = match &tokenizer["chat_template"] {
        Value::Array(named) => {
            named.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
        }
        single => single.as_str(),
    };
    let name = |token: &Option<String>| token.clone().unwrap_or_default();
    own.or(configured)
        .map(|source| ChatTemplate::new(source, &name(&tokens.bos), &name(&tokens.eos)))
        .transpose()
}

#[cfg(test)]
mod tests;
