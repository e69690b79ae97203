//! The event stream: what happens, as it happens.
//!
//! ```text
//! event: status    data: a Status without decisions and starts; at once, then each second, and soon after a notice
//! event: notice    data: a Notice
//! event: missed    data: {"notices": 12}: this reader was too slow; what it knows of decisions and starts has a gap
//! ```

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures::{Stream, stream};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::api::Detail;
use crate::status::Notice;

/// The status comes at least this often.
const EVERY: Duration = Duration::from_secs(1);
/// After a notice it comes as soon as this, so that a hundred notices in a row cost one.
const SOON: Duration = Duration::from_millis(100);

/// What happens, as `text/event-stream`: `status`, `notice` and `missed`.
#[utoipa::path(
    get, path = "/admin/events", tag = "status",
    responses((status = 200, content_type = "text/event-stream", body = String,
        description = "`status`: a Status without decisions and starts, at once, each second, and soon after a notice. `notice`: a Notice. `missed`: the reader was too slow for so many notices."))
)]
pub(super) async fn events(
    State(shared): State<Shared>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let notices = shared.handle.notices();
    let reader = Reader { shared, notices, due: Instant::now() };
    let events = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

struct Reader {
    shared: Shared,
    notices: broadcast::Receiver<Notice>,
    /// When the status is sent next.
    due: Instant,
}

impl Reader {
    /// Nothing when the program ends.
    async fn next(&mut self) -> Option<Event> {
        let mut ended = self.shared.ended.clone();
        tokio::select! {
            biased;
            _ = ended.wait_for(|ended| *ended) => None,
            () = sleep_until(self.due) => {
                self.due = Instant::now() + EVERY;
                let brief = Detail { decisions: Some(0), starts: Some(0) };
                Some(event("status", &brief.of(self.shared.handle.status())))
            }
            notice = self.notices.recv() => match notice {
                Ok(notice) => {
                    self.due = self.due.min(Instant::now() + SOON);
                    Some(event("notice", &notice))
                }
                Err(RecvError::Lagged(notices)) => Some(event("missed", &serde_json::json!({ "notices": notices }))),
                Err(RecvError::Closed) => None,
            },
        }
    }
}

fn event(name: &str, data: &impl Serialize) -> Event {
    Event::default().event(name).json_data(data).expect("a status is JSON, and has no line break in it")
}
