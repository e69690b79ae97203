//! What two snapshots share, chunk by chunk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use crate::digest::ChunkId;
use crate::error::Result;
use crate::format::manifest::RegionKind;
use crate::reader::{Boot, ChunkMap};

/// What two snapshots share and what each has for itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Different chunks that both have, and the bytes of their content.
    pub shared: Chunks,
    /// Different chunks that only the first has.
    pub only_first: Chunks,
    /// Different chunks that only the second has.
    pub only_second: Chunks,
    /// Regions of either, the first's in their order and then what only the second has.
    pub regions: Vec<RegionComparison>,
}

/// Some chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Chunks {
    /// How many.
    pub chunks: u64,
    /// Bytes of their content.
    pub bytes: u64,
}

/// A region that at least one of two snapshots has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionComparison {
    /// What it holds.
    pub kind: RegionKind,
    /// The region in the first.
    pub first: Option<RegionSide>,
    /// The region in the second.
    pub second: Option<RegionSide>,
}

/// A region of one of the two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionSide {
    /// Its index in that snapshot.
    pub region: usize,
    /// Bytes of its stream.
    pub bytes: u64,
    /// Stretches of its stream whose chunks the other's region does not have, in bytes. A chunk counts as a whole.
    pub differing: Vec<Range<u64>>,
}

impl RegionSide {
    /// Bytes of its stream that the other's region does not have.
    #[must_use]
    pub fn differing_bytes(&self) -> u64 {
        self.differing.iter().map(|range| range.end - range.start).sum()
    }
}

/// Compares two snapshots by their indexes; content is not read. Chunks of stores with different keys are all different.
///
/// # Errors
/// [`crate::Error::Damaged`] if an index is.
pub async fn compare(first: &Boot, second: &Boot) -> Result<Comparison> {
    let mut comparison = Comparison::default();
    let (ours, theirs) = (chunks_of(first).await?, chunks_of(second).await?);
    for (id, bytes) in &ours {
        let side = if theirs.contains_key(id) { &mut comparison.shared } else { &mut comparison.only_first };
        side.add(*bytes);
    }
    for (_, bytes) in theirs.iter().filter(|(id, _)| !ours.contains_key(id)) {
        comparison.only_second.add(*bytes);
    }
    let mut partners: BTreeMap<&RegionKind, usize> =
        second.regions().iter().enumerate().map(|(region, other)| (&other.kind, region)).collect();
    for (region, own) in first.regions().iter().enumerate() {
        let partner = partners.remove(&own.kind);
        let other = match partner {
            Some(partner) => Some(second.chunks(partner).await?),
            None => None,
        };
        let map = first.chunks(region).await?;
        comparison.regions.push(RegionComparison {
            kind: own.kind.clone(),
            first: Some(side(region, &map, other.as_deref())),
            second: match (partner, &other) {
                (Some(partner), Some(other)) => Some(side(partner, other, Some(&map))),
                _ => None,
            },
        });
    }
    for (kind, region) in partners {
        let map = second.chunks(region).await?;
        let second = Some(side(region, &map, None));
        comparison.regions.push(RegionComparison { kind: kind.clone(), first: None, second });
    }
    Ok(comparison)
}

impl Chunks {
    fn add(&mut self, bytes: u64) {
        self.chunks += 1;
        self.bytes += bytes;
    }
}

async fn chunks_of(boot: &Boot) -> Result<HashMap<ChunkId, u64>> {
    let mut all = HashMap::new();
    for region in 0..boot.regions().len() {
        all.extend(boot.chunks(region).await?.refs().iter().map(|chunk| (chunk.id, u64::from(chunk.raw))));
    }
    Ok(all)
}

fn side(region: usize, map: &ChunkMap, other: Option<&ChunkMap>) -> RegionSide {
    let known: HashSet<ChunkId> =
        other.map(|other| other.refs().iter().map(|chunk| chunk.id).collect()).unwrap_or_default();
    let mut differing: Vec<Range<u64>> = Vec::new();
    let mut end = 0;
    for chunk in map.refs() {
        let begin = end;
        end += u64::from(chunk.raw);
        if known.contains(&chunk.id) {
            continue;
        }
        match differing.last_mut() {
            Some(last) if last.end == begin => last.end = end,
            _ => differing.push(begin..end),
        }
    }
    RegionSide { region, bytes: end, differing }
}
