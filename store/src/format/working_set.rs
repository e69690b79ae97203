//! The working set of a snapshot: what restored servers touched first. A hint: nothing depends on its being right.
//!
//! It lies beside the snapshot, in a row of numbered objects of which the highest counts, because it is known only after
//! a restore, and a snapshot does not change.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::FORMAT;
use crate::limits::EXTENTS_LIMIT;

/// What was touched first, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Number of the object in its row; 0 for one that was not read from a store.
    pub number: u64,
    /// Index of a region, offset in its stream and length, both in bytes.
    pub extents: Vec<(u32, u64, u64)>,
}

impl WorkingSet {
    /// Bytes in all extents.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.extents.iter().fold(0, |sum, (_, _, bytes)| sum.saturating_add(*bytes))
    }
}

#[derive(Serialize, Deserialize)]
struct Object {
    format: u32,
    manifest: Digest,
    extents: Vec<(u32, u64, u64)>,
}

pub(crate) fn encode(manifest: &Digest, set: &WorkingSet) -> Bytes {
    let extents = set.extents.iter().take(EXTENTS_LIMIT).copied().collect();
    let object = Object { format: FORMAT, manifest: *manifest, extents };
    Bytes::from(serde_json::to_vec(&object).expect("it has only string keys"))
}

/// Reads a working set. `store` and `object` are for the error.
pub(crate) fn decode(
    bytes: &[u8],
    number: u64,
    manifest: &Digest,
    store: &str,
    object: &str,
) -> Result<WorkingSet> {
    let damaged = |damage: Damage| Error::damaged(store, object, damage);
    let read: Object = serde_json::from_slice(bytes).map_err(|error| damaged(error.into()))?;
    if read.format > FORMAT {
        return Err(Error::Newer { object: object.to_owned(), found: read.format, supported: FORMAT });
    }
    if read.manifest != *manifest {
        let (found, expected) = (read.manifest.to_string(), manifest.to_string());
        return Err(damaged(Damage::Digest { found, expected }));
    }
    if read.extents.len() > EXTENTS_LIMIT {
        let (found, limit) = (read.extents.len() as u64, EXTENTS_LIMIT as u64);
        return Err(damaged(Damage::Bound { what: "extents of a working set", found, limit }));
    }
    Ok(WorkingSet { number, extents: read.extents })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_that_of_another_snapshot_is_not() {
        let (own, other) = (Digest::of(b"a"), Digest::of(b"b"));
        let set = WorkingSet { number: 3, extents: vec![(0, 4096, 8192), (2, 0, u64::MAX)] };
        let bytes = encode(&own, &set);
        assert_eq!(decode(&bytes, 3, &own, "store", "object").expect("its own"), set);
        assert_eq!(set.bytes(), u64::MAX);
        assert!(matches!(decode(&bytes, 3, &other, "store", "object"), Err(Error::Damaged { .. })));
        assert!(matches!(decode(b"{", 3, &own, "store", "object"), Err(Error::Damaged { .. })));
        let newer = String::from_utf8_lossy(&bytes).replacen("\"format\":1", "\"format\":99", 1);
        assert!(matches!(decode(newer.as_bytes(), 3, &own, "store", "object"), Err(Error::Newer { .. })));
    }

    #[test]
    fn an_endless_one_is_refused() {
        let many = WorkingSet { number: 1, extents: vec![(0, 0, 1); EXTENTS_LIMIT + 1] };
        let own = Digest::of(b"a");
        assert_eq!(decode(&encode(&own, &many), 1, &own, "", "").expect("cut").extents.len(), EXTENTS_LIMIT);
        let object = Object { format: 1, manifest: own, extents: many.extents };
        let bytes = serde_json::to_vec(&object).expect("json");
        assert!(matches!(decode(&bytes, 1, &own, "", ""), Err(Error::Damaged { .. })));
    }
}
