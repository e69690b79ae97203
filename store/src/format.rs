//! What is stored: names, frames and contents of the objects of format versions 1 and 2.
//!
//! ```text
//! packs/UUID                     chunks, one after another, and a footer that lists them
//! indexes/HEX                    leaves of the index, where they are too long for the boot object
//! boots/HEX                      root of the index and skeleton files
//! manifests/HEX                  one snapshot; refers to a boot object by digest and length
//! tags/NAME/TAG/000000001.json   which manifests a tag means; the highest number counts
//! working-sets/HEX/000000001.json   what restores of the manifest HEX touched first; the highest number counts
//! ```
//!
//! HEX is the BLAKE3 digest of the object, so an object with such a name never changes. `docs/snapshot-format.md`
//! describes every field; the files under `tests/golden/v1` hold the exact bytes.

pub(crate) mod boot;
pub(crate) mod frame;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
pub(crate) mod index;
pub mod manifest;
pub(crate) mod pack;
pub mod tag;
pub(crate) mod wire;
pub(crate) mod working_set;

use object_store::path::Path;
use uuid::Uuid;

use crate::digest::Digest;
use crate::url::Name;

/// The format version of all objects but manifests that need a newer one.
pub const FORMAT: u32 = 1;

/// The newest format version of manifests: with regions of device memory.
pub const FORMAT_NEWEST: u32 = 2;

/// Digits of the number in a tag's object name: names then sort as numbers do.
const TAG_DIGITS: usize = 9;

pub(crate) fn pack_path(id: Uuid) -> Path {
    Path::from(format!("packs/{id}"))
}

pub(crate) fn index_path(digest: &Digest) -> Path {
    Path::from(format!("indexes/{}", digest.hex()))
}

pub(crate) fn boot_path(digest: &Digest) -> Path {
    Path::from(format!("boots/{}", digest.hex()))
}

pub(crate) fn manifest_path(digest: &Digest) -> Path {
    Path::from(format!("manifests/{}", digest.hex()))
}

pub(crate) fn tag_folder(name: &Name, tag: &str) -> Path {
    Path::from(format!("tags/{name}/{tag}"))
}

pub(crate) fn tag_path(name: &Name, tag: &str, number: u64) -> Path {
    Path::from(format!("tags/{name}/{tag}/{number:0TAG_DIGITS$}.json"))
}

/// Claims on the next number of a tag, in stores that know no conditional write.
pub(crate) fn claim_folder(name: &Name, tag: &str) -> Path {
    Path::from(format!("claims/{name}/{tag}"))
}

pub(crate) fn working_set_folder(manifest: &Digest) -> Path {
    Path::from(format!("working-sets/{}", manifest.hex()))
}

pub(crate) fn working_set_path(manifest: &Digest, number: u64) -> Path {
    Path::from(format!("working-sets/{}/{number:0TAG_DIGITS$}.json", manifest.hex()))
}

/// The number that an object's name in a row stands for.
pub(crate) fn row_number(file_name: &str) -> Option<u64> {
    tag_number(file_name)
}

/// The number that an object's name in a tag's folder stands for.
pub(crate) fn tag_number(file_name: &str) -> Option<u64> {
    let digits = file_name.strip_suffix(".json")?;
    let plain = digits.len() == TAG_DIGITS && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_tag_read_back_from_names_and_nothing_else_does() {
        let name: Name = "web".parse().unwrap();
        let path = tag_path(&name, "v1", 42);
        assert_eq!(path.as_ref(), "tags/web/v1/000000042.json");
        assert_eq!(tag_number(path.filename().unwrap()), Some(42));
        for other in ["42.json", "000000042.json#1", "+00000042.json", "000000042", "x"] {
            assert_eq!(tag_number(other), None, "{other}");
        }
    }
}
