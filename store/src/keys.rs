//! A folder of signing keys: `NAME.key`, which nobody else may read, and beside it `NAME.pub`, which goes to every machine
//! that restores.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rewarm_report::{Class, Classify};

use crate::signature::{KeySyntax, PublicKey, SigningKey};
use crate::url::Name;

/// Longest file that is read as a key.
const KEY_BYTES_LIMIT: u64 = 64 << 10;

/// A folder of keys.
#[derive(Debug, Clone)]
pub struct KeyFolder {
    path: PathBuf,
}

/// A key of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedKey {
    /// Its name.
    pub name: String,
    /// Its public part.
    pub public: PublicKey,
    /// Whether its secret part is there too.
    pub secret: bool,
}

/// A failure with a key's file.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is a key of this name; a new one would make what it signed worthless.
    #[error("{} is there already", path.display())]
    Exists {
        /// The file that is there.
        path: PathBuf,
    },
    /// There is no such key.
    #[error("there is no key {}", path.display())]
    Missing {
        /// The file that is not there.
        path: PathBuf,
    },
    /// Others than its owner may read a secret key.
    #[error("{} has mode {mode:04o}, expected 0600: others may read the secret key", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file does not hold a key.
    #[error("{} does not hold a key", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KeySyntax,
    },
    /// The system refuses.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Classify for KeyError {
    fn class(&self) -> Class {
        match self {
            KeyError::Missing { .. } => Class::NotFound,
            KeyError::Malformed { .. } => Class::Usage,
            KeyError::Exists { .. } | KeyError::Open { .. } | KeyError::Io { .. } => Class::Failed,
        }
    }
}

impl KeyFolder {
    /// The folder at `path`, which need not be there yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Makes a key, and the folder if it is not there. The secret part is on the disk before the public one is visible.
    ///
    /// # Errors
    /// [`KeyError::Exists`] if there is a key of this name, [`KeyError::Io`].
    pub fn make(&self, name: &Name) -> Result<ListedKey, KeyError> {
        let failed = |action| move |source| KeyError::Io { action, path: self.path.clone(), source };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.path).map_err(failed("make"))?;
        let key = SigningKey::generate().map_err(failed("make a key in"))?;
        let public = self.public_path(name.as_str());
        if public.exists() {
            return Err(KeyError::Exists { path: public });
        }
        write_new(&self.secret_path(name.as_str()), 0o600, &key.to_pem())?;
        write_new(&public, 0o644, &format!("{} {name}\n", key.public()))?;
        Ok(ListedKey { name: name.to_string(), public: key.public(), secret: true })
    }

    /// The keys of the folder by name; none if there is no folder.
    ///
    /// # Errors
    /// [`KeyError::Malformed`] for a `.pub` file that holds something else, [`KeyError::Io`].
    pub fn list(&self) -> Result<Vec<ListedKey>, KeyError> {
        let failed = |source| KeyError::Io { action: "list", path: self.path.clone(), source };
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut keys = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let Some(name) = path.file_name().and_then(|file| file.to_str()?.strip_suffix(".pub")) else {
                continue;
            };
            let secret = self.secret_path(name).exists();
            keys.push(ListedKey { name: name.to_owned(), public: read_public(&path)?, secret });
        }
        keys.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(keys)
    }

    /// The signing key that `text` means: a file if it has a slash, else the key of this name.
    ///
    /// # Errors
    /// [`KeyError::Missing`], [`KeyError::Open`] if others may read it, [`KeyError::Malformed`], [`KeyError::Io`].
    pub fn signing_key(&self, text: &str) -> Result<SigningKey, KeyError> {
        let path = if text.contains('/') { PathBuf::from(text) } else { self.secret_path(text) };
        let content = read(&path)?;
        let mode = fs::metadata(&path).map_or(0, |file| file.mode() & 0o7777);
        if mode & 0o077 != 0 {
            return Err(KeyError::Open { path, mode });
        }
        SigningKey::from_pem(&content).map_err(|source| KeyError::Malformed { path, source })
    }

    /// The public key that `text` means: `ed25519:HEX`, a `.pub` file if it has a slash, else the key of this name.
    ///
    /// # Errors
    /// [`KeyError::Missing`], [`KeyError::Malformed`], [`KeyError::Io`].
    pub fn public_key(&self, text: &str) -> Result<PublicKey, KeyError> {
        if text.contains(':') && !text.contains('/') {
            return text.parse().map_err(|source| KeyError::Malformed { path: text.into(), source });
        }
        if text.contains('/') { read_public(Path::new(text)) } else { read_public(&self.public_path(text)) }
    }

    fn secret_path(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.key"))
    }

    fn public_path(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.pub"))
    }
}

/// Reads the first word of a `.pub` file; what follows is for people.
fn read_public(path: &Path) -> Result<PublicKey, KeyError> {
    let content = read(path)?;
    let word = content.split_whitespace().next().unwrap_or_default();
    word.parse().map_err(|source| KeyError::Malformed { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String, KeyError> {
    let bounded = || -> io::Result<String> {
        let length = fs::metadata(path)?.len();
        if length > KEY_BYTES_LIMIT {
            let text = format!("it has {length} bytes, a key has at most {KEY_BYTES_LIMIT}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        fs::read_to_string(path)
    };
    bounded().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => KeyError::Missing { path: path.to_owned() },
        _ => KeyError::Io { action: "read", path: path.to_owned(), source },
    })
}

fn write_new(path: &Path, mode: u32, content: &str) -> Result<(), KeyError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyError::Exists { path: path.to_owned() },
        _ => KeyError::Io { action: "write", path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_with_a_secret_that_only_its_owner_reads() {
        let folder = tempfile::tempdir().unwrap();
        let keys = KeyFolder::new(folder.path().join("new"));
        assert_eq!(keys.list().unwrap(), []);
        let name: Name = "release".parse().unwrap();
        let made = keys.make(&name).unwrap();
        let mode = |file: &str| fs::metadata(keys.path.join(file)).unwrap().mode() & 0o7777;
        assert_eq!((mode("release.key"), mode("release.pub"), mode(".")), (0o600, 0o644, 0o700));
        assert_eq!(keys.list().unwrap(), std::slice::from_ref(&made));
        assert_eq!(keys.signing_key("release").unwrap().public(), made.public);
        let path = keys.path.join("release.pub");
        for text in ["release", path.to_str().unwrap(), &made.public.to_string()] {
            assert_eq!(keys.public_key(text).unwrap(), made.public, "{text}");
        }
        assert!(matches!(keys.make(&name), Err(KeyError::Exists { .. })));
        assert_eq!(keys.signing_key("release").unwrap().public(), made.public, "the first key stands");
    }

    #[test]
    fn what_is_no_key_or_is_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let keys = KeyFolder::new(folder.path());
        keys.make(&"mine".parse().unwrap()).unwrap();
        let secret = folder.path().join("mine.key");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(keys.signing_key("mine"), Err(KeyError::Open { mode: 0o640, .. })));
        assert_eq!(keys.signing_key("absent").unwrap_err().class(), Class::NotFound);
        fs::write(folder.path().join("bad.pub"), "hello").unwrap();
        assert_eq!(keys.public_key("bad").unwrap_err().class(), Class::Usage);
        assert_eq!(keys.list().unwrap_err().class(), Class::Usage);
    }
}
