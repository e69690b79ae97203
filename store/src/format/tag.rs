//! A tag: a row of numbered index objects, of which the highest counts.
//!
//! Each lists variants: manifests with the facts by which a restore chooses. Publishing replaces the variant whose facts
//! are equal and keeps the others, so that a fleet with two drivers keeps one tag.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::FORMAT;
use crate::format::manifest::Facts;
use crate::limits::VARIANTS_LIMIT;

/// One index object of a tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagIndex {
    /// Format version.
    pub format: u32,
    /// Name of the snapshot.
    pub name: String,
    /// The tag.
    pub tag: String,
    /// Number of this object in the row.
    pub number: u64,
    /// Made by the session that wrote this object, so that it knows its own again.
    pub writer: String,
    /// When it was written, RFC 3339 in UTC.
    pub published: String,
    /// The manifests that the tag means, the newest first; none once the tag was removed.
    pub variants: Vec<Variant>,
}

/// A manifest and the facts by which a restore chooses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variant {
    /// Digest of the manifest object.
    pub manifest: Digest,
    /// Bytes of the manifest object.
    pub bytes: u64,
    /// When it was published, RFC 3339 in UTC.
    pub published: String,
    /// The facts that decide.
    pub facts: DecidingFacts,
}

/// Facts that decide which variant fits a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecidingFacts {
    /// Architecture, as `uname -m` says.
    pub architecture: String,
    /// `flags` of `/proc/cpuinfo`, sorted.
    pub cpu_features: Vec<String>,
    /// Release of the kernel.
    pub kernel: String,
    /// Version of CRIU.
    pub criu: String,
    /// Version of the device driver.
    pub driver: Option<String>,
    /// Names of the devices.
    pub gpus: Vec<String>,
}

impl DecidingFacts {
    /// The facts of `facts` that decide. The driver is `device.release`, or where that is missing `device.driver`; the devices
    /// are the names in `device.devices`.
    #[must_use]
    pub fn of(facts: &Facts) -> Self {
        let mut cpu_features = facts.cpu.features.clone();
        cpu_features.sort_unstable();
        cpu_features.dedup();
        let device = facts.device.as_ref();
        let driver = device.and_then(|device| match (device.get("release"), device.get("driver")) {
            (Some(Value::String(release)), _) => Some(release.clone()),
            (_, Some(version)) => Some(version.to_string()),
            _ => None,
        });
        let name = |gpu: &Value| Some(gpu.get("name")?.as_str()?.to_owned());
        let gpus = device.and_then(|device| device.get("devices")?.as_array());
        let gpus = gpus.map(|gpus| gpus.iter().filter_map(name).collect()).unwrap_or_default();
        Self {
            architecture: facts.architecture.clone(),
            cpu_features,
            kernel: facts.kernel.clone(),
            criu: facts.criu.clone(),
            driver,
            gpus,
        }
    }
}

impl TagIndex {
    /// The variants with `new` in front and without the one whose facts are equal to its.
    pub(crate) fn with_variant(variants: &[Variant], new: Variant) -> Result<Vec<Variant>> {
        let mut all = vec![new];
        all.extend(variants.iter().filter(|old| old.facts != all[0].facts).cloned().collect::<Vec<_>>());
        if all.len() > VARIANTS_LIMIT {
            let (value, limit) = (all.len() as u64, VARIANTS_LIMIT as u64);
            return Err(Error::Limit { what: "variants of a tag", value, limit });
        }
        Ok(all)
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut out = serde_json::to_vec_pretty(self).expect("a tag index has only string keys");
        out.push(b'\n');
        Bytes::from(out)
    }
}

#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// Reads an index object of a tag. `store` and `object` are for the error.
pub(crate) fn decode(bytes: &[u8], store: &str, object: &str) -> Result<TagIndex> {
    let damaged = |damage: Damage| Error::damaged(store, object, damage);
    let Version { format } = serde_json::from_slice(bytes).map_err(|error| damaged(error.into()))?;
    if format > FORMAT {
        return Err(Error::Newer { object: object.to_owned(), found: format, supported: FORMAT });
    }
    let index: TagIndex = serde_json::from_slice(bytes).map_err(|error| damaged(error.into()))?;
    if index.variants.len() > VARIANTS_LIMIT {
        let (found, limit) = (index.variants.len() as u64, VARIANTS_LIMIT as u64);
        return Err(damaged(Damage::Bound { what: "variants", found, limit }));
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_and_devices_decide() {
        let of = |device: Value| DecidingFacts::of(&Facts { device: Some(device), ..Facts::default() });
        let gpus = serde_json::json!([{"uuid": "GPU-1", "name": "H100"}, {"uuid": "GPU-2", "name": "H100"}]);
        let new = of(serde_json::json!({"release": "580.95.05", "driver": 13000, "devices": gpus}));
        assert_eq!((new.driver.as_deref(), new.gpus.len()), (Some("580.95.05"), 2));
        let old = of(serde_json::json!({"driver": 13000, "devices": []}));
        assert_eq!((old.driver.as_deref(), old.gpus.len()), (Some("13000"), 0));
        assert_eq!(DecidingFacts::of(&Facts::default()).driver, None);
    }
}
