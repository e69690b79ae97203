//! Boot objects: sums agree, leaves lie within the index object, nothing exceeds its limit.

use rewarm_integration_tests::fuzz::{self, Random};
use rewarm_store::parsers::{self, BootShape, LeafShape};

fn shape(random: &mut Random) -> BootShape {
    let index_bytes = random.one(&[0, 100, 1 << 20]);
    let mut regions = Vec::new();
    for _ in 0..random.below(4) {
        let mut leaves = Vec::new();
        for _ in 0..random.below(4) {
            leaves.push(LeafShape {
                chunks: random.one(&[0, 1, 4096, 4097, u64::MAX]),
                bytes: random.one(&[0, 1, 4096, 1 << 20, 1 << 45, u64::MAX - 4095]),
                place: match random.below(3) {
                    0 => None,
                    1 => Some((16, 80)),
                    _ => Some((
                        random.one(&[0, 50, 1 << 20, u64::MAX]),
                        random.one(&[0, 51, 1 << 20, u64::MAX]),
                    )),
                },
            });
        }
        let sum = leaves.iter().fold(0u64, |sum, leaf| sum.saturating_add(leaf.bytes));
        regions.push((if random.once_in(6) { sum ^ 4096 } else { sum }, leaves));
    }
    let packs = (0..random.below(4)).map(|_| random.one(&[0, 1 << 20, 64 << 20, (64 << 20) + 1])).collect();
    let files = (0..random.below(3)).map(|n| (format!("core-{n}.img"), random.below(200) as usize)).collect();
    BootShape { packs, index_bytes, regions, files }
}

/// The rules that a restore relies on.
fn sound(shape: &BootShape) -> Result<(), String> {
    if shape.packs.iter().any(|bytes| *bytes > 64 << 20) {
        return Err("a pack is longer than a pack may be".to_owned());
    }
    for (bytes, leaves) in &shape.regions {
        let mut sum = 0u64;
        for leaf in leaves {
            sum = sum.checked_add(leaf.bytes).ok_or_else(|| format!("{leaf:?} has no end"))?;
            if leaf.chunks > 4096 {
                return Err(format!("{leaf:?} has too many chunks"));
            }
            if let Some((offset, length)) = leaf.place {
                let end = offset.checked_add(length).filter(|end| *end <= shape.index_bytes);
                if end.is_none() || length > 1 << 20 {
                    return Err(format!("{leaf:?} lies outside of an index of {}", shape.index_bytes));
                }
            }
        }
        if sum != *bytes || !sum.is_multiple_of(4096) || sum > 1 << 46 {
            return Err(format!("a region of {bytes} bytes has leaves of {sum}"));
        }
    }
    Ok(())
}

#[test]
fn boot_objects() {
    let mut accepted = 0_u64;
    fuzz::holds("boot objects", |random| {
        let (mut bytes, raw_bytes) = parsers::boot(&shape(random));
        random.spoil(&mut bytes);
        let announced = match random.below(10) {
            0 => random.one(&[0, 1, raw_bytes + 1, 300 << 20, u64::MAX]),
            _ => raw_bytes,
        };
        let Some(read) = parsers::read_boot(&bytes, announced) else { return Ok(()) };
        accepted += u64::from(!read.regions.is_empty());
        sound(&read)
    });
    assert!(accepted > 0, "no case was accepted, so nothing was compared");
}

#[test]
fn a_reader_of_boot_objects_that_checks_nothing_is_caught() {
    fuzz::catches("unchecked boot objects", |random| sound(&shape(random)));
}
