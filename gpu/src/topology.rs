//! Which device takes whose place.
//!
//! A restore onto other devices names every device that the driver saw at the checkpoint, each with the one that takes
//! its place. Where all stay the same the driver must get no map: one that maps each device to itself makes it take the
//! slow way of a migration.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A device's identity, different for each piece of hardware.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    /// As `nvidia-smi` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU-")?;
        for (index, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is no device's identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no GPU: expected GPU- and 32 hexadecimal digits, as nvidia-smi -L shows them")]
pub struct UuidError {
    /// What was given.
    text: String,
}

impl std::str::FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let error = || UuidError { text: text.to_owned() };
        let digits: String = text.strip_prefix("GPU-").ok_or_else(error)?.split('-').collect();
        if digits.len() != 32 || !digits.is_ascii() {
            return Err(error());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| error())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Uuid {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One device and the one that takes its place; the driver's `CUcheckpointGpuPair`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The device at the checkpoint.
    pub old: Uuid,
    /// The device now.
    pub new: Uuid,
}

/// A device as the driver shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its identity.
    pub uuid: Uuid,
    /// What it is, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
}

/// Why no map can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// There are fewer devices than at the checkpoint.
    #[error("{there} GPUs at the checkpoint, {here} here")]
    TooFew {
        /// At the checkpoint.
        there: usize,
        /// Here.
        here: usize,
    },
    /// No device that is left is of the same kind and large enough.
    #[error("nothing here takes the place of {uuid} ({name}, {total_bytes} bytes)")]
    NoPlace {
        /// The device at the checkpoint.
        uuid: Uuid,
        /// What it was.
        name: String,
        /// Its memory.
        total_bytes: u64,
    },
    /// The same device stands twice in a list.
    #[error("{uuid} stands twice in the list of GPUs")]
    Twice {
        /// Which.
        uuid: Uuid,
    },
}

/// The map from the devices of a checkpoint to those of this machine; empty where every device is here itself.
///
/// A device that is here keeps its place; each other one gets the first free one of its kind with as much memory.
///
/// # Errors
/// [`Misfit`], where the driver would refuse as well.
pub fn map(there: &[Device], here: &[Device]) -> Result<Vec<Pair>, Misfit> {
    for list in [there, here] {
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = list.iter().find(|device| !seen.insert(device.uuid)) {
            return Err(Misfit::Twice { uuid: twice.uuid });
        }
    }
    let stays = |old: &Device| here.iter().any(|device| device.uuid == old.uuid);
    if there.iter().all(stays) {
        return Ok(Vec::new());
    }
    if here.len() < there.len() {
        return Err(Misfit::TooFew { there: there.len(), here: here.len() });
    }
    let mut free: Vec<&Device> =
        here.iter().filter(|device| !there.iter().any(|old| old.uuid == device.uuid)).collect();
    there
        .iter()
        .map(|old| {
            if stays(old) {
                return Ok(Pair { old: old.uuid, new: old.uuid });
            }
            let fits = |new: &&Device| new.name == old.name && new.total_bytes >= old.total_bytes;
            let Some(place) = free.iter().position(fits) else {
                let (uuid, name, total_bytes) = (old.uuid, old.name.clone(), old.total_bytes);
                return Err(Misfit::NoPlace { uuid, name, total_bytes });
            };
            Ok(Pair { old: old.uuid, new: free.remove(place).uuid })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u8, name: &str, total_bytes: u64) -> Device {
        Device { uuid: Uuid([number; 16]), name: name.to_owned(), total_bytes }
    }

    #[test]
    fn the_same_devices_need_no_map_in_any_order() {
        let (a, b) = (device(1, "x", 8), device(2, "x", 8));
        assert_eq!(map(&[a.clone(), b.clone()], &[b.clone(), a.clone()]), Ok(Vec::new()));
        assert_eq!(map(&[], &[a]), Ok(Vec::new()));
    }

    #[test]
    fn a_device_that_is_here_keeps_its_place_and_every_device_is_named() {
        let (a, b, c) = (device(1, "x", 8), device(2, "x", 8), device(3, "x", 9));
        let pairs = map(&[a.clone(), b.clone()], &[c.clone(), b.clone()]).expect("a map");
        assert_eq!(pairs, [Pair { old: a.uuid, new: c.uuid }, Pair { old: b.uuid, new: b.uuid }]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (a, b) = (device(1, "x", 8), device(2, "x", 8));
        let list = [a.clone(), b.clone()];
        assert_eq!(map(&list, std::slice::from_ref(&a)), Err(Misfit::TooFew { there: 2, here: 1 }));
        assert_eq!(map(&list, &[a.clone(), a.clone()]), Err(Misfit::Twice { uuid: a.uuid }));
        for other in [device(3, "y", 8), device(3, "x", 7)] {
            let error = map(std::slice::from_ref(&a), &[other]).expect_err("another kind, less memory");
            assert_eq!(error, Misfit::NoPlace { uuid: a.uuid, name: "x".into(), total_bytes: 8 });
        }
    }

    #[test]
    fn an_identity_is_written_as_nvidia_smi_writes_it() {
        let text = "GPU-00112233-4455-6677-8899-aabbccddeeff";
        let uuid: Uuid = text.parse().expect("a GPU");
        assert_eq!(uuid.to_string(), text);
        for bad in [
            "",
            "GPU-",
            "00112233-4455-6677-8899-aabbccddeeff",
            "GPU-0011",
            "GPU-0011223344556677889zaabbccddeeff",
        ] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
    }
}
