//! The sixteen bytes that every binary object begins with.
//!
//! ```text
//!  0        8         12        16
//!  | magic  | version | codec   | content ...
//!  | 8 ASCII| u32 LE  | u32 LE  |
//! ```

use crate::codec::Codec;
use crate::error::{Damage, Error, Result};
use crate::format::FORMAT;

pub(crate) const HEADER_BYTES: usize = 16;

/// Which kind of object a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Magic {
    Pack,
    Index,
    Boot,
}

impl Magic {
    fn bytes(self) -> &'static [u8; 8] {
        match self {
            Magic::Pack => b"RWRMPACK",
            Magic::Index => b"RWRMINDX",
            Magic::Boot => b"RWRMBOOT",
        }
    }
}

/// The header of an object whose content is stored by `codec`.
pub(crate) fn header(magic: Magic, codec: Codec) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(magic.bytes());
    out[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    out[12..].copy_from_slice(&u32::from(codec.id()).to_le_bytes());
    out
}

/// Reads a header off `bytes`. A newer version is told apart from damage. `store` and `object` are for the error.
pub(crate) fn open<'a>(
    magic: Magic,
    bytes: &'a [u8],
    store: &str,
    object: &str,
) -> Result<(Codec, &'a [u8])> {
    let damaged = |damage: Damage| Error::damaged(store, object, damage);
    let Some((head, content)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        let (found, expected) = (bytes.len() as u64, HEADER_BYTES as u64);
        return Err(damaged(Damage::Length { found, expected }));
    };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head[..8] != magic.bytes()[..] {
        return Err(damaged(Damage::Frame {
            what: "magic",
            found: head[..8].escape_ascii().to_string(),
            expected: magic.bytes().escape_ascii().to_string(),
        }));
    }
    if word(8) > FORMAT {
        return Err(Error::Newer { object: object.to_owned(), found: word(8), supported: FORMAT });
    }
    let codec = u8::try_from(word(12)).ok().and_then(Codec::from_id);
    match codec {
        Some(codec) if word(8) == FORMAT => Ok((codec, content)),
        _ => Err(damaged(Damage::Frame {
            what: "version and codec",
            found: format!("{} and {}", word(8), word(12)),
            expected: format!("{FORMAT} and a codec from 0 to 3"),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_a_newer_one_is_no_damage() {
        let mut bytes = header(Magic::Boot, Codec::Zstd).to_vec();
        bytes.push(9);
        assert_eq!(open(Magic::Boot, &bytes, "s", "o").unwrap(), (Codec::Zstd, &[9][..]));
        assert!(matches!(open(Magic::Pack, &bytes, "s", "o"), Err(Error::Damaged { .. })));
        bytes[8] = 2;
        assert!(matches!(
            open(Magic::Boot, &bytes, "s", "o"),
            Err(Error::Newer { found: 2, supported: 1, .. })
        ));
        bytes[8] = 0;
        assert!(matches!(open(Magic::Boot, &bytes, "s", "o"), Err(Error::Damaged { .. })));
        assert!(matches!(open(Magic::Boot, &bytes[..15], "s", "o"), Err(Error::Damaged { .. })));
    }
}
