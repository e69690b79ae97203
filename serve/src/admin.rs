//! The admin API, the metrics and the status page, at one address.
//!
//! ```text
//! /              the status page, embedded in the program         no token: it holds nothing
//! /admin/...     REST, and the event stream; described at /admin/openapi.json
//! /metrics       of this program, for Prometheus
//! /metrics/replicas   what the servers in the replicas say of themselves
//! ```
//!
//! It runs in the process without rights; socket and token come from the parent. It bounds connections, heads and bodies.
//! `access` says who is answered.

mod access;
mod api;
pub(crate) mod document;
mod events;
mod history;
mod page;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

pub use self::access::Access;
pub(crate) use self::access::read_token;
use self::history::History;
use crate::metrics::{self, Metrics};
use crate::status::Handle;

/// Connections at once; a further one waits. A browser opens six, Prometheus one.
const CONNECTIONS_MAX: usize = 128;
/// How long a client may take for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// No request has a larger body.
const BODY_BYTES_MAX: usize = 64 << 10;
/// How long answers that have begun may take when the program ends.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// What every handler knows.
#[derive(Debug, Clone)]
struct Shared {
    handle: Handle,
    history: Arc<History>,
    metrics: Metrics,
    /// True once the program ends; event streams end then.
    ended: watch::Receiver<bool>,
}

/// Answers at this address until `stop` is done.
pub async fn serve(listener: TcpListener, access: Access, handle: Handle, stop: impl Future<Output = ()>) {
    let (ending, ended) = watch::channel(false);
    let history = Arc::new(History::default());
    let metrics = Metrics::new(handle.clone());
    let shared = Shared { handle: handle.clone(), history: history.clone(), metrics: metrics.clone(), ended };
    let router = router(shared, access);
    let answering = accept(listener, router, stop, ending);
    let watching = futures::future::join(history.follow(&handle), metrics.follow());
    tokio::select! {
        () = answering => {}
        _ = watching => {}
    }
}

fn router(shared: Shared, access: Access) -> Router {
    let (api, document) = document::router().split_for_parts();
    let document = Arc::new(document);
    api.route("/admin/openapi.json", get(move || async move { axum::Json((*document).clone()) }))
        .route("/metrics", get(metrics::of_this_program))
        .route("/metrics/replicas", get(metrics::of_replicas))
        .with_state(shared)
        .layer(axum::middleware::from_fn_with_state(access, access::check))
        .merge(page::router())
        .fallback(api::unknown_path)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

impl axum::extract::FromRef<Shared> for Metrics {
    fn from_ref(shared: &Shared) -> Self {
        shared.metrics.clone()
    }
}

impl axum::extract::FromRef<Shared> for Handle {
    fn from_ref(shared: &Shared) -> Self {
        shared.handle.clone()
    }
}

async fn accept(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()>,
    ending: watch::Sender<bool>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let slot = slots.clone().acquire_owned().await.expect("nobody closes it");
        let client = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => client,
                // Out of descriptors, or the client has left already: neither is a reason to end.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let connection = graceful.watch(connection(client, &router));
        tokio::spawn(async move {
            // A connection that breaks has nobody left to be told.
            let _ = connection.await;
            drop(slot);
        });
    }
    drop(listener);
    ending.send_replace(true);
    let _ = tokio::time::timeout(END_TIMEOUT, graceful.shutdown()).await;
}

fn connection(
    client: TcpStream,
    router: &Router,
) -> http1::Connection<TokioIo<TcpStream>, TowerToHyperService<Router>> {
    let _ = client.set_nodelay(true);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(client), TowerToHyperService::new(router.clone()))
}
