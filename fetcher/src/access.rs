//! A store and the credentials for it, as they travel from a command to the process that uses them.

use rewarm_store::StoreUrl;
use serde::{Deserialize, Serialize};

/// Prefixes of the variables that `object_store` and its HTTP client read.
const PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];
/// Further variables that they read, in either case where the client does.
const NAMES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// A store with what it takes to read it.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Access {
    /// The address with its secret options.
    url: String,
    /// The address as errors show it.
    shown: String,
    /// Variables of the command that asked.
    env: Vec<(String, String)>,
}

impl Access {
    /// The store at `url`, to be read with those of `env` that concern stores. A folder is made absolute: the fetcher
    /// works elsewhere.
    #[must_use]
    pub fn new(url: &StoreUrl, env: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut env: Vec<_> = env.into_iter().filter(|(name, _)| concerns_stores(name)).collect();
        env.sort();
        let spelled = match url.folder() {
            Some(folder) => {
                // Only the current folder can be missing; then the path fails where it is opened, and is told.
                let path = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
                path.display().to_string()
            }
            None => url.with_secrets(),
        };
        Self { url: spelled, shown: url.to_string(), env }
    }

    /// The address with its secrets.
    pub(crate) fn url(&self) -> Result<StoreUrl, rewarm_store::Error> {
        self.url.parse()
    }

    /// The address as errors show it.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    pub(crate) fn env(&self) -> &[(String, String)] {
        &self.env
    }
}

/// Nothing of it but the shown address is printed.
impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Access({})", self.shown)
    }
}

fn concerns_stores(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || NAMES.contains(&upper.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_variables_of_stores_travel_and_nothing_secret_is_printed() {
        let env = [("AWS_SECRET_ACCESS_KEY", "hidden"), ("HOME", "/root"), ("https_proxy", "http://p")];
        let url = "s3://bucket?secret_access_key=hidden&region=x".parse().expect("a store");
        let access = Access::new(&url, env.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let names: Vec<&str> = access.env().iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["AWS_SECRET_ACCESS_KEY", "https_proxy"]);
        assert!(!format!("{access:?}").contains("hidden"));
        assert_eq!(access.url().expect("a store").with_secrets(), url.with_secrets());
    }

    #[test]
    fn a_folder_becomes_absolute() {
        let access = Access::new(&"some/folder".parse().expect("a store"), []);
        assert!(access.url().expect("a store").folder().expect("a folder").is_absolute());
        assert_eq!(access.shown(), "some/folder");
    }
}
