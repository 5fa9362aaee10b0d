//! Chat templates: the Jinja text that comes with a model and turns messages into a prompt.
//!
//! A template is a program from a file that nobody vouches for, so it runs with a budget that bounds its time and its
//! memory, and it sees neither files nor a clock.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind};

use crate::Error;
use crate::files::fault::{Fault, quote};
use crate::files::gguf::Metadata;
use crate::tokenizer::Tokenizer;

/// Instructions and, at 64 bytes each, data of one rendering: some seconds and 256 MiB at worst. A prompt of a million tokens
/// takes a small part of it.
const FUEL: u64 = 4 << 20;
const JSON_BYTES_MAX: usize = 16 << 20;
const NAME: &str = "chat_template";

/// A compiled chat template. Clones share it.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    bos: Arc<str>,
    eos: Arc<str>,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the names of the tokens that it may write.
    pub(crate) fn new(source: &str, bos: &str, eos: &str) -> Result<Self, Fault> {
        let mut environment = Environment::new();
        let whitespace = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(whitespace.expect("the delimiters are the usual ones"));
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(100);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| {
            Fault::corrupt(NAME, format!("is not a valid template: {}", quote(&error.to_string())))
        })?;
        Ok(Self {
            environment: Arc::new(environment),
            source: source.into(),
            bos: bos.into(),
            eos: eos.into(),
        })
    }

    /// The template in a GGUF file, if it has one.
    pub(crate) fn from_gguf(metadata: &Metadata<'_>, tokenizer: &Tokenizer) -> Result<Option<Self>, Fault> {
        let Some(source) = metadata.text("tokenizer.chat_template")? else { return Ok(None) };
        let (bos, eos) = tokenizer.frame_names();
        Self::new(source, &bos, &eos).map(Some)
    }

    /// The prompt for a conversation of `(role, content)` messages; with `add_generation_prompt` it ends where the
    /// assistant's answer begins. Encode it with [`crate::SpecialTokens::Add`]: a beginning token that the template writes
    /// is not doubled.
    pub fn render<R: AsRef<str>, C: AsRef<str>>(
        &self,
        messages: &[(R, C)],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|(role, content)| minijinja::context! { role => role.as_ref(), content => content.as_ref() })
            .collect();
        let context = minijinja::context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => &*self.bos,
            eos_token => &*self.eos,
            // Templates tell "no tools" by none, as the reference implementation passes it.
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let template = self.environment.get_template(NAME).expect("the constructor adds the template");
        template.render(context).map_err(|error| {
            let reason = match error.kind() {
                ErrorKind::OutOfFuel => "it takes too much time or memory".into(),
                _ => quote(error.detail().unwrap_or(&error.to_string())),
            };
            Error::Invalid {
                field: "messages".into(),
                problem: format!("cannot be put into the model's chat template: {reason}"),
            }
        })
    }

    /// The Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// JSON as Python's `json.dumps` writes it, which is what templates were made with: spaces after separators, nothing
/// escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut out = String::new();
    write_json(&mut out, &value, indent.map(|width| width.min(16)), 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> Result<(), minijinja::Error> {
    // Lists that hold each other many times are small in memory and endless in JSON.
    if out.len() > JSON_BYTES_MAX {
        return Err(minijinja::Error::from(ErrorKind::OutOfFuel));
    }
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::String => out.push_str(&json_string(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_nested(out, ['[', ']'], &items, indent, depth, |out, item| {
                write_json(out, item, indent, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            write_nested(out, ['{', '}'], &keys, indent, depth, |out, key| {
                out.push_str(&json_string(&key.to_string()));
                out.push_str(": ");
                write_json(out, &value.get_item(key)?, indent, depth + 1)
            })?;
        }
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        // Numbers print as in JSON.
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn write_nested(
    out: &mut String,
    brackets: [char; 2],
    items: &[Value],
    indent: Option<usize>,
    depth: usize,
    mut write: impl FnMut(&mut String, &Value) -> Result<(), minijinja::Error>,
) -> Result<(), minijinja::Error> {
    const DEPTH_MAX: usize = 64;
    if depth > DEPTH_MAX {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "json is nested too deeply"));
    }
    let line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    out.push(brackets[0]);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(out, depth + 1);
        write(out, item)?;
    }
    if !items.is_empty() {
        line(out, depth);
    }
    out.push(brackets[1]);
    Ok(())
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("strings are always valid JSON")
}

#[cfg(test)]
mod tests;
