//! What the comments of config structs say of each key, for people who have no source at hand.

use std::collections::BTreeMap;

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use super::join;

/// A sentence or two for each dotted key and section.
#[derive(Debug, Clone, Default)]
pub struct Descriptions(BTreeMap<String, String>);

impl Descriptions {
    /// Of a config struct and all that it holds.
    pub fn of<C: JsonSchema>() -> Self {
        let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
        let schema = settings.into_generator().into_root_schema_for::<C>();
        let mut descriptions = BTreeMap::new();
        collect(schema.as_value(), "", &mut descriptions);
        Self(descriptions)
    }

    /// What is said of a key, on one line.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

fn collect(schema: &Value, path: &str, into: &mut BTreeMap<String, String>) {
    let properties = schema.get("properties").and_then(Value::as_object);
    for (name, property) in properties.into_iter().flatten() {
        let path = join(path, name);
        if let Some(text) = property.get("description").and_then(Value::as_str) {
            into.insert(path.clone(), text.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        collect(property, &path, into);
    }
}
