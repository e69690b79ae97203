//! Announcements: who writes to a store, or collects what it no longer needs, right now.
//!
//! ```text
//! sessions/UUID          written once: its time, by the store's own clock, is when the session began
//! sessions/UUID.alive    written over and over while the session lives
//! collections/UUID ...   the same for gc
//! ```
//!
//! Only times of the store are compared with each other, so that the clocks of machines do not matter. An announcement
//! that nobody renewed for [`LEASE`] belongs to somebody who died; who was only stopped for so long finds it out before
//! they publish, by [`Announcement::confirm`].

use std::collections::BTreeMap;

use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::limits::{LEASE, RENEW_EVERY};
use crate::objects::{Dated, Objects};

/// What somebody announces to be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Writing a snapshot.
    Session,
    /// Collecting garbage.
    Collection,
}

impl Doing {
    fn folder(self) -> &'static str {
        match self {
            Doing::Session => "sessions",
            Doing::Collection => "collections",
        }
    }

    fn path(self, id: Uuid) -> Path {
        Path::from(format!("{}/{id}", self.folder()))
    }
}

/// An announcement, renewed until it ends or is dropped.
#[derive(Debug)]
pub(crate) struct Announcement {
    objects: Objects,
    path: Path,
    id: Uuid,
    stop: Option<oneshot::Sender<()>>,
    renewing: Option<JoinHandle<()>>,
}

impl Announcement {
    /// Announces; returns when everybody can see it.
    pub(crate) async fn make(objects: &Objects, doing: Doing) -> Result<Self> {
        let id = Uuid::now_v7();
        let path = doing.path(id);
        objects.put(&path, Bytes::from_static(b"{}\n").into()).await?;
        let (stop, stopped) = oneshot::channel();
        let renewing = tokio::spawn(renew(objects.clone(), path.clone(), stopped));
        Ok(Self { objects: objects.clone(), path, id, stop: Some(stop), renewing: Some(renewing) })
    }

    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Fails if the announcement is gone: gc has taken its owner for dead, and what they hold may be gone too.
    pub(crate) async fn confirm(&self) -> Result<()> {
        match self.objects.size(&self.path).await? {
            Some(_) => Ok(()),
            None => Err(Error::Lapsed {
                store: self.objects.name().to_owned(),
                announcement: self.path.to_string(),
            }),
        }
    }

    /// Takes it back and waits until that is done.
    pub(crate) async fn end(mut self) {
        drop(self.stop.take());
        if let Some(renewing) = self.renewing.take() {
            // Whether it panicked or not: an announcement that stays is ignored after a while.
            let _ = renewing.await;
        }
    }
}

/// Renews until the other end is dropped, then removes.
async fn renew(objects: Objects, path: Path, mut stopped: oneshot::Receiver<()>) {
    let alive = Path::from(format!("{path}.alive"));
    let mut renewed = false;
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            () = tokio::time::sleep(RENEW_EVERY) => {}
        }
        match objects.put(&alive, Bytes::from_static(b"{}\n").into()).await {
            Ok(()) => renewed = true,
            Err(error) => tracing::warn!(%path, %error, "the announcement was not renewed"),
        }
    }
    for path in [Some(&path), renewed.then_some(&alive)].into_iter().flatten() {
        if let Err(error) = objects.delete(path).await {
            tracing::debug!(%path, %error, "the announcement stays until gc removes it");
        }
    }
}

/// Who is at work, as a look at the store shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AtWork {
    /// When each living one began, by the store's clock.
    pub(crate) begun_ms: BTreeMap<Uuid, i64>,
    /// What dead ones left behind.
    pub(crate) stale: Vec<Path>,
}

impl AtWork {
    /// Who is doing this at `now_ms`, a time of the store.
    pub(crate) async fn look(objects: &Objects, doing: Doing, now_ms: i64) -> Result<Self> {
        Ok(Self::of(objects.list_dated(&Path::from(doing.folder())).await?, now_ms))
    }

    fn of(listed: Vec<Dated>, now_ms: i64) -> Self {
        let lease_ms = LEASE.as_millis() as i64;
        let mut alive = BTreeMap::<Uuid, i64>::new();
        let mut begun = BTreeMap::new();
        for object in &listed {
            let name = object.path.filename().unwrap_or_default();
            let (id, renewal) = match name.strip_suffix(".alive") {
                Some(id) => (id, true),
                None => (name, false),
            };
            let Ok(id) = Uuid::parse_str(id) else { continue };
            let last = alive.entry(id).or_insert(object.modified_ms);
            *last = object.modified_ms.max(*last);
            if !renewal {
                begun.insert(id, object.modified_ms);
            }
        }
        let dead = |id: &Uuid| now_ms - alive[id] > lease_ms;
        let stale = listed
            .iter()
            .filter(|object| {
                let name = object.path.filename().unwrap_or_default();
                Uuid::parse_str(name.trim_end_matches(".alive")).is_ok_and(|id| dead(&id))
            })
            .map(|object| object.path.clone())
            .collect();
        begun.retain(|id, _| !dead(id));
        Self { begun_ms: begun, stale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use object_store::memory::InMemory;

    fn dated(path: &str, modified_ms: i64) -> Dated {
        Dated { path: Path::from(path), bytes: 3, modified_ms }
    }

    #[test]
    fn who_did_not_renew_for_a_lease_is_dead() {
        let [old, renewed, fresh] = [1, 2, 3].map(Uuid::from_u128);
        let lease = LEASE.as_millis() as i64;
        let now = 10 * lease;
        let listed = vec![
            dated(&format!("sessions/{old}"), 1),
            dated(&format!("sessions/{old}.alive"), now - lease - 1),
            dated(&format!("sessions/{renewed}"), 2),
            dated(&format!("sessions/{renewed}.alive"), now - lease),
            dated(&format!("sessions/{fresh}"), now - 3),
            dated("sessions/else", 4),
        ];
        let found = AtWork::of(listed, now);
        assert_eq!(found.begun_ms, BTreeMap::from([(renewed, 2), (fresh, now - 3)]));
        let paths: Vec<String> = found.stale.iter().map(Path::to_string).collect();
        assert_eq!(paths, [format!("sessions/{old}"), format!("sessions/{old}.alive")]);
    }

    #[tokio::test]
    async fn an_announcement_is_seen_until_it_ends() {
        let objects = Objects::new(Arc::new(InMemory::new()), "memory".into());
        let announcement = Announcement::make(&objects, Doing::Session).await.unwrap();
        let look = || async { AtWork::look(&objects, Doing::Session, objects.now_ms().await?).await };
        assert!(look().await.unwrap().begun_ms.contains_key(&announcement.id()));
        announcement.confirm().await.unwrap();
        let path = announcement.path.clone();
        announcement.end().await;
        assert_eq!(look().await.unwrap(), AtWork::default());
        let second = Announcement::make(&objects, Doing::Session).await.unwrap();
        objects.delete(&second.path).await.unwrap();
        assert!(matches!(second.confirm().await, Err(Error::Lapsed { .. })), "{path}");
    }
}
