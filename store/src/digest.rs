//! BLAKE3 in its two roles: digests of stored objects and keyed ids of chunks.
//!
//! A digest covers the bytes of an object as they are stored. A chunk id covers the content of a chunk before it is
//! compressed, under the key of the store: where the store is encrypted, a reader of the bucket cannot test whether it
//! holds a known content; where it is not, the key is a public constant and ids of all such stores agree.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const PREFIX: &str = "blake3:";

/// BLAKE3 digest of an object as it is stored. Written as `blake3:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a text is not a [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected blake3: and 64 lower-case hexadecimal digits, found {0:?}")]
pub struct DigestSyntax(String);

impl Digest {
    /// Digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest whose 32 bytes these are.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits alone, as they stand in object names.
    #[must_use]
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestSyntax;

    fn from_str(text: &str) -> Result<Self, DigestSyntax> {
        let syntax = || DigestSyntax(text.to_owned());
        let hex = text.strip_prefix(PREFIX).ok_or_else(syntax)?;
        if hex.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(syntax());
        }
        blake3::Hash::from_hex(hex).map(|hash| Self(*hash.as_bytes())).map_err(|_| syntax())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Keyed BLAKE3 of a chunk's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub(crate) [u8; 32]);

impl ChunkId {
    /// The 32 bytes of the id.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The key under which chunk ids of a store are made.
#[derive(Clone)]
pub(crate) struct ChunkKey([u8; 32]);

impl ChunkKey {
    /// The key of every store that is not encrypted: BLAKE3 of the ASCII text `rewarm chunk key v1`.
    pub(crate) fn public() -> Self {
        Self(*blake3::hash(b"rewarm chunk key v1").as_bytes())
    }

    /// The id of a chunk whose content is the concatenation of `parts`.
    pub(crate) fn id<'a>(&self, parts: impl IntoIterator<Item = &'a [u8]>) -> ChunkId {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(part);
        }
        ChunkId(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_from_its_text() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
        );
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }

    #[test]
    fn a_digest_is_refused_without_prefix_in_upper_case_or_at_another_length() {
        let text = Digest::of(b"abc").to_string();
        for bad in [&text[7..], &text.to_uppercase(), &text[..70], "blake3:", ""] {
            assert_eq!(bad.parse::<Digest>(), Err(DigestSyntax(bad.to_owned())));
        }
        let upper = format!("blake3:{}", text[7..].to_uppercase());
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn the_public_key_is_this_for_ever() {
        let hex = blake3::Hash::from_bytes(ChunkKey::public().0).to_hex();
        assert_eq!(hex.as_str(), "8989efc3fc233adefacf6214ff99139492320e19a4b936a8edeccb4df0673842");
    }

    #[test]
    fn a_chunk_id_does_not_depend_on_how_its_content_is_split() {
        let key = ChunkKey::public();
        let whole: &[u8] = b"0123456789";
        assert_eq!(key.id([whole]), key.id([&whole[..3], &whole[3..]]));
        assert_ne!(*key.id([whole]).as_bytes(), *Digest::of(whole).as_bytes());
    }
}
