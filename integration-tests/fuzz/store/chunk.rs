//! Chunks: whatever bytes a codec is given, it fills the announced length exactly or refuses, and never panics.

use rewarm_integration_tests::fuzz::{self, Random};
use rewarm_store::parsers;

/// Stored forms of some content, right and wrong ones.
fn stored(random: &mut Random) -> (u8, Vec<u8>, usize) {
    let length = 4096 * (1 + random.below(4)) as usize;
    let noise = random.bytes(length / 64 + 1);
    let content: Vec<u8> = (0..length).map(|at| noise[at / 64] ^ (at as u8 & random_mask(&noise))).collect();
    let codec = random.below(5) as u8;
    let mut bytes = match random.below(4) {
        0 => random.bytes(length / 8),
        1 => parsers::encoded(2, &vec![0; 1 << 20]).unwrap_or_default(),
        _ => parsers::encoded(codec, &content).unwrap_or(content),
    };
    random.spoil(&mut bytes);
    (codec, bytes, length)
}

fn random_mask(noise: &[u8]) -> u8 {
    noise[0] | 0x11
}

/// Decodes into the middle of a larger buffer, whose ends must stay as they are.
fn case(random: &mut Random, decode: impl Fn(u8, &[u8], &mut [u8]) -> bool) -> Result<bool, String> {
    let (codec, bytes, length) = stored(random);
    let guard = 64;
    let mut buffer = vec![0xa5; length + 2 * guard];
    let decoded = decode(codec, &bytes, &mut buffer[guard..guard + length]);
    if buffer[..guard].iter().chain(&buffer[guard + length..]).any(|byte| *byte != 0xa5) {
        return Err(format!("codec {codec} wrote beyond its content"));
    }
    let again = decode(codec, &bytes, &mut vec![0; length]);
    if again != decoded {
        return Err(format!("codec {codec} decodes once and not again"));
    }
    if decoded && decode(codec, &bytes, &mut vec![0; length + 4096]) {
        return Err(format!("codec {codec} fills two lengths"));
    }
    Ok(decoded)
}

#[test]
fn chunks() {
    let mut decoded = 0_u64;
    fuzz::holds("chunks", |random| {
        decoded += u64::from(case(random, parsers::decodes)?);
        Ok(())
    });
    assert!(decoded > 0, "no case was decoded, so nothing was compared");
}

#[test]
fn a_decoder_that_is_content_with_less_is_caught() {
    fuzz::catches("a length that is not compared", |random| {
        let content_with_less = |codec: u8, stored: &[u8], raw: &mut [u8]| {
            let steps = (1..=raw.len() / 4096).rev().map(|pages| pages * 4096);
            steps.into_iter().any(|length| parsers::decodes(codec, stored, &mut raw[..length]))
        };
        case(random, content_with_less).map(drop)
    });
}
