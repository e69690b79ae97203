//! Taking snapshots out of a store's sight. Objects stay for [`crate::Store::collect`], so that a restore that has begun
//! can end.
//!
//! A tag is removed by its next index object, which names no variants: the row goes on, so that a snapshot that is being
//! published to the tag at the same time notices.

use uuid::Uuid;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::tag::Variant;
use crate::store::Store;
use crate::url::{Name, Target};
use crate::writer::next_index;

/// What was taken out of sight.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// The tag under which it was.
    pub tag: String,
    /// Manifests that the tag does not mean any more.
    pub manifests: Vec<Digest>,
    /// Variants that it still means.
    pub left: usize,
}

impl Store {
    /// Removes a tag with all its variants, or, where `target` is a digest, that variant from every tag of the name.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such tag, or no tag of the name means the digest.
    pub async fn remove(&self, name: &Name, target: &Target) -> Result<Vec<Removed>> {
        let (tags, digest) = match target {
            Target::Tag(tag) => (vec![tag.clone()], None),
            Target::Digest(digest) => (self.tags_of(name).await?, Some(*digest)),
        };
        let mut removed = Vec::new();
        for tag in tags {
            removed.extend(self.remove_from(name, &tag, digest).await?);
        }
        if removed.is_empty() {
            let object = match target {
                Target::Tag(tag) => format!("{name}@{tag}"),
                Target::Digest(digest) => format!("{name}@{digest}"),
            };
            return Err(Error::NotFound { store: self.to_string(), object, source: None });
        }
        Ok(removed)
    }

    async fn tags_of(&self, name: &Name) -> Result<Vec<String>> {
        let all = self.list().await?.into_iter();
        Ok(all.filter(|listed| listed.name == name.as_str()).map(|listed| listed.tag).collect())
    }

    /// Writes the tag's next index object without what is removed, as often as somebody else takes its number first.
    async fn remove_from(&self, name: &Name, tag: &str, digest: Option<Digest>) -> Result<Option<Removed>> {
        loop {
            let Some(index) = self.tag(name, tag).await? else { return Ok(None) };
            let gone = |variant: &Variant| digest.is_none_or(|digest| variant.manifest == digest);
            let (out, left): (Vec<Variant>, Vec<Variant>) = index.variants.into_iter().partition(gone);
            if out.is_empty() {
                return Ok(None);
            }
            let kept = left.len();
            if next_index(self, name, tag, index.number, Uuid::now_v7(), left).await? {
                let manifests = out.into_iter().map(|variant| variant.manifest).collect();
                return Ok(Some(Removed { tag: tag.to_owned(), manifests, left: kept }));
            }
        }
    }
}
