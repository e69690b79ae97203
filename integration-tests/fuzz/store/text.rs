//! Manifests and tags: JSON of any kind is refused or has no more parts than the format allows, in bounded time and memory.

use rewarm_integration_tests::fuzz::{self, Random};
use rewarm_store::parsers;

/// The golden manifest of version 1, which every program reads.
const MANIFEST: &str = include_str!("../../../store/tests/golden/v1/manifest.jsonl");
const TAG: &str = include_str!("../../../store/tests/golden/v1/tag.json");

/// A manifest with parts repeated, left out or spoiled.
fn manifest(random: &mut Random) -> (Vec<u8>, usize) {
    let region = r#"{"kind":"task","pid":1,"bytes":12288,"chunks":2}"#;
    let count =
        random.one(&[1, 1, 2, 100, parsers::REGIONS_LIMIT as usize, parsers::REGIONS_LIMIT as usize + 1]);
    let regions = vec![region; count].join(",");
    let text = MANIFEST.replace(region, &regions);
    assert!(text.contains(&regions), "the golden manifest has another region");
    let text = match random.below(12) {
        0 => text.replace(
            "\"format\":1",
            random.one(&["\"format\":2", "\"format\":-1", "\"format\":1e99", "\"x\":1"]),
        ),
        1 => text.replace('\n', " "),
        2 => text.replace("\"facts\":{", &format!("\"facts\":{{\"probe\":{}", "[".repeat(100_000))),
        3 => text.replace("\"facts\":{", "\"facts\":{\"unknown\":{\"a\":[1,2]},"),
        _ => text,
    };
    let mut bytes = text.into_bytes();
    if count <= 2 {
        random.spoil(&mut bytes);
    }
    (bytes, count)
}

fn sound(regions: usize) -> Result<(), String> {
    if regions as u64 > parsers::REGIONS_LIMIT {
        return Err(format!("{regions} regions were accepted"));
    }
    Ok(())
}

#[test]
fn manifests() {
    let mut accepted = 0_u64;
    fuzz::holds("manifests", |random| {
        let (bytes, _) = manifest(random);
        let Some((regions, _)) = parsers::read_manifest(&bytes) else { return Ok(()) };
        accepted += 1;
        sound(regions)
    });
    assert!(accepted > 0, "no case was accepted, so nothing was compared");
}

#[test]
fn a_reader_of_manifests_that_counts_nothing_is_caught() {
    fuzz::catches("uncounted regions", |random| sound(manifest(random).1));
}

#[test]
fn tags() {
    let mut accepted = 0_u64;
    fuzz::holds("tags", |random| {
        let variant = TAG.split_once("\"variants\": [").and_then(|(_, rest)| rest.rsplit_once(']'));
        let (variant, _) = variant.ok_or("the golden tag has another form")?;
        let count = random.one(&[1, 2, 256, 257]);
        let text = TAG.replacen(variant, &vec![variant; count].join(","), 1);
        let mut bytes = text.into_bytes();
        random.spoil(&mut bytes);
        let Some(variants) = parsers::read_tag(&bytes) else { return Ok(()) };
        accepted += 1;
        if variants > 256 { Err(format!("{variants} variants were accepted")) } else { Ok(()) }
    });
    assert!(accepted > 0, "no case was accepted, so nothing was compared");
}
