//! CRIU's own images, mended and put into the snapshot.
//!
//! Connections that cannot exist in a clone come back closed; timers that CRIU would lose are armed again. Images too
//! long for the skeleton (contents of deleted files, of pipes) become regions.

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use rewarm_container::Net;
use rewarm_criu::admission::{self, Peer};
use rewarm_criu::image::files::Protocol;
use rewarm_criu::patch;
use rewarm_store::{PAGE_BYTES, RegionKind, SKELETON_FILE_BYTES_LIMIT, Session};

use crate::error::Cause;
use crate::own::{Pairs, plain};
use crate::pipeline::Replica;

/// Long images are pushed in pieces of this size.
const PIECE_BYTES: usize = 4 << 20;

/// Mends the images and stores them. Gives the number of connections that will come back closed.
pub(crate) async fn store(
    session: &Session,
    replica: &Replica,
    own: &Pairs,
    tcp_close: bool,
) -> Result<usize, Cause> {
    let inside = replica.client.inside();
    let (directory, config) = (inside.dump_images(), inside.bundle().join("config.json"));
    let private_net = replica.record.spec.net == Net::Private;
    let own = own.clone();
    let (mended, closed) = tokio::task::spawn_blocking(move || {
        patch::rearm_timerfds(&directory)?;
        let closed = close_connections(&directory, private_net, &own, tcp_close)?;
        admissible(&directory, &config)?;
        Ok::<_, Cause>((images(&directory)?, closed))
    })
    .await
    .expect("mending images does not panic")?;
    for path in mended {
        put(session, &path).await?;
    }
    Ok(closed)
}

/// Nobody must publish what every restore would refuse. The source's bundle and a clone's are made alike.
fn admissible(directory: &Path, config: &Path) -> Result<(), Cause> {
    let violations = admission::check_bundle(directory, config)?;
    if violations.is_empty() {
        return Ok(());
    }
    Err(Cause::Inadmissible { violations: violations.iter().map(ToString::to_string).collect() })
}

/// Decides for each connection of the images what a clone finds. Judged here and not at the preflight, because this is
/// what the server really had when it was frozen.
fn close_connections(
    directory: &Path,
    private_net: bool,
    own: &Pairs,
    tcp_close: bool,
) -> Result<usize, Cause> {
    let mut close = Vec::new();
    for connection in admission::connections(directory)? {
        match connection.peer {
            Peer::Inside { .. } => {}
            // Nobody can be at the other end but Rewarm itself.
            _ if private_net => close.push(connection.id),
            _ if own.contains(&(plain(connection.local), plain(connection.remote))) => {
                close.push(connection.id)
            }
            // Nobody is at the other end any more who could notice.
            _ if connection.state.is_ended_by_peer() => close.push(connection.id),
            // A connected UDP socket has no other side that could notice.
            _ if tcp_close || connection.protocol != Protocol::Tcp => close.push(connection.id),
            Peer::Unaccepted => close.push(connection.id),
            Peer::Outside => {
                return Err(Cause::NewConnection {
                    local: connection.local.to_string(),
                    remote: connection.remote.to_string(),
                });
            }
        }
    }
    Ok(patch::close_connections(directory, &close)?)
}

/// The image files that belong into a snapshot: all but the pages, which the receiver has.
fn images(directory: &Path) -> Result<Vec<PathBuf>, Cause> {
    let doing = format!("list {}", directory.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Cause::io(&doing))? {
        let path = entry.map_err(Cause::io(&doing))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with("pages-") && !name.starts_with("pagemap-") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

async fn put(session: &Session, path: &Path) -> Result<(), Cause> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = tokio::fs::read(path).await.map_err(Cause::io(format!("read {}", path.display())))?;
    if bytes.len() as u64 <= SKELETON_FILE_BYTES_LIMIT {
        return Ok(session.skeleton(&name, Bytes::from(bytes))?);
    }
    let length = bytes.len() as u64;
    let mut region = session.region(RegionKind::File { name }).await?;
    for piece in bytes.chunks(PIECE_BYTES) {
        let mut padded = BytesMut::from(piece);
        padded.resize(piece.len().next_multiple_of(PAGE_BYTES as usize), 0);
        region.push(padded.freeze()).await?;
    }
    region.finish(length.to_le_bytes().to_vec()).await?;
    Ok(())
}
