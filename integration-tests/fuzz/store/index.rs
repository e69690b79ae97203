//! Leaves: every chunk that is accepted lies within its pack, has content of a length that is allowed and a codec.

use rewarm_integration_tests::fuzz::{self, Random};
use rewarm_store::parsers::{self, LeafChunk};

const PACKS: [u64; 3] = [0, 5_000, 64 << 20];

fn chunks(random: &mut Random) -> Vec<LeafChunk> {
    let count = random.below(8);
    let chunk = |_| LeafChunk {
        pack: random.one(&[0, 1, 2, 3, u32::MAX]),
        offset: random.one(&[0, 16, 4_990, 5_000, 5_001, 64 << 20, u32::MAX]),
        stored: random.one(&[0, 1, 10, 4096, 64 << 20, u32::MAX]),
        pages: random.one(&[0, 1, 256, 1024, 1025, (1 << 20) - 1]),
        codec: random.one(&[0, 1, 2, 3]),
    };
    (0..count).map(chunk).collect()
}

/// The rules that a fetch relies on.
fn sound(chunks: &[LeafChunk]) -> Result<(), String> {
    for chunk in chunks {
        let pack = PACKS.get(chunk.pack as usize).ok_or_else(|| format!("{chunk:?} is in no pack"))?;
        if u64::from(chunk.offset) + u64::from(chunk.stored) > *pack {
            return Err(format!("{chunk:?} ends behind its pack of {pack}"));
        }
        if chunk.pages == 0 || u64::from(chunk.pages) * 4096 > parsers::CHUNK_BYTES_LIMIT {
            return Err(format!("{chunk:?} has no allowed length"));
        }
        if chunk.codec > 3 {
            return Err(format!("{chunk:?} has no codec"));
        }
    }
    Ok(())
}

#[test]
fn leaves() {
    let mut accepted = 0_u64;
    fuzz::holds("leaves", |random| {
        let made = chunks(random);
        let mut bytes = parsers::leaf(&made);
        random.spoil(&mut bytes);
        let count = if random.once_in(8) { random.below(10) } else { made.len() as u64 };
        let Some(read) = parsers::read_leaf(&bytes, count, &PACKS) else { return Ok(()) };
        accepted += u64::from(!read.is_empty());
        if read.len() as u64 != count {
            return Err(format!("{} chunks, {count} were announced", read.len()));
        }
        sound(&read)
    });
    assert!(accepted > 0, "no case was accepted, so nothing was compared");
}

#[test]
fn a_reader_of_leaves_that_checks_nothing_is_caught() {
    fuzz::catches("unchecked chunks", |random| sound(&chunks(random)));
}
