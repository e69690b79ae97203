//! Values of flags: how each is written, and what a malformed one is told.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Bytes: a number with an optional unit. `K`, `M`, `G`, `T` and their `iB` forms are powers of 1024, `kB` ... `TB` of 1000.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "K" | "KiB" | "k" => 1 << 10,
        "M" | "MiB" | "m" => 1 << 20,
        "G" | "GiB" | "g" => 1 << 30,
        "T" | "TiB" | "t" => 1 << 40,
        "kB" | "KB" => 1000,
        "MB" => 1000_u64.pow(2),
        "GB" => 1000_u64.pow(3),
        "TB" => 1000_u64.pow(4),
        _ => return Err(format!("unit {unit:?} is unknown, expected a size such as 512MiB or 8GiB")),
    };
    let malformed = || "expected a size such as 512MiB or 8GiB".to_owned();
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor).ok_or_else(|| format!("{text} does not fit into 64 bits"))?,
        Err(_) => {
            let fraction: f64 = number.parse().map_err(|_| malformed())?;
            let product = fraction * factor as f64;
            if !(product.is_finite() && product < u64::MAX as f64) {
                return Err(malformed());
            }
            product as u64
        }
    };
    if bytes == 0 { Err(malformed()) } else { Ok(bytes) }
}

/// A time: `30s`, `500ms`, `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "expected a time with its unit, such as 30s, 500ms or 2m".to_owned())
}

/// A number of processors, fractions allowed.
pub(crate) fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if cpus.is_finite() && cpus >= 0.01 => Ok(cpus),
        _ => Err("expected a number of processors from 0.01 up, such as 1.5".to_owned()),
    }
}

/// `KEY=VALUE`; the value may be empty and may hold further equal signs.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// `--mount SRC:DST[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

pub(crate) fn mount(text: &str) -> Result<Mount, String> {
    const EXPECTED: &str = "expected SRC:DST or SRC:DST:ro with absolute paths";
    let mut parts = text.split(':');
    let (Some(source), Some(target), mode, None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(EXPECTED.to_owned());
    };
    let read_only = match mode {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(other) => return Err(format!("mode {other:?} is unknown, {EXPECTED}")),
    };
    if !source.starts_with('/') || !target.starts_with('/') {
        return Err(EXPECTED.to_owned());
    }
    Ok(Mount { source: source.into(), target: target.into(), read_only })
}

/// `--publish [ADDR:]HP:P`: a port of the host in front of a port of the replica. Without an address only this machine
/// can connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Publish {
    pub(crate) address: IpAddr,
    /// 0 lets the kernel choose.
    pub(crate) host_port: u16,
    pub(crate) port: u16,
}

pub(crate) fn publish(text: &str) -> Result<Publish, String> {
    const EXPECTED: &str = "expected [ADDRESS:]HOST_PORT:PORT, such as 8080:8000 or 0.0.0.0:0:8000";
    let malformed = || EXPECTED.to_owned();
    let (rest, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let (address, host_port) = match rest.rsplit_once(':') {
        None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        Some((address, host_port)) => {
            let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
            (bare.parse().map_err(|_| format!("{bare:?} is no IP address, {EXPECTED}"))?, host_port)
        }
    };
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port, {EXPECTED}"));
    let publish = Publish { address, host_port: number(host_port)?, port: number(port)? };
    if publish.port == 0 { Err(format!("the replica's port is 0, {EXPECTED}")) } else { Ok(publish) }
}

/// A port of the replica.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err("expected a port from 1 to 65535".to_owned()),
    }
}

/// `--net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Net {
    /// A network namespace of its own with loopback only.
    Private,
    /// The host's.
    Host,
    /// A network namespace of its own in which even loopback is down.
    None,
    /// One that somebody else made.
    Path(PathBuf),
}

pub(crate) fn net(text: &str) -> Result<Net, String> {
    match text {
        "private" => Ok(Net::Private),
        "host" => Ok(Net::Host),
        "none" => Ok(Net::None),
        _ => match text.strip_prefix("ns:") {
            Some(path) if path.starts_with('/') => Ok(Net::Path(path.into())),
            _ => Err("expected private, host, none or ns:/PATH of a network namespace".to_owned()),
        },
    }
}

/// `--compression auto|zstd:N|none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// What pays, chunk by chunk.
    Auto,
    /// zstd at this level, 1 to 19.
    Zstd(i32),
    /// As it is.
    None,
}

pub(crate) fn compression(text: &str) -> Result<Compression, String> {
    let level = |text: &str| text.parse().ok().filter(|level| (1..=19).contains(level));
    match text {
        "auto" => Ok(Compression::Auto),
        "none" => Ok(Compression::None),
        _ => (text.strip_prefix("zstd:").and_then(level).map(Compression::Zstd))
            .ok_or_else(|| "expected auto, none or zstd:LEVEL with a level from 1 to 19".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("8G"), Ok(8 << 30));
        assert_eq!(bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(bytes("1GB"), Ok(1_000_000_000));
        for text in ["", "GiB", "8Gi", "-1", "0", "1e3", "99999999999TiB", "1.2.3G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn published_ports_with_and_without_addresses() {
        let local = publish("8080:8000").expect("parses");
        assert_eq!(
            (local.address.to_string().as_str(), local.host_port, local.port),
            ("127.0.0.1", 8080, 8000)
        );
        let six = publish("[::1]:0:8000").expect("parses");
        assert_eq!((six.address.to_string().as_str(), six.host_port), ("::1", 0));
        for text in ["8000", "a:8000", "1.2.3:1:2", "8080:0", "70000:1", ":8000"] {
            assert!(publish(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mounts_are_absolute() {
        assert_eq!(
            mount("/models:/m:ro"),
            Ok(Mount { source: "/models".into(), target: "/m".into(), read_only: true })
        );
        for text in ["/a", "a:/b", "/a:b", "/a:/b:xx", "/a:/b:ro:z"] {
            assert!(mount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_rest() {
        assert_eq!(net("ns:/run/netns/x"), Ok(Net::Path("/run/netns/x".into())));
        assert!(net("ns:x").is_err() && net("bridge").is_err());
        assert_eq!(compression("zstd:3"), Ok(Compression::Zstd(3)));
        assert!(compression("zstd:0").is_err() && compression("lz4").is_err());
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(key_value("=x").is_err() && key_value("x").is_err());
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert!(duration("30").is_err());
        assert!(cpus("0").is_err() && cpus("nan").is_err());
    }
}
