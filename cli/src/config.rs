//! The configuration file: what an operator demands of stores, whoever types the command.
//!
//! ```toml
//! [[store]]
//! url_prefix = "s3://models/production"
//! require_signature = true
//! keys = ["ed25519:...", "/etc/rewarm/keys/release.pub"]
//! ```
//!
//! A file that cannot be read or understood ends the command: a demand must not be lost by a typing error.

use std::io;
use std::path::{Path, PathBuf};

use rewarm_store::{KeyFolder, Store, StoreUrl, Trust};
use serde::Deserialize;

use crate::args::Global;
use crate::env;
use crate::failure::Cause;

/// Where the file lies when nothing else is said; it need not be there.
pub(crate) const DEFAULT_FILE: &str = "/etc/rewarm/config.toml";
/// Where keys lie when nothing else is said.
pub(crate) const DEFAULT_KEYS: &str = "/etc/rewarm/keys";

/// What the file says.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    #[serde(default)]
    store: Vec<StoreRule>,
    /// The file itself, for errors.
    #[serde(skip)]
    path: PathBuf,
}

/// What is demanded of the stores at and below an address.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreRule {
    url_prefix: String,
    #[serde(default)]
    require_signature: bool,
    #[serde(default)]
    keys: Vec<String>,
}

impl Config {
    /// Reads the file that `--config` or `REWARM_CONFIG` names, else the one in its usual place if it is there.
    pub(crate) fn load(global: &Global) -> Result<Self, Cause> {
        let path = global.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && global.config.is_none() => {
                return Ok(Self::default());
            }
            Err(source) => return Err(Cause::File { doing: "read", path: path.to_owned(), source }),
            Ok(text) => text,
        };
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Cause> {
        let malformed = |reason: String| Cause::Config { path: path.to_owned(), reason };
        let config: Self =
            toml::from_str(text).map_err(|error| malformed(error.to_string().trim_end().to_owned()))?;
        for rule in &config.store {
            rule.url_prefix.parse::<StoreUrl>().map_err(|error| malformed(error.to_string()))?;
            if rule.require_signature && rule.keys.is_empty() {
                let prefix = &rule.url_prefix;
                return Err(malformed(format!("{prefix} requires a signature by none of no keys")));
            }
        }
        Ok(Self { path: path.to_owned(), ..config })
    }

    /// Whose signature this file demands of snapshots in `store`: all rules that fit it must be met, so their keys are
    /// those that every one of them has.
    pub(crate) fn trust(&self, store: &StoreUrl) -> Result<Option<Trust>, Cause> {
        let mut trust: Option<Trust> = None;
        for rule in self.store.iter().filter(|rule| rule.require_signature) {
            let prefix: StoreUrl = rule.url_prefix.parse()?;
            if !store.is_within(&prefix) {
                continue;
            }
            let own = trusted(&rule.keys)?;
            trust = Some(match trust {
                Some(other) => other.and(&own),
                None => own,
            });
        }
        Ok(trust)
    }

    /// Opens a store whose snapshots must be signed as this file and `also` demand.
    pub(crate) async fn open(&self, url: &StoreUrl, also: Option<&[String]>) -> Result<Store, Cause> {
        let store = Store::open(url).await?;
        Ok(match self.demand(url, also)? {
            Some(trust) => store.requiring(trust),
            None => store,
        })
    }

    /// What this file demands of `store`, and `--require-signature` on top. Without a key that flag means any key of the
    /// key folder, or what the file says.
    pub(crate) fn demand(&self, store: &StoreUrl, flag: Option<&[String]>) -> Result<Option<Trust>, Cause> {
        let configured = self.trust(store)?;
        // The flag without a value comes as an empty one.
        let Some(keys) =
            flag.map(|keys| keys.iter().filter(|key| !key.is_empty()).cloned().collect::<Vec<_>>())
        else {
            return Ok(configured);
        };
        let wanted = match (keys.as_slice(), &configured) {
            ([], Some(trust)) => trust.clone(),
            ([], None) => Trust::new(key_folder().list()?.into_iter().map(|key| key.public)),
            (keys, _) => trusted(keys)?,
        };
        if wanted.keys().is_empty() {
            let problem = format!(
                "--require-signature without a key: {} holds none, expected KEY.pub there or --require-signature=KEY",
                folder_path().display()
            );
            return Err(Cause::Usage { problem });
        }
        Ok(Some(match configured {
            Some(trust) => trust.and(&wanted),
            None => wanted,
        }))
    }

    /// The file, for a person.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// The folder in which a key without a path is looked for.
pub(crate) fn key_folder() -> KeyFolder {
    KeyFolder::new(folder_path())
}

fn folder_path() -> PathBuf {
    env::keys_dir().unwrap_or_else(|| DEFAULT_KEYS.into())
}

fn trusted(keys: &[String]) -> Result<Trust, Cause> {
    let folder = key_folder();
    Ok(Trust::new(keys.iter().map(|key| folder.public_key(key)).collect::<Result<Vec<_>, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ed25519:3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";
    const OTHER: &str = "ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

    fn config(text: &str) -> Result<Config, Cause> {
        Config::parse(text, Path::new("config.toml"))
    }

    fn rule(prefix: &str, keys: &[&str]) -> String {
        format!("[[store]]\nurl_prefix = {prefix:?}\nrequire_signature = true\nkeys = {keys:?}\n")
    }

    #[test]
    fn a_rule_holds_for_its_prefix_and_what_lies_below() {
        let config = config(&rule("s3://models/production", &[KEY])).unwrap();
        let demanded = |url: &str| config.trust(&url.parse().unwrap()).unwrap().is_some();
        assert!(demanded("s3://models/production") && demanded("s3://models/production/a?region=x"));
        assert!(!demanded("s3://models/production-2") && !demanded("s3://models"));
        assert!(!demanded("gs://models/production") && !demanded("s3://other/production"));
    }

    #[test]
    fn of_two_rules_both_are_met() {
        let both = rule("/srv/snaps", &[KEY, OTHER]) + &rule("file:///srv/snaps/a", &[OTHER]);
        let config = config(&both).unwrap();
        let keys = |url: &str| config.trust(&url.parse().unwrap()).unwrap().unwrap().keys().len();
        assert_eq!((keys("/srv/snaps"), keys("/srv/snaps/../snaps/a")), (2, 1));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            "[[store]]\nurl = \"s3://a\"",
            "[[store]]\nurl_prefix = \"ftp://a\"",
            "[[store]]\nurl_prefix = \"s3://a\"\nrequire_signature = \"yes\"",
            "[[store]]\nurl_prefix = \"s3://a\"\nrequire_signature = true",
            "[[stores]]\nurl_prefix = \"s3://a\"",
        ] {
            assert!(matches!(config(bad), Err(Cause::Config { .. })), "{bad}");
        }
    }
}
