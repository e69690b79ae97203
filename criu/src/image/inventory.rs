//! `inventory.img`: CRIU's own facts about a dump.

use std::path::Path;

use prost::Message;

use super::core::Ids;
use super::{Kind, read_one};

/// What the inventory says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Version of the image format; 2 for every CRIU since 1.7.
    pub image_version: u32,
    /// Namespaces of the process that ran CRIU: what a task shares with it is not restored but found.
    pub host: Ids,
    /// All TCP connections were dumped to come back closed.
    pub tcp_close: bool,
    /// Security module of the dumping host: 0 none, 1 SELinux, 2 AppArmor.
    pub lsm: u32,
}

#[derive(Clone, PartialEq, Message)]
struct InventoryEntry {
    #[prost(uint32, tag = "1")]
    image_version: u32,
    #[prost(message, optional, tag = "3")]
    root_ids: Option<super::core::IdsEntry>,
    #[prost(uint32, tag = "6")]
    lsm: u32,
    #[prost(bool, tag = "10")]
    tcp_close: bool,
}

/// Reads the inventory of an image directory.
///
/// # Errors
/// [`crate::Error::Io`] if there is none, [`crate::Error::Image`] if it is not what CRIU writes.
pub fn read(directory: &Path) -> crate::Result<Inventory> {
    let entry: InventoryEntry = read_one(&directory.join("inventory.img"), Kind::Inventory)?;
    Ok(Inventory {
        image_version: entry.image_version,
        host: entry.root_ids.unwrap_or_default().into(),
        tcp_close: entry.tcp_close,
        lsm: entry.lsm,
    })
}
