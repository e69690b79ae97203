//! Where a store lies and which snapshot in it is meant: `STORE/NAME@TAG`.
//!
//! Answers for the syntax: nothing here touches a network, and a disk only to follow links. A text without a scheme is a folder, taken as
//! it is; with a scheme it is a URL whose query carries options of the `object_store` library.
//!
//! ```text
//! s3://bucket/prefix/NAME@TAG?endpoint=http://127.0.0.1:3900&region=garage
//! \________________/ \__/ \_/ \__________________________________________/
//!       store        name tag                  options
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;

use crate::digest::Digest;
use crate::error::{Error, Syntax};

/// The tag that is meant when none is given.
pub const DEFAULT_TAG: &str = "latest";

/// Longest name or tag, in characters: below the shortest limit of a file name on any file system.
const NAME_LENGTH_MAX: usize = 128;

/// What an option's name contains when its value must not be shown.
const SECRET_WORDS: &[&str] = &["secret", "key", "token", "password", "sas", "credential", "account"];

/// The address of a store.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUrl {
    place: Place,
    options: Vec<(String, String)>,
}

/// The kind of place that a store lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Folder(PathBuf),
    Bucket { provider: Provider, bucket: String, prefix: String },
}

/// Whose protocol a bucket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    Aws,
    Google,
    Azure,
}

impl Provider {
    fn scheme(self) -> &'static str {
        match self {
            Provider::Aws => "s3",
            Provider::Google => "gs",
            Provider::Azure => "az",
        }
    }

    fn knows(self, option: &str) -> bool {
        match self {
            Provider::Aws => option.parse::<AmazonS3ConfigKey>().is_ok(),
            Provider::Google => option.parse::<GoogleConfigKey>().is_ok(),
            Provider::Azure => option.parse::<AzureConfigKey>().is_ok(),
        }
    }
}

impl StoreUrl {
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn options(&self) -> &[(String, String)] {
        &self.options
    }

    /// The folder that the store lies in, if it lies in one.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder(path) => Some(path),
            Place::Bucket { .. } => None,
        }
    }

    /// Whether the store lies at `other` or below it, whatever the options of both. Of folders links are followed, as far
    /// as the folders are there.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Place::Folder(own), Place::Folder(other)) => resolved(own).starts_with(resolved(other)),
            (Place::Bucket { .. }, Place::Bucket { .. }) => {
                let (own, other) = (self.base(), other.base());
                own.strip_prefix(&other).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            _ => false,
        }
    }

    /// The address with all its options, secret ones included, as it can be parsed again. Never print it.
    #[must_use]
    pub fn with_secrets(&self) -> String {
        if self.options.is_empty() {
            return self.base();
        }
        let query = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(&self.options).finish();
        format!("{}?{query}", self.base())
    }

    fn parse(text: &str) -> Result<Self, Syntax> {
        if text.is_empty() {
            return Err(Syntax::Empty);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self { place: Place::Folder(PathBuf::from(text)), options: Vec::new() });
        };
        let (_, query) = rest.split_once('?').unwrap_or((rest, ""));
        let options: Vec<(String, String)> =
            url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let url = url::Url::parse(text)?;
        let place = match scheme {
            "file" => folder(&url)?,
            "s3" => bucket(Provider::Aws, &url)?,
            "gs" => bucket(Provider::Google, &url)?,
            "az" => bucket(Provider::Azure, &url)?,
            other => return Err(Syntax::Scheme(other.to_owned())),
        };
        for (name, _) in &options {
            let known = match &place {
                Place::Folder(_) => name == "fsync",
                Place::Bucket { provider, .. } => provider.knows(name),
            };
            if !known {
                return Err(Syntax::Option { name: name.clone() });
            }
        }
        Ok(Self { place, options })
    }

    fn base(&self) -> String {
        match &self.place {
            Place::Folder(path) if self.options.is_empty() => path.display().to_string(),
            Place::Folder(path) => format!("file://{}", path.display()),
            Place::Bucket { provider, bucket, prefix } if prefix.is_empty() => {
                format!("{}://{bucket}", provider.scheme())
            }
            Place::Bucket { provider, bucket, prefix } => {
                format!("{}://{bucket}/{prefix}", provider.scheme())
            }
        }
    }

    /// The options as a query, without those that are secret.
    fn query(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        let mut shown = false;
        for (name, value) in &self.options {
            let lower = name.to_ascii_lowercase();
            if !SECRET_WORDS.iter().any(|word| lower.contains(word)) {
                query.append_pair(name, value);
                shown = true;
            }
        }
        if shown { format!("?{}", query.finish()) } else { String::new() }
    }
}

/// The path with its links followed, or, of what is not there, without its dots.
fn resolved(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (whole.parent(), whole.file_name()) {
        (Some(parent), Some(name)) => resolved(parent).join(name),
        // What ends in `..` means what lies above the part before it.
        (Some(parent), None) => resolved(parent).parent().map_or(parent.to_owned(), Path::to_owned),
        (None, _) => whole,
    }
}

fn folder(url: &url::Url) -> Result<Place, Syntax> {
    let expected = "file:///PATH";
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(Syntax::Form { expected });
    }
    let path = url.to_file_path().map_err(|()| Syntax::Form { expected })?;
    Ok(Place::Folder(path))
}

fn bucket(provider: Provider, url: &url::Url) -> Result<Place, Syntax> {
    let bucket = url.host_str().unwrap_or_default().to_owned();
    let plain = url.username().is_empty() && url.password().is_none() && url.port().is_none();
    if bucket.is_empty() || !plain {
        return Err(Syntax::Form { expected: "SCHEME://BUCKET[/PREFIX]" });
    }
    let path = object_store::path::Path::from_url_path(url.path())
        .map_err(|error| Syntax::Path(error.to_string()))?;
    Ok(Place::Bucket { provider, bucket, prefix: path.to_string() })
}

impl FromStr for StoreUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(|source| Error::Syntax { text: text.to_owned(), kind: "store", source })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.base(), self.query())
    }
}

/// The same as its text: options that are secret are not shown here either.
impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreUrl({self})")
    }
}

/// Name of a snapshot: `[a-z0-9._-]+`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match check_word(text) {
            Ok(()) => Ok(Self(text.to_owned())),
            Err(source) => Err(Error::Syntax { text: text.to_owned(), kind: "name", source }),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks that `text` may stand as a name or as a tag.
pub(crate) fn check_word(text: &str) -> Result<(), Syntax> {
    if text.is_empty() {
        return Err(Syntax::Empty);
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    if let Some(found) = text.chars().find(|&c| !allowed(c)) {
        return Err(Syntax::Character { found });
    }
    if text == "." || text == ".." {
        return Err(Syntax::Dots(text.to_owned()));
    }
    if text.len() > NAME_LENGTH_MAX {
        return Err(Syntax::Long { found: text.len(), limit: NAME_LENGTH_MAX });
    }
    Ok(())
}

/// Which manifest of a name is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The newest that was published under this tag.
    Tag(String),
    /// This one.
    Digest(Digest),
}

/// A snapshot in a store: `STORE/NAME@TAG` or `STORE/NAME@blake3:HEX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The store.
    pub store: StoreUrl,
    /// Name of the snapshot.
    pub name: Name,
    /// Its tag or its digest.
    pub target: Target,
}

impl Reference {
    fn parse(text: &str) -> Result<Self, Syntax> {
        let (path, query) = match text.split_once("://").and_then(|_| text.split_once('?')) {
            Some((path, query)) => (path, Some(query)),
            None => (text, None),
        };
        let scheme = path.find("://").map_or(0, |at| at + 3);
        let (store, last) = match path[scheme..].rsplit_once('/') {
            Some((store, last)) => (&path[..scheme + store.len()], last),
            None => return Err(if text.is_empty() { Syntax::Empty } else { Syntax::NameMissing }),
        };
        let (name, target) = match last.split_once('@') {
            Some((name, target)) => (name, target),
            None => (last, DEFAULT_TAG),
        };
        if name.is_empty() {
            return Err(Syntax::NameMissing);
        }
        check_word(name)?;
        let target = if target.starts_with("blake3:") {
            Target::Digest(target.parse()?)
        } else {
            check_word(target)?;
            Target::Tag(target.to_owned())
        };
        // `/NAME` lies in the root folder, `file:///NAME` too.
        let store =
            if store.is_empty() || store == "file://" { format!("{store}/") } else { store.to_owned() };
        let store = match query {
            Some(query) => format!("{store}?{query}"),
            None => store,
        };
        Ok(Self { store: StoreUrl::parse(&store)?, name: Name(name.to_owned()), target })
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(|source| Error::Syntax {
            text: text.to_owned(),
            kind: "reference to a snapshot",
            source,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@", self.store.base().trim_end_matches('/'), self.name)?;
        match &self.target {
            Target::Tag(tag) => write!(f, "{tag}")?,
            Target::Digest(digest) => write!(f, "{digest}")?,
        }
        f.write_str(&self.store.query())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_its_secrets_means_the_same_store() {
        for text in [
            "/srv/snapshots",
            "file:///srv/a?fsync=true",
            "s3://bucket/a/b?secret_access_key=a%2Fb%26&region=x",
        ] {
            let url: StoreUrl = text.parse().expect("a store");
            assert!(url.with_secrets().parse::<StoreUrl>().expect("again") == url, "{text}");
        }
    }

    fn reference(text: &str) -> Reference {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error:?}"))
    }

    fn fault(text: &str) -> Syntax {
        match text.parse::<Reference>() {
            Err(Error::Syntax { source, .. }) => source,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn without_scheme_a_reference_lies_in_a_folder() {
        let web = reference("snaps/web@v1");
        assert_eq!(web.store.folder(), Some(Path::new("snaps")));
        assert_eq!(web.name.as_str(), "web");
        assert_eq!(web.target, Target::Tag("v1".into()));
        assert_eq!(reference("./web").store.folder(), Some(Path::new(".")));
        assert_eq!(reference("/web").store.folder(), Some(Path::new("/")));
        assert_eq!(reference("/a?b/web").store.folder(), Some(Path::new("/a?b")));
        assert_eq!(reference("file:///srv/my%20store/web").store.folder(), Some(Path::new("/srv/my store")));
        assert_eq!(reference("file:///web").store.folder(), Some(Path::new("/")));
    }

    #[test]
    fn the_tag_is_latest_unless_given() {
        assert_eq!(reference("s3://b/web").target, Target::Tag("latest".into()));
        let digest = Digest::of(b"x");
        assert_eq!(reference(&format!("s3://b/p/web@{digest}")).target, Target::Digest(digest));
    }

    #[test]
    fn buckets_have_a_prefix_and_options() {
        let web = reference("s3://bucket/a/b/web@v1?endpoint=http://127.0.0.1:3900&region=garage");
        assert_eq!(
            *web.store.place(),
            Place::Bucket { provider: Provider::Aws, bucket: "bucket".into(), prefix: "a/b".into() }
        );
        assert_eq!(
            web.store.options(),
            [
                ("endpoint".to_owned(), "http://127.0.0.1:3900".to_owned()),
                ("region".to_owned(), "garage".to_owned())
            ]
        );
    }

    #[test]
    fn what_is_shown_reads_back_as_the_same() {
        for text in [
            "snaps/web@v1",
            "/web@latest",
            "s3://bucket/web@v1",
            "gs://bucket/p/q/web@v1",
            "az://container/web@v1",
            "s3://bucket/web@v1?region=garage",
        ] {
            let first = reference(text);
            assert_eq!(reference(&first.to_string()), first, "{text}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let text = "s3://b/web?secret_access_key=hunter2&region=r";
        let shown = reference(text);
        assert_eq!(shown.to_string(), "s3://b/web@latest?region=r");
        assert!(!format!("{shown:?}").contains("hunter2"));
    }

    #[test]
    fn malformed_references_say_what_is_wrong() {
        assert_eq!(fault(""), Syntax::Empty);
        assert_eq!(fault("web"), Syntax::NameMissing);
        assert_eq!(fault("snaps/"), Syntax::NameMissing);
        assert_eq!(fault("s3://bucket"), Syntax::NameMissing);
        assert_eq!(fault("snaps/Web"), Syntax::Character { found: 'W' });
        assert_eq!(fault("snaps/.."), Syntax::Dots("..".into()));
        assert_eq!(fault("snaps/web@"), Syntax::Empty);
        assert_eq!(fault("snaps/web@a b"), Syntax::Character { found: ' ' });
        assert!(matches!(fault("snaps/web@blake3:12"), Syntax::Digest(_)));
        assert_eq!(fault("ftp://h/web"), Syntax::Scheme("ftp".into()));
        assert!(matches!(fault("file://host/a/web"), Syntax::Form { .. }));
        assert!(matches!(fault("s3://user@bucket/web"), Syntax::Form { .. }));
        assert_eq!(fault("s3://b/web?colour=red"), Syntax::Option { name: "colour".into() });
        assert_eq!(fault(&format!("snaps/{}", "a".repeat(129))), Syntax::Long { found: 129, limit: 128 });
    }
}
