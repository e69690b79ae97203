//! What a user asks for when a replica is made. It is stored in the replica's record and in a snapshot's manifest.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use rewarm_gpu::provide::{Provided, Wanted};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The name of a replica: `[a-z0-9._-]`, at most 63 characters, beginning with a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
        let alphabet = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        let first = text.chars().next().is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if first && text.len() <= 63 && text.chars().all(alphabet) {
            Ok(Self(text.into()))
        } else {
            Err(Error::Malformed {
                what: "name",
                value: text.into(),
                expected: "1 to 63 of a-z 0-9 . _ -, beginning with a letter or a digit",
            })
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! as_text {
    ($($type:ty)*) => {$(
        impl TryFrom<String> for $type {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> { text.parse() }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self { value.to_string() }
        }
    )*};
}
as_text!(Name Mount User Net Publish);

/// A file or directory of the host inside the replica, written `SRC:DST[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mount {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path inside the replica.
    pub target: PathBuf,
    /// The replica cannot write to it.
    pub read_only: bool,
}

impl FromStr for Mount {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let malformed = || Error::Malformed {
            what: "mount",
            value: text.into(),
            expected: "SRC:DST[:ro], both paths absolute",
        };
        let mut parts = text.split(':');
        let (source, target) = parts.next().zip(parts.next()).ok_or_else(malformed)?;
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(malformed()),
        };
        let (source, target) = (PathBuf::from(source), PathBuf::from(target));
        let above = target.components().any(|part| part == std::path::Component::ParentDir);
        if parts.next().is_some() || !source.is_absolute() || !target.is_absolute() || above {
            return Err(malformed());
        }
        Ok(Self { source, target, read_only })
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source.display(), self.target.display())?;
        if self.read_only { f.write_str(":ro") } else { Ok(()) }
    }
}

/// Who the server runs as, written `U[:G]`: numbers, or names that the replica's own `/etc/passwd` knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User {
    /// User number or name.
    pub user: String,
    /// Group number or name; the user's own if absent.
    pub group: Option<String>,
}

impl FromStr for User {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let good = |part: &str| !part.is_empty() && !part.contains([':', '/', '\n']);
        if !good(user) || group.is_some_and(|group| !good(group)) {
            return Err(Error::Malformed { what: "user", value: text.into(), expected: "U[:G]" });
        }
        Ok(Self { user: user.into(), group: group.map(Into::into) })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)?;
        self.group.as_ref().map_or(Ok(()), |group| write!(f, ":{group}"))
    }
}

/// The network that a server sees, written `private`, `host`, `none` or `ns:PATH`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Net {
    /// A network namespace of its own with a loopback interface; others reach it through the shim.
    #[default]
    Private,
    /// The host's network.
    Host,
    /// A network namespace of its own in which no interface is up: nobody can reach it by TCP.
    None,
    /// A network namespace that somebody else made.
    Path(PathBuf),
}

impl FromStr for Net {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "private" => Ok(Self::Private),
            "host" => Ok(Self::Host),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("ns:") {
                Some(path) if path.starts_with('/') => Ok(Self::Path(path.into())),
                _ => Err(Error::Malformed {
                    what: "net",
                    value: text.into(),
                    expected: "private, host, none or ns:PATH with an absolute path",
                }),
            },
        }
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Private => f.write_str("private"),
            Self::Host => f.write_str("host"),
            Self::None => f.write_str("none"),
            Self::Path(path) => write!(f, "ns:{}", path.display()),
        }
    }
}

/// A port of the host in front of a port of the replica, written `[ADDR:]HP:P`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Publish {
    /// Address of the host; without one, all IPv4 addresses.
    pub address: IpAddr,
    /// Port of the host; 0 lets the kernel choose.
    pub host_port: u16,
    /// Port inside the replica.
    pub port: u16,
}

impl Publish {
    /// The host's side.
    #[must_use]
    pub fn host(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.host_port)
    }
}

impl FromStr for Publish {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (host, port) = text.rsplit_once(':')?;
            let port = port.parse().ok().filter(|port| *port != 0)?;
            let (address, host_port) = match host.rsplit_once(':') {
                None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), host),
                Some((address, host_port)) => {
                    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
                    (bare.parse().ok()?, host_port)
                }
            };
            Some(Self { address, host_port: host_port.parse().ok()?, port })
        };
        parse().ok_or_else(|| Error::Malformed {
            what: "publish",
            value: text.into(),
            expected: "[ADDR:]HOST_PORT:PORT, for example 127.0.0.1:8080:80",
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host(), self.port)
    }
}

/// GPUs of a replica: which were asked for, and what that means on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// What the user asked for.
    pub wanted: Wanted,
    /// What the container gets for it.
    pub provided: Provided,
}

/// What a replica is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spec {
    /// Its name.
    pub name: Option<Name>,
    /// The server's command line; the first word is looked up in the replica's `PATH`.
    pub command: Vec<String>,
    /// The lower layer of the root file system.
    pub rootfs: PathBuf,
    /// Files and directories of the host.
    pub mounts: Vec<Mount>,
    /// Who the server runs as; root if absent.
    pub user: Option<User>,
    /// Environment as `K=V`, after the defaults for `PATH` and `HOME`.
    pub env: Vec<String>,
    /// Working directory inside the replica.
    pub workdir: PathBuf,
    /// The GPUs that it may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// Limit of memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Limit of CPU time, in CPUs.
    pub cpus: Option<f64>,
    /// Size limit of `/dev/shm` in bytes; half of the machine's memory if absent.
    pub shm_bytes: Option<u64>,
    /// The network.
    pub net: Net,
    /// Ports that the server listens on.
    pub ports: Vec<u16>,
    /// Ports of the host in front of them.
    pub publish: Vec<Publish>,
    /// The ready check, as the user wrote it.
    pub ready: Option<String>,
    /// Labels, not interpreted.
    pub labels: BTreeMap<String, String>,
    /// No address space randomisation and a fixed hash seed, so that two starts share most of their pages.
    pub deterministic: bool,
    /// Size in bytes at which each of the two log files is rotated; one older file of each is kept.
    pub log_bytes: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            name: None,
            command: Vec::new(),
            rootfs: "/".into(),
            mounts: Vec::new(),
            user: None,
            env: Vec::new(),
            workdir: "/".into(),
            gpu: None,
            memory_bytes: None,
            cpus: None,
            shm_bytes: None,
            net: Net::Private,
            ports: Vec::new(),
            publish: Vec::new(),
            ready: None,
            labels: BTreeMap::new(),
            deterministic: false,
            log_bytes: 16 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<T: FromStr<Err = Error> + fmt::Display>(text: &str) -> String {
        text.parse::<T>().map_or_else(|error| error.to_string(), |value| value.to_string())
    }

    #[test]
    fn values_are_written_as_they_are_read() {
        assert_eq!(round_trip::<Mount>("/a:/b:ro"), "/a:/b:ro");
        assert_eq!(round_trip::<Mount>("/a:/b"), "/a:/b");
        assert_eq!(round_trip::<User>("1000:www"), "1000:www");
        assert_eq!(round_trip::<Net>("ns:/run/netns/x"), "ns:/run/netns/x");
        assert_eq!(round_trip::<Publish>("8080:80"), "0.0.0.0:8080:80");
        assert_eq!(round_trip::<Publish>("127.0.0.1:0:80"), "127.0.0.1:0:80");
        assert_eq!(round_trip::<Publish>("[::1]:1:80"), "[::1]:1:80");
    }

    #[test]
    fn malformed_values_are_refused() {
        for name in ["", ".", "..", "-a", "A", "a/b", "a b", &"x".repeat(64)] {
            assert!(name.parse::<Name>().is_err(), "{name}");
        }
        for mount in ["", "/a", "a:/b", "/a:b", "/a:/b:x", "/a:/b:ro:ro", "/a:/b/../c"] {
            assert!(mount.parse::<Mount>().is_err(), "{mount}");
        }
        for publish in ["", "80", "0:0", "x:80", "1.2.3:80:80", "70000:80", "80:70000"] {
            assert!(publish.parse::<Publish>().is_err(), "{publish}");
        }
        assert!("bridge".parse::<Net>().is_err());
        assert!("ns:relative".parse::<Net>().is_err());
        assert!(":g".parse::<User>().is_err());
    }

    #[test]
    fn every_field_is_documented_as_a_part_of_a_snapshot() {
        let document = include_str!("../../docs/snapshot-format.md");
        let json = serde_json::to_value(Spec::default()).expect("json");
        for name in json.as_object().expect("fields").keys() {
            assert!(document.contains(&format!("`{name}`")), "{name} is not documented");
        }
    }

    #[test]
    fn a_spec_without_fields_has_defaults_and_survives_json() {
        let spec: Spec = serde_json::from_str("{}").expect("all fields have defaults");
        assert_eq!(spec, Spec::default());
        let json = serde_json::to_string(&spec).expect("json");
        assert_eq!(serde_json::from_str::<Spec>(&json).expect("json"), spec);
    }
}
