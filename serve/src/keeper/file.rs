//! The configuration file with the files that it names: what `--check`, a start and a reload ask alike.

use std::path::Path;

use crate::admin;
use crate::config::Config;
use crate::error::{Error, Result};

/// A configuration that is good, as far as can be said without the pools' snapshots.
pub(super) struct File {
    pub(super) text: String,
    pub(super) config: Config,
    /// Certificate and key, in PEM.
    pub(super) tls: Option<(String, String)>,
    /// The word that the admin API wants.
    pub(super) token: Option<String>,
}

impl File {
    /// Reads everything.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = read("configuration", path)?;
        let config = Config::parse(&text, path)?;
        let tls = match &config.serve.tls {
            Some(tls) => Some((read("certificate", &tls.cert)?, read("key", &tls.key)?)),
            None => None,
        };
        if let Some((certificate, key)) = &tls {
            rewarm_gateway::tls::acceptor(certificate.as_bytes(), key.as_bytes())?;
        }
        let token = config.serve.admin_token.as_deref().map(admin::read_token).transpose()?;
        Ok(Self { text, config, tls, token })
    }
}

fn read(what: &'static str, path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::ReadFile { what, path: path.to_owned(), source })
}
