//! Sends what was received into the store, object by object; memory is given back as packs are confirmed.

use rewarm_criu::page_server::Object;
use rewarm_report::{Progress, Stage};
use rewarm_store::{Memory, RegionKind, Session, SharedMemory, TaskMemory};

use crate::capture::Captured;
use crate::dump::Dumped;
use crate::error::Cause;
use crate::receive::ObjectPages;

/// Uploads pages and trees. Gives the sizes for the manifest.
pub(crate) async fn all(session: &Session, dumped: Dumped, progress: &dyn Progress) -> Result<Memory, Cause> {
    let Dumped { pages, upper, shm, .. } = dumped;
    let total = pages.received_bytes();
    let objects = tokio::task::spawn_blocking(move || pages.without_zeros());
    tree(session, "upper", upper).await?;
    tree(session, "shm", shm).await?;
    let mut memory = Memory::default();
    let mut done = 0;
    for object in objects.await.expect("looking for zeros does not panic") {
        let bytes = object.layout.logical_bytes();
        memory.logical_bytes += bytes;
        memory.zero_bytes += bytes - object.layout.stream_bytes();
        match object.object {
            Object::Task { pid } => memory.tasks.push(TaskMemory { pid, bytes }),
            Object::Shmem { id } => memory.shared.push(SharedMemory { id, bytes }),
        }
        pages_of(session, object).await?;
        done += bytes;
        progress.bytes(Stage::Upload, done, Some(total));
    }
    Ok(memory)
}

async fn pages_of(session: &Session, object: ObjectPages) -> Result<(), Cause> {
    let kind = match object.object {
        Object::Task { pid } => RegionKind::Task { pid },
        Object::Shmem { id } => RegionKind::Shmem { id },
    };
    let mut region = session.region(kind).await?;
    for piece in object.content {
        region.push(piece).await?;
    }
    region.finish(object.layout.encode()).await?;
    Ok(())
}

async fn tree(session: &Session, name: &str, captured: Captured) -> Result<(), Cause> {
    let mut region = session.region(RegionKind::Tree { name: name.to_owned() }).await?;
    for piece in captured.content {
        region.push(piece).await?;
    }
    region.finish(captured.tree.encode()).await?;
    Ok(())
}
