//! Garbage collection: objects that no tag leads to are marked by a run of gc and removed by a later one.
//!
//! A **tombstone** (`tombstones/PATH`) marks an object. What makes this safe beside running snapshots, other runs of gc
//! and restores, all of it by the times of the store's own clock:
//!
//! 1. A session announces itself, then reads which objects have tombstones, then the indexes whose chunks it may reuse,
//!    and never refers to an object that has one. It publishes only while its announcement stands.
//! 2. A tombstone goes away only after its object. (What has one and is alive again keeps it; it is written anew, so that
//!    the wait begins again.)
//! 3. An object is removed if its tombstone is older than the grace time and than every session that is announced, and if
//!    no tag leads to it, read in this order: tombstones, announcements, objects, tags.
//!
//! So nothing ever comes to refer to an object after the tags were read in step 3: a session that began before the
//! tombstone was announced at the look, or had published by then; one that began after it saw the tombstone; and no
//! object has a name that a later session would write again (boot and index objects carry the session's id). The grace
//! time is for restores, which announce nothing: it must be longer than the longest of them.
//!
//! Two runs at once are kept apart by announcements too: whoever sees another gives way.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use uuid::Uuid;

use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::{boot_path, index_path, manifest_path, pack_path, tag_path, working_set_folder};
use crate::lease::{Announcement, AtWork, Doing};
use crate::limits::{CLAIM_AGE_MAX, CLOCK_GRAIN, LEASE};
use crate::objects::{Dated, Objects};
use crate::reader::Snapshot;
use crate::store::Store;

/// Where tombstones lie.
const TOMBSTONES: &str = "tombstones";
/// Folders of objects that tags lead to.
const FOLDERS: [&str; 6] = ["packs", "indexes", "boots", "manifests", "tags", "working-sets"];
/// Requests at the same time.
const REQUESTS: usize = 16;

/// How garbage is collected.
#[derive(Debug, Clone, Copy)]
pub struct Collect {
    /// How long an object stays after it was marked: longer than any restore takes.
    pub grace: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// Some objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    /// How many.
    pub objects: u64,
    /// How long they are together.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What a run did, or would have done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    /// Objects that tags lead to.
    pub alive: Count,
    /// Garbage that was marked now, for a later run to remove.
    pub marked: Count,
    /// Garbage that was marked before and has to stay for now: the grace time is not over, or a snapshot that is being
    /// written began before it was marked.
    pub waiting: Count,
    /// Garbage that was removed.
    pub removed: Count,
    /// Snapshots that are being written.
    pub sessions: u64,
}

/// A look at the whole store, in the order that safety needs.
struct Look {
    now_ms: i64,
    /// Marked objects, with the time of the mark.
    tombstones: BTreeMap<Path, i64>,
    sessions: AtWork,
    collections: AtWork,
    objects: Vec<Dated>,
    alive: HashSet<Path>,
    /// Rows of tags that were removed: they may go only while nobody writes.
    removed_rows: HashSet<Path>,
}

impl Store {
    /// Marks what no tag leads to and removes what an earlier run has marked.
    ///
    /// # Errors
    /// [`Error::Collecting`] while another run is at work. [`Error::Damaged`] or [`Error::Newer`] if a snapshot that a tag
    /// names cannot be read: what it needs is not known, so nothing is removed.
    pub async fn collect(&self, options: Collect) -> Result<Collected> {
        let objects = self.objects().await?.clone();
        if options.dry_run {
            let look = Look::at(self, &objects, true).await?;
            return look.act(&objects, options, None).await;
        }
        let announcement = Announcement::make(&objects, Doing::Collection).await?;
        let result = async {
            let look = Look::at(self, &objects, false).await?;
            let other = look.collections.begun_ms.keys().find(|id| **id != announcement.id());
            if let Some(other) = other {
                return Err(Error::Collecting { store: self.to_string(), other: other.to_string() });
            }
            look.act(&objects, options, Some(&announcement)).await
        };
        let result = result.await;
        announcement.end().await;
        result
    }

    /// The packs that are marked for removal, which no session may refer to.
    pub(crate) async fn doomed_packs(&self) -> Result<HashSet<Uuid>> {
        let folder = Path::from(format!("{TOMBSTONES}/packs"));
        let listed = self.objects().await?.list(&folder).await?;
        Ok(listed.iter().filter_map(|(path, _)| Uuid::parse_str(path.filename()?).ok()).collect())
    }

    /// Whether an object is marked for removal.
    pub(crate) async fn is_doomed(&self, path: &Path) -> Result<bool> {
        Ok(self.objects().await?.size(&tombstone(path)).await?.is_some())
    }

    /// Every object that a snapshot needs, with its length.
    pub(crate) async fn needs(&self, digest: &Digest) -> Result<Vec<(Path, u64)>> {
        let snapshot = Snapshot::read(self, digest).await?;
        let boot = snapshot.boot().await?;
        let named = snapshot.manifest().boot;
        let mut needs = vec![(manifest_path(digest), snapshot.manifest_bytes())];
        needs.push((boot_path(&named.digest), named.bytes));
        needs.extend(boot.index().map(|(digest, bytes)| (index_path(&digest), bytes)));
        needs.extend(boot.packs().iter().map(|(pack, bytes)| (pack_path(*pack), *bytes)));
        Ok(needs)
    }
}

fn tombstone(path: &Path) -> Path {
    Path::from(format!("{TOMBSTONES}/{path}"))
}

impl Look {
    async fn at(store: &Store, objects: &Objects, only_read: bool) -> Result<Self> {
        // A run that changes nothing may not even be allowed to ask the store for its time.
        let now_ms = if only_read { here_ms() } else { objects.now_ms().await? };
        let tombstones = objects
            .list_dated(&Path::from(TOMBSTONES))
            .await?
            .into_iter()
            .filter_map(|mark| {
                let marked = mark.path.as_ref().strip_prefix(TOMBSTONES)?.strip_prefix('/')?;
                Some((Path::from(marked), mark.modified_ms))
            })
            .collect();
        let sessions = AtWork::look(objects, Doing::Session, now_ms).await?;
        let collections = AtWork::look(objects, Doing::Collection, now_ms).await?;
        let mut all = Vec::new();
        for folder in FOLDERS {
            all.extend(objects.list_dated(&Path::from(folder)).await?);
        }
        let mut alive = HashSet::new();
        let mut removed_rows = HashSet::new();
        let mut manifests = BTreeSet::new();
        for index in store.indexes().await? {
            let path = tag_path(&index.name.parse()?, &index.tag, index.number);
            if index.variants.is_empty() {
                removed_rows.insert(path);
                continue;
            }
            alive.insert(path);
            manifests.extend(index.variants.iter().map(|variant| variant.manifest));
        }
        // A working set lives as long as its manifest.
        let rows: HashSet<String> =
            manifests.iter().map(|digest| working_set_folder(digest).to_string()).collect();
        let in_row = |path: &Path| path.as_ref().rsplit_once('/').is_some_and(|(row, _)| rows.contains(row));
        alive.extend(all.iter().map(|object| &object.path).filter(|path| in_row(path)).cloned());
        let needs: Vec<Vec<(Path, u64)>> = stream::iter(manifests)
            .map(|digest| async move {
                // A tag that leads to nothing is damage: what it needs is not known.
                store.needs(&digest).await.map_err(|error| match error {
                    Error::NotFound { object, .. } => objects.damaged(object, Damage::Missing),
                    other => other,
                })
            })
            .buffer_unordered(REQUESTS)
            .try_collect()
            .await?;
        alive.extend(needs.into_iter().flatten().map(|(path, _)| path));
        Ok(Self { now_ms, tombstones, sessions, collections, objects: all, alive, removed_rows })
    }

    async fn act(
        &self,
        objects: &Objects,
        options: Collect,
        announcement: Option<&Announcement>,
    ) -> Result<Collected> {
        let mut done = Collected { sessions: self.sessions.begun_ms.len() as u64, ..Collected::default() };
        let oldest_session = self.sessions.begun_ms.values().min().copied();
        let mut due = Vec::new();
        let mut fresh = Vec::new();
        for object in &self.objects {
            let marked = self.tombstones.get(&object.path).copied();
            if self.alive.contains(&object.path) {
                done.alive.add(object.bytes);
                // The next wait begins when nothing leads to it any more.
                fresh.extend(marked.map(|_| object.path.clone()));
                continue;
            }
            let held = self.removed_rows.contains(&object.path) && oldest_session.is_some();
            match marked {
                Some(marked_ms) if !held && self.may_go(marked_ms, oldest_session, options.grace) => {
                    done.removed.add(object.bytes);
                    due.push(&object.path);
                }
                Some(_) => done.waiting.add(object.bytes),
                // What is younger than a session may be its own, on the way to a tag.
                None if oldest_session.is_none_or(|begun| object.modified_ms < begun - grain_ms()) => {
                    done.marked.add(object.bytes);
                    fresh.push(object.path.clone());
                }
                None => {}
            }
        }
        let Some(announcement) = announcement else { return Ok(done) };
        for path in due {
            // A run that was stopped for long knows too little of what happened meanwhile.
            announcement.confirm().await?;
            objects.delete(path).await?;
            objects.delete(&tombstone(path)).await?;
        }
        announcement.confirm().await?;
        stream::iter(fresh)
            .map(|path| {
                let objects = objects.clone();
                async move { objects.put(&tombstone(&path), Bytes::from_static(b"{}\n").into()).await }
            })
            .buffer_unordered(REQUESTS)
            .try_collect::<()>()
            .await?;
        self.sweep(objects).await?;
        Ok(done)
    }

    fn may_go(&self, marked_ms: i64, oldest_session: Option<i64>, grace: Duration) -> bool {
        let waited = self.now_ms - marked_ms >= i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
        waited && oldest_session.is_none_or(|begun| begun > marked_ms + grain_ms())
    }

    /// Removes what dead sessions left behind, and tombstones whose object is gone.
    async fn sweep(&self, objects: &Objects) -> Result<()> {
        let there: HashSet<&Path> = self.objects.iter().map(|object| &object.path).collect();
        let mut gone: Vec<Path> =
            self.tombstones.keys().filter(|path| !there.contains(path)).map(tombstone).collect();
        gone.extend(self.sessions.stale.iter().cloned());
        gone.extend(self.collections.stale.iter().cloned());
        for (folder, age) in [("claims", CLAIM_AGE_MAX), ("probes", LEASE)] {
            let old = |object: &Dated| self.now_ms - object.modified_ms > 2 * age.as_millis() as i64;
            let listed = objects.list_dated(&Path::from(folder)).await?;
            gone.extend(listed.into_iter().filter(old).map(|object| object.path));
        }
        for path in gone {
            objects.delete(&path).await?;
        }
        if self.sessions.begun_ms.is_empty() {
            objects.remove_half_written("packs", LEASE)?;
        }
        Ok(())
    }
}

/// How far two times of a store may be wrong against each other.
fn grain_ms() -> i64 {
    CLOCK_GRAIN.as_millis() as i64
}

fn here_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
