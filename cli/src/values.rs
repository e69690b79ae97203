//! Values of flags that no library crate owns: how each is written, and what a malformed one is told.

use std::error::Error;
use std::str::FromStr;
use std::time::Duration;

use rewarm_container::Name;
use rewarm_store::Reference;

use crate::args::Unwanted;

/// A value whose type a library crate owns. clap shows the outermost message of an error only, and the reason lies below.
pub(crate) fn spelled<T: FromStr<Err: Error>>(text: &str) -> Result<T, String> {
    spelled_by(str::parse)(text)
}

/// The same with another function that reads it.
pub(crate) fn spelled_by<T, E: Error>(
    read: impl Fn(&str) -> Result<T, E> + Clone,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        read(text).map_err(|error| {
            let (mut message, mut next) = (error.to_string(), error.source());
            while let Some(source) = next {
                message = format!("{message}: {source}");
                next = source.source();
            }
            message
        })
    }
}

/// The name of a preset of an engine.
pub(crate) fn engine_name(text: &str) -> Result<&'static str, String> {
    let names = rewarm_probe::engine::PRESETS.map(|(name, _)| name);
    let found = names.into_iter().find(|name| *name == text);
    found.ok_or_else(|| format!("expected {}", names.join(", ")))
}

/// What `rm` removes: a name of a replica has neither slash nor `@`, a reference to a snapshot has a slash.
pub(crate) fn unwanted(text: &str) -> Result<Unwanted, String> {
    if text.contains(['/', '@']) {
        spelled::<Reference>(text).map(Unwanted::Snapshot)
    } else {
        text.parse::<Name>().map(Unwanted::Replica).map_err(|error| error.to_string())
    }
}

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

/// Bytes, none among them.
pub(crate) fn bytes_or_none(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { bytes(text) }
}

/// Size of a benchmark's server. What is measured lies in memory and on disk several times.
pub(crate) fn bench_size(text: &str) -> Result<u64, String> {
    const SIZE_MAX: u64 = 4 << 30;
    match bytes(text)? {
        size @ ..=SIZE_MAX => Ok(size),
        _ => Err("expected at most 4GiB".to_owned()),
    }
}

/// A part of a whole: above 0, at most 1.
pub(crate) fn part(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err("expected a number above 0 and at most 1".to_owned()),
    }
}

/// Memory for a frozen server's pages.
pub(crate) fn freeze_memory(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        given if given < rewarm_snapshot::ARENA_BYTES_MIN => {
            Err(format!("expected at least {}MiB", rewarm_snapshot::ARENA_BYTES_MIN >> 20))
        }
        given => Ok(given),
    }
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

/// A port of the replica.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err("expected a port from 1 to 65535".to_owned()),
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
    fn the_rest() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(key_value("=x").is_err() && key_value("x").is_err());
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert!(duration("30").is_err());
        assert_eq!(freeze_memory("16MiB"), Ok(16 << 20));
        assert_eq!(freeze_memory("15MiB"), Err("expected at least 16MiB".to_owned()));
        assert!(cpus("0").is_err() && cpus("nan").is_err());
    }
}
