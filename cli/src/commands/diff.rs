//! `rewarm diff`

use rewarm_restore::mappings::{self, MappingDifference};
use rewarm_store::{Boot, Chunks, Comparison, Digest, Reference, RegionKind, RegionSide, Store, compare};
use serde::Serialize;

use crate::args::{Diff, Global};
use crate::failure::Cause;
use crate::render::{Output, bytes, table};

#[derive(Serialize)]
struct Report {
    first: Side,
    second: Side,
    /// Different chunks that both have.
    shared: Chunks,
    only_first: Chunks,
    only_second: Chunks,
    regions: Vec<Region>,
    mappings: Vec<MappingDifference>,
}

#[derive(Serialize)]
struct Side {
    reference: String,
    digest: Digest,
}

/// A region of either; absent bytes mean that this side has no such region.
#[derive(Serialize)]
struct Region {
    #[serde(flatten)]
    kind: RegionKind,
    first_bytes: Option<u64>,
    second_bytes: Option<u64>,
    /// Bytes of chunks that the other side's region does not have.
    first_differing_bytes: u64,
    second_differing_bytes: u64,
}

pub(crate) async fn run(args: &Diff, global: &Global) -> Result<u8, Cause> {
    let (first, first_boot) = side(&args.first).await?;
    let (second, second_boot) = side(&args.second).await?;
    let comparison = compare(&first_boot, &second_boot).await?;
    let mappings = mappings::differences(&first_boot, &second_boot, &comparison)
        .map_err(|cause| Cause::Parts(Box::new(cause)))?;
    let report = report(first, second, comparison, mappings);
    Output::new(global).answer(&report, text)?;
    Ok(0)
}

/// The newest variant of a reference.
async fn side(reference: &Reference) -> Result<(Side, Boot), Cause> {
    let snapshot = Store::open(&reference.store).await?.resolve(reference).await?;
    let side = Side { reference: reference.to_string(), digest: snapshot.digest() };
    Ok((side, snapshot.boot().await?))
}

fn report(first: Side, second: Side, comparison: Comparison, mappings: Vec<MappingDifference>) -> Report {
    let bytes_of = |side: &Option<RegionSide>| side.as_ref().map(|side| side.bytes);
    let differing = |side: &Option<RegionSide>| side.as_ref().map_or(0, RegionSide::differing_bytes);
    let region = |region: &rewarm_store::RegionComparison| Region {
        kind: region.kind.clone(),
        first_bytes: bytes_of(&region.first),
        second_bytes: bytes_of(&region.second),
        first_differing_bytes: differing(&region.first),
        second_differing_bytes: differing(&region.second),
    };
    Report {
        first,
        second,
        shared: comparison.shared,
        only_first: comparison.only_first,
        only_second: comparison.only_second,
        regions: comparison.regions.iter().map(region).collect(),
        mappings,
    }
}

fn text(report: &Report) -> String {
    let row =
        |what: &str, chunks: Chunks| vec![what.to_owned(), chunks.chunks.to_string(), bytes(chunks.bytes)];
    let chunks = table(
        &["CONTENT", "CHUNKS", "BYTES"],
        [
            row("in both", report.shared),
            row("only in the first", report.only_first),
            row("only in the second", report.only_second),
        ],
    );
    let regions = table(
        &["REGION", "FIRST", "DIFFERING", "SECOND", "DIFFERING"],
        report.regions.iter().map(|region| {
            vec![
                kind(&region.kind),
                or_absent(region.first_bytes),
                bytes(region.first_differing_bytes),
                or_absent(region.second_bytes),
                bytes(region.second_differing_bytes),
            ]
        }),
    );
    let mappings = table(
        &["PID", "MAPPING", "PERM", "FIRST", "SECOND", "NAME"],
        report.mappings.iter().map(|mapping| {
            vec![
                mapping.pid.to_string(),
                format!("{:x}-{:x}", mapping.start, mapping.end),
                mapping.permissions.clone(),
                or_absent(mapping.first_bytes),
                or_absent(mapping.second_bytes),
                mapping.name.clone(),
            ]
        }),
    );
    format!("{chunks}\n{regions}\n{mappings}")
}

fn or_absent(count: Option<u64>) -> String {
    count.map_or_else(|| "absent".to_owned(), bytes)
}

fn kind(kind: &RegionKind) -> String {
    match kind {
        RegionKind::Task { pid } => format!("process {pid}"),
        RegionKind::Shmem { id } => format!("shared segment {id}"),
        RegionKind::Tree { name } => format!("files of {name}"),
        RegionKind::File { name } => format!("image {name}"),
        RegionKind::Device { pid, .. } => format!("device memory of process {pid}"),
    }
}
