//! What can go wrong with a store, sorted by what the caller can do about it.

use std::io;
use std::sync::Arc;

use rewarm_report::{Class, Classify};

use crate::digest::{ChunkId, DigestSyntax};
use crate::signature::Mistrust;

/// Result of an operation on a store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of an operation on a store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A store's address, a name or a reference is malformed.
    #[error("{text:?} is not a {kind}")]
    Syntax {
        /// What was given.
        text: String,
        /// What it was read as.
        kind: &'static str,
        /// What is wrong with it.
        source: Syntax,
    },
    /// The store, the name, the tag or the manifest does not exist.
    #[error("{object} does not exist in {store}")]
    NotFound {
        /// The store as the user wrote it.
        store: String,
        /// What was looked for.
        object: String,
        /// What the store answered, where it was asked.
        source: Option<Box<object_store::Error>>,
    },
    /// The store refuses: wrong credentials, missing permission, read-only folder.
    #[error("{store} does not allow to {action} {object}")]
    Denied {
        /// The store as the user wrote it.
        store: String,
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
        /// What the store answered.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Neither options nor environment carry credentials, and the machine is given none by a cloud.
    #[error("no credentials for {store}: neither its options nor the environment have any")]
    NoCredentials {
        /// The store as the user wrote it.
        store: String,
        /// What the last place that was asked for them answered.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No space is left where the store lies.
    #[error("no space left in {store} to {action} {object}")]
    Full {
        /// The store as the user wrote it.
        store: String,
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
        /// What the store answered.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store could not be reached: no name, no route, nobody listens.
    #[error("cannot reach {store} to {action} {object}")]
    Unreachable {
        /// The store as the user wrote it.
        store: String,
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
        /// What the network answered.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed in another way, after all attempts.
    #[error("{action} {object} in {store} failed after {attempts} attempts")]
    Request {
        /// The store as the user wrote it.
        store: String,
        /// What was tried.
        action: &'static str,
        /// On which object.
        object: String,
        /// How often.
        attempts: u32,
        /// What the store answered last.
        source: Box<object_store::Error>,
    },
    /// A store cannot be opened with the given options and environment.
    #[error("cannot open {store}")]
    Open {
        /// The store as the user wrote it.
        store: String,
        /// Which option or setting is wrong.
        source: Box<object_store::Error>,
    },
    /// Another snapshot was published under this tag since this one began.
    #[error(
        "another snapshot took this tag at the same time: {name}@{tag} is at number {found}, expected {expected}"
    )]
    TagTaken {
        /// Name of the snapshot.
        name: String,
        /// Its tag.
        tag: String,
        /// Number of the tag's newest object.
        found: u64,
        /// Number that it had when this snapshot began.
        expected: u64,
    },
    /// An object was written by a newer program.
    #[error("{object} has format {found}, this program reads up to format {supported}")]
    Newer {
        /// The object.
        object: String,
        /// Its format version.
        found: u32,
        /// The newest format version that this program reads.
        supported: u32,
    },
    /// A stored object is not what its digest, its length or its reference says.
    #[error("{object} in {store} is damaged")]
    Damaged {
        /// The store as the user wrote it.
        store: String,
        /// The object.
        object: String,
        /// How it is damaged.
        source: Box<Damage>,
    },
    /// Nobody whose key is trusted signed a manifest.
    #[error("{object} in {store} is not trusted")]
    Untrusted {
        /// The store as the user wrote it.
        store: String,
        /// The manifest.
        object: String,
        /// Why not.
        source: Mistrust,
    },
    /// What is to be stored exceeds a limit of the format.
    #[error("{what} is {value}, the format allows {limit}")]
    Limit {
        /// What exceeds the limit, with its unit.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The receiver of fetched bytes failed.
    #[error("cannot put {bytes} bytes at {offset} of region {region}")]
    Sink {
        /// Index of the region.
        region: usize,
        /// Offset in the region's stream, in bytes.
        offset: u64,
        /// How many bytes.
        bytes: usize,
        /// What the receiver answered.
        source: io::Error,
    },
    /// The announcement of a session or of gc is gone: whoever made it was taken for dead.
    #[error(
        "{announcement} is gone from {store}: this program was stopped for so long that gc took it for dead"
    )]
    Lapsed {
        /// The store as the user wrote it.
        store: String,
        /// The announcement.
        announcement: String,
    },
    /// Another run of gc is at work.
    #[error("another gc is at work in {store}: {other}")]
    Collecting {
        /// The store as the user wrote it.
        store: String,
        /// Its announcement.
        other: String,
    },
    /// What a copy needs is there, but gc has marked it for removal.
    #[error("{object} in {store} is marked for removal")]
    Doomed {
        /// The store as the user wrote it.
        store: String,
        /// The object.
        object: String,
    },
    /// The session was aborted while one of its regions was being written.
    #[error("the snapshot was given up")]
    Aborted,
    /// The session failed earlier; this is that failure.
    #[error(transparent)]
    Earlier(Arc<Error>),
}

/// What is wrong with a text that the user wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Syntax {
    /// There is nothing.
    #[error("it is empty")]
    Empty,
    /// A character that does not belong there.
    #[error("{found:?} is not allowed, only a-z, 0-9, dot, underscore and hyphen are")]
    Character {
        /// The first such character.
        found: char,
    },
    /// `.` and `..` would leave the store.
    #[error("{0:?} is not a name")]
    Dots(String),
    /// Longer than any name.
    #[error("it has {found} characters, {limit} are allowed")]
    Long {
        /// Its length.
        found: usize,
        /// The longest that is allowed.
        limit: usize,
    },
    /// No name after the store.
    #[error("a name is missing, expected STORE/NAME[@TAG]")]
    NameMissing,
    /// The scheme is none of ours.
    #[error("unknown scheme {0:?}, known are file, s3, gs and az")]
    Scheme(String),
    /// Not of the form that is expected.
    #[error("expected {expected}")]
    Form {
        /// The form that is expected.
        expected: &'static str,
    },
    /// Not an address.
    #[error(transparent)]
    Url(#[from] url::ParseError),
    /// Not a path of an object store.
    #[error("it is not a path: {0}")]
    Path(String),
    /// An option that the store does not know.
    #[error("unknown option {name:?}")]
    Option {
        /// The option.
        name: String,
    },
    /// A digest that is malformed.
    #[error(transparent)]
    Digest(#[from] DigestSyntax),
}

/// How a stored object differs from what it must be.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A manifest names it, but it is not there.
    #[error("it is missing")]
    Missing,
    /// It is shorter or longer than its reference says.
    #[error("it has {found} bytes, expected {expected}")]
    Length {
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be there.
        expected: u64,
    },
    /// Its digest differs.
    #[error("its digest is {found}, expected {expected}")]
    Digest {
        /// Digest of the bytes that are there.
        found: String,
        /// Digest that its reference says.
        expected: String,
    },
    /// A chunk's content differs from its id.
    #[error("chunk at {offset} has the id {found}, expected {expected}")]
    Chunk {
        /// Offset of the chunk in the pack, in bytes.
        offset: u64,
        /// Id of the content that is there.
        found: ChunkId,
        /// Id that the index says.
        expected: ChunkId,
    },
    /// A chunk cannot be decompressed to the length that the index says.
    #[error("chunk at {offset} does not decode to {expected} bytes")]
    Codec {
        /// Offset of the chunk in the pack, in bytes.
        offset: u64,
        /// Length that the index says.
        expected: u64,
        /// What the codec says, where it says something.
        source: Option<io::Error>,
    },
    /// The magic bytes or the frame are wrong.
    #[error("{what} is {found:?}, expected {expected:?}")]
    Frame {
        /// Which field.
        what: &'static str,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
    },
    /// A number is above its limit, or two numbers contradict each other.
    #[error("{what} is {found}, the limit is {limit}")]
    Bound {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The greatest value that is allowed.
        limit: u64,
    },
    /// Not JSON of the expected shape.
    #[error("its JSON is malformed")]
    Json(#[from] serde_json::Error),
    /// Not protobuf of the expected shape.
    #[error("its protobuf is malformed")]
    Protobuf(#[from] prost::DecodeError),
}

impl Error {
    /// An object of a store that is damaged.
    pub(crate) fn damaged(store: &str, object: &str, damage: Damage) -> Self {
        Self::Damaged { store: store.to_owned(), object: object.to_owned(), source: Box::new(damage) }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::Syntax { .. } => Class::Usage,
            Error::NotFound { .. } => Class::NotFound,
            Error::Newer { .. } => Class::Incompatible,
            Error::Damaged { .. } | Error::Untrusted { .. } => Class::Integrity,
            Error::Denied { .. }
            | Error::NoCredentials { .. }
            | Error::Full { .. }
            | Error::Unreachable { .. }
            | Error::Request { .. }
            | Error::Open { .. }
            | Error::Aborted
            | Error::Lapsed { .. }
            | Error::Collecting { .. }
            | Error::Doomed { .. }
            | Error::TagTaken { .. }
            | Error::Limit { .. }
            | Error::Sink { .. } => Class::Failed,
            Error::Earlier(first) => first.class(),
        }
    }
}
