//! Which configuration applies: its sources, and the values that are not the defaults.

use longshore_chassis::Sources;
use serde::Serialize;
use serde_json::Value;

use crate::config::Config;

/// Sources of the configuration and what they changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Settings {
    /// Configuration file.
    file: Option<String>,
    /// Environment variables that set values.
    environment: Vec<String>,
    /// `key = value` of everything that is not the default.
    changed: Vec<String>,
}

impl Settings {
    /// Looks at where `config` came from.
    pub(super) fn of(sources: &Sources, config: &Config) -> Self {
        let mut changed = Vec::new();
        let json = |config: &Config| serde_json::to_value(config).unwrap_or_default();
        differences("", &json(&Config::default()), &json(config), &mut changed);
        let reserved = |name: &str| sources.reserved_env.iter().any(|reserved| reserved == name);
        let names = sources.env.iter().map(|(name, _)| name.clone()).filter(|name| !reserved(name));
        Self {
            file: sources.file.as_ref().map(|path| path.display().to_string()),
            environment: names.collect(),
            changed,
        }
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let file = self.file.clone().unwrap_or_else(|| "no file (`--config` names one)".to_owned());
        let mut lines = vec![("configuration", file)];
        if !self.environment.is_empty() {
            lines.push(("environment", self.environment.join(", ")));
        }
        match self.changed.is_empty() {
            true => lines.push(("settings", "all defaults".to_owned())),
            false => lines.extend(self.changed.iter().map(|change| ("setting", change.clone()))),
        }
        lines
    }
}

/// Appends `key = value` for every leaf that differs.
fn differences(path: &str, default: &Value, value: &Value, changed: &mut Vec<String>) {
    match (default, value) {
        (Value::Object(default), Value::Object(value)) => {
            for (key, value) in value {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differences(&path, default.get(key).unwrap_or(&Value::Null), value, changed);
            }
        }
        _ if default != value => changed.push(format!("{path} = {value}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_values_are_named() {
        let mut config = Config::default();
        assert_eq!(Settings::of(&Sources::default(), &config).changed, Vec::<String>::new());
        config.compute.threads = 3;
        config.model.linear = "f32".to_owned();
        let mut sources = Sources::default();
        let variable = |name: &str| (name.to_owned(), String::new());
        sources.env = vec![variable("LONGSHORE_CACHE"), variable("LONGSHORE_COMPUTE__THREADS")];
        let settings = Settings::of(&sources, &config);
        assert_eq!(settings.changed, ["compute.threads = 3", "model.linear = \"f32\""]);
        assert_eq!(settings.environment, ["LONGSHORE_COMPUTE__THREADS"]);
    }
}
