//! Reading and writing the working sets of snapshots, which lie beside them.

use crate::digest::Digest;
use crate::error::Result;
use crate::format::working_set::{self, WorkingSet};
use crate::format::{row_number, working_set_folder, working_set_path};
use crate::limits::WORKING_SET_BYTES_LIMIT;
use crate::objects::Put;
use crate::store::Store;

impl Store {
    /// The newest working set of a snapshot, by the digest of its manifest.
    ///
    /// # Errors
    /// What the store says; [`crate::Error::Damaged`] if it is not readable.
    pub async fn working_set(&self, manifest: &Digest) -> Result<Option<WorkingSet>> {
        let objects = self.objects().await?;
        let listed = objects.list(&working_set_folder(manifest)).await?;
        let Some(number) = listed.iter().filter_map(|(path, _)| row_number(path.filename()?)).max() else {
            return Ok(None);
        };
        let path = working_set_path(manifest, number);
        let bytes = objects.get(&path, WORKING_SET_BYTES_LIMIT).await?;
        working_set::decode(&bytes, number, manifest, objects.name(), path.as_ref()).map(Some)
    }

    /// Writes the working set that follows on `set.number`. False: another restore has written one since; it stays.
    ///
    /// # Errors
    /// What the store says, for example that it can only be read.
    pub async fn put_working_set(&self, manifest: &Digest, set: &WorkingSet) -> Result<bool> {
        let objects = self.objects().await?;
        let path = working_set_path(manifest, set.number + 1);
        let put = objects.put_new(&path, working_set::encode(manifest, set).into()).await?;
        Ok(put == Put::Written)
    }
}
