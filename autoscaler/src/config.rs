//! What a simulation is made of: tiers, limits, service time and policies, from a TOML file or from the defaults.
//!
//! A policy's setting may be a list: then the policy is tried with each value, and with each combination where several
//! are lists. Unknown keys are errors that name the nearest known one.

mod keys;
mod values;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use toml::{Table, Value};

use self::keys::{Keys, nearest};
use crate::error::{Error, Result};
use crate::policy::fixed::Fixed;
use crate::policy::hpa::{self, Hpa};
use crate::policy::kpa::{self, Kpa};
use crate::policy::rewarm::{self, Rewarm};
use crate::policy::tracker::{self, Tracker};
use crate::policy::{Limits, Policy};
use crate::queue::QueueLimits;
use crate::simulate::{Scenario, StartSamples};
use crate::trace::ServiceTime;

/// Most combinations of one policy's lists.
const COMBINATIONS_MAX: usize = 10_000;

/// A simulation, without its traces.
#[derive(Debug, Clone)]
pub struct Config {
    /// Tiers and limits.
    pub scenario: Scenario,
    /// For traces that have tokens in place of seconds.
    pub service: ServiceTime,
    /// The policies of the file; none where it names none.
    pub policies: Vec<PolicySpec>,
}

/// A policy with its settings.
#[derive(Debug, Clone)]
pub struct PolicySpec {
    /// Its name in the file, or that of its kind.
    pub name: String,
    /// What it is.
    pub kind: PolicyKind,
}

/// The kinds of policies, each with its settings.
#[derive(Debug, Clone)]
pub enum PolicyKind {
    /// Ours.
    Rewarm(rewarm::Settings),
    /// Knative's.
    Kpa(kpa::Settings),
    /// Kubernetes' and KEDA's.
    Hpa(hpa::Settings),
    /// Requests divided by a target.
    Tracker(tracker::Settings),
    /// A number.
    Fixed(FixedSettings),
}

/// Settings of `fixed`.
#[derive(Debug, Clone, Copy, Default)]
pub struct FixedSettings {
    /// How many; without it as many as the pool may have.
    pub replicas: Option<u32>,
}

impl PolicyKind {
    /// Names of all kinds.
    pub const NAMES: [&'static str; 5] = ["rewarm", "kpa", "hpa", "tracker", "fixed"];

    /// A kind with its default settings.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "rewarm" => PolicyKind::Rewarm(rewarm::Settings::default()),
            "kpa" => PolicyKind::Kpa(kpa::Settings::default()),
            "hpa" => PolicyKind::Hpa(hpa::Settings::default()),
            "tracker" => PolicyKind::Tracker(tracker::Settings::default()),
            "fixed" => PolicyKind::Fixed(FixedSettings::default()),
            _ => return None,
        })
    }

    fn keys(&mut self) -> &mut dyn Keys {
        match self {
            PolicyKind::Rewarm(settings) => settings,
            PolicyKind::Kpa(settings) => settings,
            PolicyKind::Hpa(settings) => settings,
            PolicyKind::Tracker(settings) => settings,
            PolicyKind::Fixed(settings) => settings,
        }
    }
}

impl PolicySpec {
    /// A built-in kind under its own name, with its default settings.
    ///
    /// # Errors
    /// No kind has this name.
    pub fn built_in(name: &str) -> Result<Self> {
        let kind = PolicyKind::by_name(name).ok_or_else(|| unknown_policy(name, &[]))?;
        Ok(Self { name: name.to_owned(), kind })
    }

    /// One policy of a configuration: the name of a kind, or a table of settings with `kind`.
    ///
    /// # Errors
    /// An unknown kind or setting, a value that makes no sense, or lists of values.
    pub fn from_value(value: &Value, place: &str) -> Result<Self> {
        const EXPECTED: &str = "the name of a policy, or a table of its settings with kind";
        let settings = match value {
            Value::String(name) => return Self::built_in(name),
            Value::Table(settings) => settings,
            other => return Err(bad("policy", place, other, EXPECTED)),
        };
        let Some(Value::String(kind)) = settings.get("kind") else {
            return Err(bad("policy", place, value, EXPECTED));
        };
        let mut specs = combinations(kind, settings, place)?;
        match (specs.pop(), specs.is_empty()) {
            (Some(spec), true) => Ok(spec),
            _ => Err(bad("policy", place, value, "one value for each setting")),
        }
    }

    /// The policy at the beginning of a run.
    #[must_use]
    pub fn build(&self, limits: &Limits) -> Box<dyn Policy> {
        match &self.kind {
            PolicyKind::Rewarm(settings) => Box::new(Rewarm::new(*settings)),
            PolicyKind::Kpa(settings) => Box::new(Kpa::new(*settings, limits.concurrency)),
            PolicyKind::Hpa(settings) => Box::new(Hpa::new(*settings)),
            PolicyKind::Tracker(settings) => Box::new(Tracker::new(*settings)),
            PolicyKind::Fixed(settings) => Box::new(Fixed::new(settings.replicas)),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let limits = Limits { concurrency: 8, min: 0, max: 16, target_wait: Duration::from_secs(1) };
        let scenario = Scenario {
            wake: StartSamples::Fixed(Duration::from_millis(500)),
            restore: Some(StartSamples::Fixed(Duration::from_secs(5))),
            cold: StartSamples::Fixed(Duration::from_secs(60)),
            warm: 4,
            limits,
            queue: QueueLimits::NONE,
            replica_memory: 1 << 30,
            seed: 1,
            clairvoyant: false,
        };
        Self { scenario, service: ServiceTime::default(), policies: Vec::new() }
    }
}

impl Config {
    /// The defaults, changed by a file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has an unknown key or a value that makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ReadFile {
            what: "configuration",
            path: path.to_owned(),
            source,
        })?;
        let source = |source| Error::ParseConfig { path: path.to_owned(), source: Box::new(source) };
        let table: Table = text.parse().map_err(source)?;
        Self::from_table(table, &format!("configuration {}", path.display()))
    }

    fn from_table(mut table: Table, place: &str) -> Result<Self> {
        let mut config = Self::default();
        let policies = table.remove("policy");
        for (name, value) in &table {
            set(&mut config, name, value, place)?;
        }
        match policies {
            None => {}
            Some(Value::Table(policies)) => {
                for (name, value) in policies {
                    let Value::Table(settings) = value else {
                        return Err(bad("policy", place, &value, "tables such as [policy.NAME]"));
                    };
                    config.policies.extend(combinations(&name, &settings, place)?);
                }
            }
            Some(other) => return Err(bad("policy", place, &other, "tables such as [policy.NAME]")),
        }
        Ok(config)
    }

    /// The policies with these names, of the file or built in. Without names: the file's, or every kind where it has none.
    ///
    /// # Errors
    /// A name that is neither.
    pub fn select(&self, names: &[String]) -> Result<Vec<PolicySpec>> {
        if names.is_empty() && !self.policies.is_empty() {
            return Ok(self.policies.clone());
        }
        if names.is_empty() {
            return PolicyKind::NAMES.iter().map(|name| PolicySpec::built_in(name)).collect();
        }
        let mut selected = Vec::new();
        for name in names {
            // A policy with lists stands for all its combinations.
            let of = |spec: &&PolicySpec| spec.name == *name || spec.name.starts_with(&format!("{name} "));
            let before = selected.len();
            selected.extend(self.policies.iter().filter(of).cloned());
            if selected.len() == before {
                let kind = PolicyKind::by_name(name).ok_or_else(|| unknown_policy(name, &self.policies))?;
                selected.push(PolicySpec { name: name.clone(), kind });
            }
        }
        Ok(selected)
    }
}

/// Every combination of a policy's lists.
fn combinations(name: &str, settings: &Table, place: &str) -> Result<Vec<PolicySpec>> {
    let place = format!("{place}, policy {name}");
    let kind = match settings.get("kind") {
        Some(Value::String(kind)) => PolicyKind::by_name(kind).ok_or_else(|| unknown_policy(kind, &[]))?,
        Some(other) => return Err(bad("kind", &place, other, "the name of a built-in policy")),
        None => PolicyKind::by_name(name).ok_or_else(|| Error::BadValue {
            key: "kind".to_owned(),
            table: place.clone(),
            seen: "missing".to_owned(),
            expected: "rewarm, kpa, hpa, tracker or fixed where the name is none of them",
        })?,
    };
    let mut specs = vec![PolicySpec { name: name.to_owned(), kind }];
    let sorted: BTreeMap<&String, &Value> = settings.iter().filter(|(key, _)| *key != "kind").collect();
    for (key, value) in sorted {
        let Value::Array(list) = value else {
            for spec in &mut specs {
                set(spec.kind.keys(), key, value, &place)?;
            }
            continue;
        };
        if list.is_empty() || specs.len() * list.len() > COMBINATIONS_MAX {
            return Err(bad(key, &place, value, "a value, or a list with at most 10000 combinations in all"));
        }
        let mut more = Vec::with_capacity(specs.len() * list.len());
        for spec in &specs {
            for value in list {
                let mut spec = spec.clone();
                set(spec.kind.keys(), key, value, &place)?;
                spec.name = format!("{} {key}={}", spec.name, plain(value));
                more.push(spec);
            }
        }
        specs = more;
    }
    Ok(specs)
}

fn set(target: &mut dyn Keys, key: &str, value: &Value, place: &str) -> Result<()> {
    if !target.names().contains(&key) {
        let nearest = nearest(key, target.names().iter().copied());
        return Err(Error::UnknownKey { key: key.to_owned(), table: place.to_owned(), nearest });
    }
    target.set(key, value, place)
}

fn bad(key: &str, place: &str, value: &Value, expected: &'static str) -> Error {
    Error::BadValue { key: key.to_owned(), table: place.to_owned(), seen: plain(value), expected }
}

/// A value as it is written, without the quotes of a string.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn unknown_policy(name: &str, known: &[PolicySpec]) -> Error {
    let names = PolicyKind::NAMES.into_iter().chain(known.iter().map(|spec| spec.name.as_str()));
    Error::UnknownPolicy { name: name.to_owned(), nearest: nearest(name, names).to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        Config::from_table(text.parse().expect("TOML"), "configuration c.toml")
    }

    fn refused(text: &str) -> String {
        read(text).expect_err("a mistake").to_string()
    }

    #[test]
    fn everything_can_be_set() {
        let config = read(
            "restore = '2s'\nwake = '100ms'\ncold = '30s'\nwarm = 2\nconcurrency = 4\nmin = 1\nmax = 9\ntarget_wait = '2s'\n\
             seed = 7\nclairvoyant = true\nreplica_memory_gib = 1.5\nqueue = { max = 10, deadline = '3s' }\n\
             service = { base = '10ms', input_per_s = 100, output = '1ms' }\n\
             [policy.rewarm]\npatience = 0.5\nfloor = false\n[policy.wide]\nkind = 'kpa'\nstable_window = '2m'",
        )
        .expect("good");
        assert_eq!(config.scenario.restore, Some(StartSamples::Fixed(Duration::from_secs(2))));
        assert_eq!((config.scenario.limits.min, config.scenario.limits.max), (1, 9));
        assert_eq!(config.scenario.queue, QueueLimits { max: 10, deadline: Duration::from_secs(3) });
        assert_eq!(config.service, ServiceTime { base_s: 0.01, input_per_s: 100.0, output_s: 0.001 });
        assert_eq!(config.scenario.replica_memory, 3 << 29);
        assert!(config.scenario.clairvoyant);
        let names: Vec<&str> = config.policies.iter().map(|spec| spec.name.as_str()).collect();
        assert_eq!(names, ["rewarm", "wide"]);
        let PolicyKind::Rewarm(settings) = &config.policies[0].kind else { panic!("rewarm") };
        assert!(settings.patience == 0.5 && !settings.floor && settings.rescue);
    }

    #[test]
    fn lists_are_combined() {
        let config = read("[policy.tracker]\nutilization = [0.5, 1.0]\ndown_delay = ['0s', '5s', '10s']")
            .expect("good");
        assert_eq!(config.policies.len(), 6);
        assert_eq!(config.policies[1].name, "tracker down_delay=0s utilization=1.0");
        assert_eq!(config.select(&["tracker".to_owned()]).expect("known").len(), 6);
    }

    #[test]
    fn mistakes_name_what_is_nearest_or_expected() {
        assert_eq!(
            refused("restor = '5s'"),
            "unknown key \"restor\" in configuration c.toml; the nearest known key is \"restore\""
        );
        assert_eq!(
            refused("[policy.kpa]\nstable_windw = '60s'"),
            "unknown key \"stable_windw\" in configuration c.toml, policy kpa; the nearest known key is \"stable_window\""
        );
        assert_eq!(
            refused("service = { bas = '1s' }"),
            "unknown key \"bas\" in configuration c.toml, service; the nearest known key is \"base\""
        );
        assert_eq!(
            refused("max = 0"),
            "max of configuration c.toml is 0, expected a whole number from 1 to 10000"
        );
        assert_eq!(
            refused("[policy.tracker]\nutilization = 1.5"),
            "utilization of configuration c.toml, policy tracker is 1.5, expected a share above 0 and at most 1"
        );
        assert_eq!(
            refused("[policy.x]\nkind = 'trackr'"),
            "unknown policy \"trackr\"; the nearest known policy is \"tracker\""
        );
        assert_eq!(
            refused("[policy.x]\nkeep = 1"),
            "kind of configuration c.toml, policy x is missing, expected rewarm, kpa, hpa, tracker or fixed where the name is none of them"
        );
    }

    #[test]
    fn without_names_every_kind_is_tried() {
        let names: Vec<String> =
            Config::default().select(&[]).expect("known").into_iter().map(|spec| spec.name).collect();
        assert_eq!(names, PolicyKind::NAMES);
        let unknown = Config::default().select(&["knative".to_owned()]).expect_err("unknown").to_string();
        assert!(unknown.starts_with("unknown policy \"knative\"; the nearest known policy is "), "{unknown}");
    }
}
