//! Which device takes whose place.
//!
//! A restore onto other devices names every device that the driver saw at the checkpoint, each with the one that takes
//! its place. Where all stay the same the driver must get no map: one that maps each device to itself makes it take the
//! slow way of a migration.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::nvml::Machine;

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
    /// There is a device of the same kind, and too little of its memory is free.
    #[error("{uuid} ({name}) needs {needed} bytes, and {} has {free} bytes free", if place == uuid { "it".to_owned() } else { place.to_string() })]
    NoRoom {
        /// The device at the checkpoint.
        uuid: Uuid,
        /// What it was.
        name: String,
        /// Bytes that are needed.
        needed: u64,
        /// The device that would take its place.
        place: Uuid,
        /// Bytes that it has free.
        free: u64,
    },
    /// A device that was asked for is not here.
    #[error("{uuid} is not here: this machine has {here}")]
    NotHere {
        /// Which.
        uuid: Uuid,
        /// What is.
        here: String,
    },
    /// The same device stands twice in a list.
    #[error("{uuid} stands twice in the list of GPUs")]
    Twice {
        /// Which.
        uuid: Uuid,
    },
}

/// Which devices a restore may take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Wish {
    /// Those of the checkpoint where they are here, else others of their kind.
    #[default]
    Same,
    /// Whichever of their kind have enough free memory; those of the checkpoint first.
    Auto,
    /// These, in the order of the checkpoint's that were in use.
    These(Vec<Uuid>),
}

impl std::str::FromStr for Wish {
    type Err = UuidError;

    /// `auto`, or identities with commas between them.
    fn from_str(text: &str) -> Result<Self, UuidError> {
        match text {
            "auto" => Ok(Self::Auto),
            list => Ok(Self::These(list.split(',').map(str::parse).collect::<Result<_, _>>()?)),
        }
    }
}

/// What the devices of a checkpoint need and those of this machine have.
#[derive(Debug, Clone, Default)]
pub struct Room {
    /// Bytes that are needed on each device of the checkpoint; what is missing needs nothing.
    pub needed: BTreeMap<Uuid, u64>,
    /// Free bytes of each device here; of what is missing nobody knows, and it counts as enough.
    pub free: BTreeMap<Uuid, u64>,
}

impl Room {
    fn needed(&self, device: &Device) -> u64 {
        self.needed.get(&device.uuid).copied().unwrap_or(0)
    }

    fn free(&self, device: &Device) -> u64 {
        self.free.get(&device.uuid).copied().unwrap_or(u64::MAX)
    }
}

/// A device that has too little memory free for what goes back to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{gpu} ({name}) needs {needed} bytes of device memory free and has {free}")]
pub struct Lack {
    /// The device.
    pub gpu: Uuid,
    /// What it is.
    pub name: String,
    /// Bytes that go back to it.
    pub needed: u64,
    /// Bytes that it has free.
    pub free: u64,
}

/// The first device that has too little memory free. One that NVML does not show counts as having enough.
#[must_use]
pub fn lacking(needed: &BTreeMap<Uuid, u64>, machine: &Machine) -> Option<Lack> {
    machine.gpus.iter().find_map(|gpu| {
        let needed = *needed.get(&gpu.uuid)?;
        let lack = || Lack { gpu: gpu.uuid, name: gpu.name.clone(), needed, free: gpu.free_bytes };
        (gpu.free_bytes < needed).then(lack)
    })
}

/// What is needed on each device of this machine, by what was needed on those of a checkpoint; `map` as [`map`] made it.
#[must_use]
pub fn placed(needed: &BTreeMap<Uuid, u64>, map: &[Pair]) -> BTreeMap<Uuid, u64> {
    let place = |old: &Uuid| map.iter().find(|pair| pair.old == *old).map_or(*old, |pair| pair.new);
    needed.iter().map(|(old, bytes)| (place(old), *bytes)).collect()
}

/// The map from the devices of a checkpoint to those of this machine; empty where every device stays the same.
///
/// Devices that need most choose first. One that is here keeps its place unless `wish` says otherwise.
///
/// # Errors
/// [`Misfit`], where the driver would refuse as well, or run out of memory.
pub fn map(there: &[Device], here: &[Device], wish: &Wish, room: &Room) -> Result<Vec<Pair>, Misfit> {
    for list in [there, here] {
        let mut seen = BTreeSet::new();
        if let Some(twice) = list.iter().find(|device| !seen.insert(device.uuid)) {
            return Err(Misfit::Twice { uuid: twice.uuid });
        }
    }
    if here.len() < there.len() {
        return Err(Misfit::TooFew { there: there.len(), here: here.len() });
    }
    let mut wanted = wanted(here, wish)?.into_iter();
    let mut free: Vec<&Device> = here.iter().collect();
    let mut order: Vec<&Device> = there.iter().collect();
    order.sort_by_key(|old| std::cmp::Reverse(room.needed(old)));
    let mut places = BTreeMap::new();
    for old in order {
        let asked = if room.needed(old) > 0 { wanted.next() } else { None };
        let others: BTreeSet<Uuid> =
            there.iter().filter(|other| !places.contains_key(&other.uuid)).map(|other| other.uuid).collect();
        let place = place(old, &free, asked, wish, room, &others)?;
        free.retain(|device| device.uuid != place);
        places.insert(old.uuid, place);
    }
    if places.iter().all(|(old, new)| old == new) {
        return Ok(Vec::new());
    }
    Ok(there.iter().map(|old| Pair { old: old.uuid, new: places[&old.uuid] }).collect())
}

/// The devices that were asked for by name.
fn wanted(here: &[Device], wish: &Wish) -> Result<Vec<Uuid>, Misfit> {
    let Wish::These(list) = wish else { return Ok(Vec::new()) };
    let missing = list.iter().find(|uuid| !here.iter().any(|device| device.uuid == **uuid));
    match missing {
        Some(uuid) => {
            let all: Vec<String> = here.iter().map(|device| device.uuid.to_string()).collect();
            Err(Misfit::NotHere { uuid: *uuid, here: all.join(", ") })
        }
        None => Ok(list.clone()),
    }
}

/// Where one device goes. `others` are those of the checkpoint that have no place yet, itself among them.
fn place(
    old: &Device,
    free: &[&Device],
    asked: Option<Uuid>,
    wish: &Wish,
    room: &Room,
    others: &BTreeSet<Uuid>,
) -> Result<Uuid, Misfit> {
    let needed = room.needed(old);
    let kind = |new: &&&Device| new.name == old.name && new.total_bytes >= old.total_bytes;
    let mut fitting: Vec<&Device> = free.iter().filter(kind).copied().collect();
    if let Some(asked) = asked {
        fitting.retain(|new| new.uuid == asked);
    }
    // Itself first, then what is nobody else's place, then what has most room.
    fitting.sort_by_key(|new| {
        let taken = new.uuid != old.uuid && others.contains(&new.uuid);
        (new.uuid != old.uuid, taken && *wish != Wish::Auto, std::cmp::Reverse(room.free(new)))
    });
    let Some(first) = fitting.first() else {
        let (uuid, name, total_bytes) = (old.uuid, old.name.clone(), old.total_bytes);
        return Err(Misfit::NoPlace { uuid, name, total_bytes });
    };
    let enough = |new: &&&Device| room.free(new) >= needed;
    let chosen = match wish {
        Wish::Auto => fitting.iter().find(enough),
        // Whoever wants the same device wants no other one, unless it is not here.
        Wish::Same | Wish::These(_) => Some(first).filter(enough),
    };
    let best = fitting.iter().max_by_key(|new| room.free(new)).unwrap_or(first);
    let nearest = if *wish == Wish::Auto { best } else { first };
    chosen.map(|new| new.uuid).ok_or_else(|| Misfit::NoRoom {
        uuid: old.uuid,
        name: old.name.clone(),
        needed,
        place: nearest.uuid,
        free: room.free(nearest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u8, name: &str, total_bytes: u64) -> Device {
        Device { uuid: Uuid([number; 16]), name: name.to_owned(), total_bytes }
    }

    fn same(there: &[Device], here: &[Device]) -> Result<Vec<Pair>, Misfit> {
        map(there, here, &Wish::Same, &Room::default())
    }

    #[test]
    fn the_same_devices_need_no_map_in_any_order() {
        let (a, b) = (device(1, "x", 8), device(2, "x", 8));
        assert_eq!(same(&[a.clone(), b.clone()], &[b.clone(), a.clone()]), Ok(Vec::new()));
        assert_eq!(same(&[], &[a]), Ok(Vec::new()));
    }

    #[test]
    fn a_device_that_is_here_keeps_its_place_and_every_device_is_named() {
        let (a, b, c) = (device(1, "x", 8), device(2, "x", 8), device(3, "x", 9));
        let pairs = same(&[a.clone(), b.clone()], &[c.clone(), b.clone()]).expect("a map");
        assert_eq!(pairs, [Pair { old: a.uuid, new: c.uuid }, Pair { old: b.uuid, new: b.uuid }]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (a, b) = (device(1, "x", 8), device(2, "x", 8));
        let list = [a.clone(), b.clone()];
        assert_eq!(same(&list, std::slice::from_ref(&a)), Err(Misfit::TooFew { there: 2, here: 1 }));
        assert_eq!(same(&list, &[a.clone(), a.clone()]), Err(Misfit::Twice { uuid: a.uuid }));
        for other in [device(3, "y", 8), device(3, "x", 7)] {
            let error = same(std::slice::from_ref(&a), &[other]).expect_err("another kind, less memory");
            assert_eq!(error, Misfit::NoPlace { uuid: a.uuid, name: "x".into(), total_bytes: 8 });
        }
    }

    #[test]
    fn a_full_device_is_refused_and_auto_takes_another_one() {
        let (a, b) = (device(1, "x", 8), device(2, "x", 8));
        let list = [a.clone(), b.clone()];
        let room = Room { needed: [(a.uuid, 5)].into(), free: [(a.uuid, 4), (b.uuid, 6)].into() };
        let error = map(&list, &list, &Wish::Same, &room).expect_err("full");
        let text = error.to_string();
        assert!(text.ends_with("(x) needs 5 bytes, and it has 4 bytes free"), "{text}");
        let swapped = [Pair { old: a.uuid, new: b.uuid }, Pair { old: b.uuid, new: a.uuid }];
        assert_eq!(map(&list, &list, &Wish::Auto, &room).as_deref(), Ok(&swapped[..]));
        assert_eq!(map(&list, &list, &Wish::These(vec![b.uuid]), &room).as_deref(), Ok(&swapped[..]));
        let small = Room { free: [(a.uuid, 4), (b.uuid, 3)].into(), ..room.clone() };
        let error = map(&list, &list, &Wish::Auto, &small).expect_err("all are full");
        assert!(matches!(error, Misfit::NoRoom { place, free: 4, .. } if place == a.uuid), "{error}");
        let unknown = Room { free: BTreeMap::new(), ..room };
        assert_eq!(map(&list, &list, &Wish::Same, &unknown), Ok(Vec::new()), "nobody knows what is free");
    }

    #[test]
    fn what_goes_back_needs_room_on_the_device_that_takes_the_place() {
        let (a, b, c) = (Uuid([1; 16]), Uuid([2; 16]), Uuid([3; 16]));
        let needed = placed(&[(a, 5), (b, 7)].into(), &[Pair { old: a, new: c }]);
        assert_eq!(needed, [(c, 5), (b, 7)].into());
        let gpu = |uuid, free_bytes| crate::nvml::Gpu {
            uuid,
            name: "x".into(),
            total_bytes: 9,
            free_bytes,
            sharing: crate::nvml::Sharing::Whole,
            persistent: None,
            used_by: BTreeMap::new(),
        };
        let machine = |gpus| Machine { release: String::new(), gpus };
        assert_eq!(lacking(&needed, &machine(vec![gpu(a, 0), gpu(c, 5), gpu(b, 7)])), None);
        assert_eq!(lacking(&needed, &machine(vec![gpu(c, 5)])), None, "nobody knows of the other");
        let lack = lacking(&needed, &machine(vec![gpu(c, 5), gpu(b, 6)])).expect("one byte too few");
        assert_eq!((lack.gpu, lack.needed, lack.free), (b, 7, 6));
    }

    #[test]
    fn a_device_that_is_asked_for_must_be_here_and_fit() {
        let (a, b) = (device(1, "x", 8), device(2, "y", 8));
        let room = Room { needed: [(a.uuid, 5)].into(), free: BTreeMap::new() };
        let ask =
            |uuid| map(std::slice::from_ref(&a), &[a.clone(), b.clone()], &Wish::These(vec![uuid]), &room);
        assert_eq!(ask(a.uuid), Ok(Vec::new()));
        assert!(matches!(ask(b.uuid), Err(Misfit::NoPlace { .. })));
        assert!(matches!(ask(Uuid([9; 16])), Err(Misfit::NotHere { .. })));
        assert_eq!("auto".parse(), Ok(Wish::Auto));
        assert_eq!(a.uuid.to_string().parse(), Ok(Wish::These(vec![a.uuid])));
        assert!("GPU-1".parse::<Wish>().is_err());
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
