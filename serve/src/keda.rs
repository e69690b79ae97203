//! The KEDA external scaler: what the policies want, for a cluster that carries it out.
//!
//! KEDA opens [`StreamIsActive`](ExternalScaler::stream_is_active) for a trigger of type `external-push` and acts on
//! `true` at once (from zero to one); at each poll and each query of the horizontal pod autoscaler it asks `GetMetrics`,
//! then `IsActive`. docs/keda.md says what a trigger may contain.
//!
//! Two metrics: `desired_replicas` with a target of one is the policy's own number, and the autoscaler's division by one
//! changes nothing about it. `in_flight` is the demand itself, requests in flight and held, for who wants the
//! autoscaler's own arithmetic.

mod trigger;

use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use futures::stream;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status as Refusal};

use self::proto::external_scaler_server::{ExternalScaler, ExternalScalerServer};
use self::proto::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, ScaledObjectRef,
};
use self::trigger::Trigger;
use crate::status::{Handle, Notice};

/// The messages, their server and their client, made from `proto/externalscaler.proto`.
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("externalscaler");
}

/// How often a stream looks at what no notice tells: that a pool became idle, and that its limits changed.
const LOOK: Duration = Duration::from_secs(1);
/// A KEDA that is gone without a word is found out after two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Streams that KEDA may open over one connection: a few for each of its triggers.
const STREAMS_MAX: u32 = 1000;

/// Answers at this address until `stop` is done; with certificate and key in PEM over TLS.
///
/// # Errors
/// The certificate is not usable, or the socket fails.
pub async fn serve(
    listener: TcpListener,
    tls: Option<&(String, String)>,
    handle: Handle,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (ending, ended) = watch::channel(false);
    // Streams never end by themselves; without this the server would wait for them.
    let stop = async move {
        stop.await;
        ending.send_replace(true);
    };
    let mut server =
        Server::builder().http2_keepalive_interval(Some(KEEP_ALIVE)).max_concurrent_streams(STREAMS_MAX);
    if let Some((certificate, key)) = tls {
        server = server.tls_config(ServerTlsConfig::new().identity(Identity::from_pem(certificate, key)))?;
    }
    server
        .add_service(ExternalScalerServer::new(Scaler { handle, ended }))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop)
        .await
}

struct Scaler {
    handle: Handle,
    ended: watch::Receiver<bool>,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Refusal>> + Send>>;
type Answer<T> = Result<Response<T>, Refusal>;

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    async fn is_active(&self, request: Request<ScaledObjectRef>) -> Answer<IsActiveResponse> {
        let trigger = Trigger::of(&request.into_inner(), &self.handle)?;
        Ok(Response::new(IsActiveResponse { result: trigger.is_active(&self.handle.status())? }))
    }

    type StreamIsActiveStream = Streamed<IsActiveResponse>;

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Answer<Self::StreamIsActiveStream> {
        let follower = self.follower(&request.into_inner())?;
        let stream = stream::try_unfold((follower, None), |(mut follower, told)| async move {
            let result = match told {
                None => follower.is_active()?,
                Some(told) => match follower.next_activity(told).await? {
                    Some(active) => active,
                    None => return Ok(None),
                },
            };
            Ok(Some((IsActiveResponse { result }, (follower, Some(result)))))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_metric_spec(&self, request: Request<ScaledObjectRef>) -> Answer<GetMetricSpecResponse> {
        let trigger = Trigger::of(&request.into_inner(), &self.handle)?;
        Ok(Response::new(trigger.spec(&self.handle.status())?))
    }

    async fn get_metrics(&self, request: Request<GetMetricsRequest>) -> Answer<GetMetricsResponse> {
        let request = request.into_inner();
        let trigger = Trigger::of(&request.scaled_object_ref.unwrap_or_default(), &self.handle)?;
        Ok(Response::new(trigger.values(&self.handle.status(), &request.metric_name)?))
    }

    type StreamMetricSpecStream = Streamed<GetMetricSpecResponse>;

    async fn stream_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Answer<Self::StreamMetricSpecStream> {
        let follower = self.follower(&request.into_inner())?;
        let stream = stream::try_unfold((follower, None), |(mut follower, told)| async move {
            let spec = match told {
                None => follower.spec()?,
                Some(told) => match follower.next_spec(told).await? {
                    Some(spec) => spec,
                    None => return Ok(None),
                },
            };
            Ok(Some((spec.clone(), (follower, Some(spec)))))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

impl Scaler {
    fn follower(&self, asked: &ScaledObjectRef) -> Result<Follower, Refusal> {
        // Before the first look, so that nothing happens between the two unseen.
        let notices = self.handle.notices();
        let trigger = Trigger::of(asked, &self.handle)?;
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.reset();
        Ok(Follower { handle: self.handle.clone(), trigger, notices, look, ended: self.ended.clone() })
    }
}

/// What one open stream knows.
struct Follower {
    handle: Handle,
    trigger: Trigger,
    notices: broadcast::Receiver<Notice>,
    look: Interval,
    ended: watch::Receiver<bool>,
}

impl Follower {
    fn is_active(&self) -> Result<bool, Refusal> {
        self.trigger.is_active(&self.handle.status())
    }

    fn spec(&self) -> Result<GetMetricSpecResponse, Refusal> {
        self.trigger.spec(&self.handle.status())
    }

    /// What to tell next; nothing when the server ends. `true` is told at once when a request is held and again with
    /// each look, since KEDA forgets it where it could not act; `false` once.
    async fn next_activity(&mut self, told: bool) -> Result<Option<bool>, Refusal> {
        let mut ended = self.ended.clone();
        loop {
            tokio::select! {
                biased;
                _ = ended.wait_for(|ended| *ended) => return Ok(None),
                notice = self.notices.recv() => match notice {
                    Ok(Notice::FirstHeld { pool }) if pool == self.trigger.pool() => return Ok(Some(true)),
                    Ok(_) => {}
                    // Among what was lost there may have been a held request.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        if self.is_active()? { return Ok(Some(true)) }
                    }
                    Err(broadcast::error::RecvError::Closed) => return Ok(None),
                },
                _ = self.look.tick() => {
                    let active = self.is_active()?;
                    if active || told { return Ok(Some(active)) }
                }
            }
        }
    }

    /// The metrics once they differ from what was told; nothing when the server ends.
    async fn next_spec(
        &mut self,
        told: GetMetricSpecResponse,
    ) -> Result<Option<GetMetricSpecResponse>, Refusal> {
        let mut ended = self.ended.clone();
        loop {
            tokio::select! {
                _ = ended.wait_for(|ended| *ended) => return Ok(None),
                _ = self.look.tick() => {
                    let spec = self.spec()?;
                    if spec != told { return Ok(Some(spec)) }
                }
            }
        }
    }
}
