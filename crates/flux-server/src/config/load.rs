//! Puts the settings together: defaults, then a TOML file, then the environment, then flags.
//!
//! Every value remembers where it came from, so that an error and `flux config` can say so. What is
//! unknown or not allowed is an error, also where a later source would have overruled it.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::{Spanned, Value};

use super::{ConfigError, Form, Role, SETTINGS, Setting, Settings};

/// The variable that names the configuration file; the only `FLUX_*` variable that is no setting.
const FILE_VARIABLE: &str = "FLUX_CONFIG";

/// Where a value was set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere.
    #[default]
    Default,
    /// In the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
    },
    /// In the environment.
    Environment {
        /// The variable.
        variable: String,
    },
    /// On the command line.
    Flag {
        /// The flag, with its dashes.
        flag: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => write!(f, "default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment { variable } => write!(f, "environment variable {variable}"),
            Origin::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// What the caller found outside.
#[derive(Clone, Default)]
pub struct Inputs {
    /// The file that `--config` names; it must exist.
    pub file: Option<PathBuf>,
    /// The file that is read if no other is named and it exists.
    pub default_file: Option<PathBuf>,
    /// The environment; variables that do not begin with `FLUX_` are passed over.
    pub environment: Vec<(String, String)>,
    /// Flags by the setting's name.
    pub flags: Vec<(String, String)>,
}

/// Names only: a value may hold a password.
impl fmt::Debug for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |pairs: &[(String, String)]| {
            pairs.iter().map(|(name, _)| name.clone()).collect::<Vec<String>>()
        };
        f.debug_struct("Inputs")
            .field("file", &self.file)
            .field("default_file", &self.default_file)
            .field("environment", &names(&self.environment))
            .field("flags", &names(&self.flags))
            .finish()
    }
}

/// The effective settings, and where each was set.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    /// The settings.
    pub settings: Settings,
    origins: BTreeMap<&'static str, Origin>,
}

impl Configuration {
    /// Reads the file and lays environment and flags over it.
    ///
    /// # Errors
    /// The first thing that is unknown, not allowed, or unreadable. Rules that span settings are
    /// `validate`'s.
    pub fn load(inputs: &Inputs) -> Result<Configuration, ConfigError> {
        let mut configuration = Configuration::default();
        let named = inputs.environment.iter().find(|(variable, _)| variable == FILE_VARIABLE);
        let explicit = inputs.file.clone().or(named.map(|(_, path)| PathBuf::from(path)));
        match (&explicit, &inputs.default_file) {
            (Some(path), _) => configuration.read_file(path, true)?,
            (None, Some(path)) => configuration.read_file(path, false)?,
            (None, None) => {}
        }
        for (variable, value) in &inputs.environment {
            let Some(name) = variable.strip_prefix("FLUX_") else {
                continue;
            };
            if variable != FILE_VARIABLE {
                let origin = Origin::Environment { variable: variable.clone() };
                configuration.assign(&name.to_lowercase(), value, origin)?;
            }
        }
        for (name, value) in &inputs.flags {
            let flag = format!("--{}", name.replace('_', "-"));
            configuration.assign(name, value, Origin::Flag { flag })?;
        }
        Ok(configuration)
    }

    /// `Settings::validate`, with errors that say where the setting was set.
    ///
    /// # Errors
    /// As `Settings::validate`.
    pub fn validate(&self, role: Role) -> Result<(), ConfigError> {
        self.settings.check(role, |name| self.origin(name))
    }

    /// Where a setting was set.
    pub fn origin(&self, name: &str) -> Origin {
        self.origins.get(name).cloned().unwrap_or_default()
    }

    /// The effective settings as a TOML file, each with its origin in a comment.
    pub fn to_toml(&self) -> String {
        let lines: Vec<(String, Origin)> = SETTINGS
            .iter()
            .map(|setting| {
                let text = self.settings.text(setting.name).unwrap_or_default();
                let value = toml_value(setting.form, &text);
                (format!("{} = {value}", setting.name), self.origin(setting.name))
            })
            .collect();
        let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0);
        lines.iter().map(|(line, origin)| format!("{line:width$}  # {origin}\n")).collect()
    }

    fn read_file(&mut self, path: &Path, required: bool) -> Result<(), ConfigError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => return Ok(()),
            Err(source) => {
                return Err(ConfigError::Unreadable { path: path.into(), source });
            }
        };
        let line_at =
            |offset: usize| 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
        let entries = entries(&text).map_err(|error| ConfigError::Syntax {
            path: path.into(),
            line: error.span().map_or(1, |span| line_at(span.start)),
            message: error.message().to_owned(),
        })?;
        for (start, name, value) in entries {
            let origin = Origin::File { path: path.into(), line: line_at(start) };
            if matches!(self.origin(&name), Origin::File { .. }) {
                return Err(ConfigError::Twice { name, origin });
            }
            self.assign(&name, &plain_text(&value), origin)?;
        }
        Ok(())
    }

    fn assign(&mut self, name: &str, text: &str, origin: Origin) -> Result<(), ConfigError> {
        let Some(setting) = Setting::named(name) else {
            return Err(ConfigError::Unknown { name: name.to_owned(), origin });
        };
        if !self.settings.assign(name, text) {
            return Err(ConfigError::Refused {
                name: setting.name,
                value: if setting.form == Form::Secret { "***" } else { text }.to_owned(),
                origin,
                allowed: setting.allowed(),
            });
        }
        self.origins.insert(setting.name, origin);
        Ok(())
    }
}

/// The settings of a file, in its order: where each name begins, the name, and the value. The rows of
/// the table `[cdc]` are settings whose names begin with `cdc_`.
fn entries(text: &str) -> Result<Vec<(usize, String, Value)>, toml::de::Error> {
    type Table = BTreeMap<Spanned<String>, Value>;

    #[derive(Deserialize)]
    struct Tables {
        cdc: Table,
    }

    let mut entries = Vec::new();
    for (name, value) in toml::from_str::<Table>(text)? {
        let start = name.span().start;
        let name = name.into_inner();
        if name == "cdc" && value.is_table() {
            // Read once more, since a value does not know where its parts stand.
            for (row, value) in toml::from_str::<Tables>(text)?.cdc {
                let start = row.span().start;
                entries.push((start, format!("cdc_{}", row.into_inner()), value));
            }
        } else {
            entries.push((start, name, value));
        }
    }
    entries.sort_by_key(|(start, ..)| *start);
    Ok(entries)
}

/// A TOML value as it would be written in the environment. What no setting can be (a table, say)
/// stays as TOML writes it, and the setting refuses it.
fn plain_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(plain_text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn toml_value(form: Form, text: &str) -> String {
    match form {
        Form::Switch => text.to_owned(),
        Form::Number if text.bytes().all(|byte| byte.is_ascii_digit()) => text.to_owned(),
        Form::List => {
            let parts = text.split(',').filter(|part| !part.is_empty());
            Value::Array(parts.map(|part| Value::String(part.to_owned())).collect()).to_string()
        }
        Form::Text | Form::Number | Form::Secret => Value::String(text.to_owned()).to_string(),
    }
}
