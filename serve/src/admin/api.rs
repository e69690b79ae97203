//! The REST calls. Each is described where it stands; [`super::document`] collects them.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Shared;
use super::history::PoolHistory;
use crate::status::{
    Command, DecisionStatus, Handle, PoolStatus, Refused, ReplicaStatus, StartStatus, Status,
};

/// Why something was not done.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    /// In words, with the value seen and the one expected.
    pub(super) error: String,
}

/// What was done.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Done {
    /// In words.
    done: String,
}

/// A refusal with its status.
pub(super) struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { error: self.1 })).into_response()
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::UnknownPool { .. } | Refused::UnknownReplica { .. } => StatusCode::NOT_FOUND,
            Refused::Impossible { .. } => StatusCode::CONFLICT,
        };
        Self(status, refused.to_string())
    }
}

type Answer<T> = Result<Json<T>, Refusal>;

/// How many of the remembered decisions and starts are wanted; all where nothing is said.
#[derive(Debug, Default, Clone, Copy, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Detail {
    /// The last so many decisions of each pool.
    pub(super) decisions: Option<usize>,
    /// The last so many starts of each pool.
    pub(super) starts: Option<usize>,
}

impl Detail {
    pub(super) fn of(self, mut status: Status) -> Status {
        for pool in &mut status.pools {
            self.cut(pool);
        }
        status
    }

    fn cut(self, pool: &mut PoolStatus) {
        keep_last(&mut pool.decisions, self.decisions);
        keep_last(&mut pool.starts, self.starts);
    }
}

/// Both lists are oldest first.
fn keep_last<T>(list: &mut Vec<T>, most: Option<usize>) {
    if let Some(most) = most {
        list.drain(..list.len().saturating_sub(most));
    }
}

/// A query that is not understood is answered as everything else: with a problem in JSON.
fn query<T>(query: Result<Query<T>, axum::extract::rejection::QueryRejection>) -> Result<T, Refusal> {
    query.map(|Query(value)| value).map_err(|problem| Refusal(StatusCode::BAD_REQUEST, problem.body_text()))
}

type Asked<T> = Result<Query<T>, axum::extract::rejection::QueryRejection>;

/// Everything at one moment.
#[utoipa::path(get, path = "/admin/status", tag = "status", params(Detail),
    responses((status = 200, body = Status), (status = 400, body = Problem)))]
pub(super) async fn status(State(handle): State<Handle>, asked: Asked<Detail>) -> Answer<Status> {
    Ok(Json(query(asked)?.of(handle.status())))
}

/// The pools, without their decisions and starts.
#[utoipa::path(get, path = "/admin/pools", tag = "pools", responses((status = 200, body = Vec<PoolStatus>)))]
pub(super) async fn pools(State(handle): State<Handle>) -> Json<Vec<PoolStatus>> {
    Json(Detail { decisions: Some(0), starts: Some(0) }.of(handle.status()).pools)
}

/// One pool.
#[utoipa::path(get, path = "/admin/pools/{pool}", tag = "pools", params(("pool" = String, Path), Detail),
    responses((status = 200, body = PoolStatus), (status = 404, body = Problem)))]
pub(super) async fn pool(
    State(handle): State<Handle>,
    Path(pool): Path<String>,
    asked: Asked<Detail>,
) -> Answer<PoolStatus> {
    let detail = query(asked)?;
    let mut found = find(&handle, &pool)?;
    detail.cut(&mut found);
    Ok(Json(found))
}

/// The replicas of one pool.
#[utoipa::path(get, path = "/admin/pools/{pool}/replicas", tag = "pools", params(("pool" = String, Path)),
    responses((status = 200, body = Vec<ReplicaStatus>), (status = 404, body = Problem)))]
pub(super) async fn replicas(
    State(handle): State<Handle>,
    Path(pool): Path<String>,
) -> Answer<Vec<ReplicaStatus>> {
    Ok(Json(find(&handle, &pool)?.replicas))
}

/// The last starts of one pool, oldest first.
#[utoipa::path(get, path = "/admin/pools/{pool}/starts", tag = "pools", params(("pool" = String, Path)),
    responses((status = 200, body = Vec<StartStatus>), (status = 404, body = Problem)))]
pub(super) async fn starts(
    State(handle): State<Handle>,
    Path(pool): Path<String>,
) -> Answer<Vec<StartStatus>> {
    Ok(Json(find(&handle, &pool)?.starts))
}

/// Which decisions are wanted.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Chosen {
    /// Of this pool only.
    pool: Option<String>,
    /// The last so many, of all that are chosen together.
    limit: Option<usize>,
}

/// A decision and whose it is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PoolDecision {
    /// The pool.
    pool: String,
    /// The decision.
    #[serde(flatten)]
    decision: DecisionStatus,
}

/// The last decisions with their inputs, newest first: at most 1000 of each pool.
#[utoipa::path(get, path = "/admin/decisions", tag = "status", params(Chosen),
    responses((status = 200, body = Vec<PoolDecision>), (status = 400, body = Problem), (status = 404, body = Problem)))]
pub(super) async fn decisions(
    State(handle): State<Handle>,
    asked: Asked<Chosen>,
) -> Answer<Vec<PoolDecision>> {
    let chosen = query(asked)?;
    let pools = match &chosen.pool {
        Some(name) => vec![find(&handle, name)?],
        None => handle.status().pools,
    };
    let of = |pool: PoolStatus| {
        let name = pool.name;
        pool.decisions.into_iter().map(move |decision| PoolDecision { pool: name.clone(), decision })
    };
    let mut list: Vec<PoolDecision> = pools.into_iter().flat_map(of).collect();
    list.sort_by_key(|found| std::cmp::Reverse(found.decision.at));
    list.truncate(chosen.limit.unwrap_or(usize::MAX));
    Ok(Json(list))
}

/// Requests in flight and held over the last quarter of an hour, one sample a second.
#[utoipa::path(get, path = "/admin/history", tag = "status", responses((status = 200, body = Vec<PoolHistory>)))]
pub(super) async fn history(State(shared): State<Shared>) -> Json<Vec<PoolHistory>> {
    Json(shared.history.pools())
}

/// A number of replicas.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Scale {
    /// So many, whatever the policy wants; `null` lets the policy decide again.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required)]
    replicas: Option<u32>,
}

/// Sets the number of replicas by hand, or lets the policy decide again.
#[utoipa::path(post, path = "/admin/pools/{pool}/scale", tag = "commands", params(("pool" = String, Path)), request_body = Scale,
    responses((status = 200, body = Done), (status = 400, body = Problem), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn scale(
    State(handle): State<Handle>,
    Path(pool): Path<String>,
    body: Result<Json<Scale>, JsonRejection>,
) -> Answer<Done> {
    let Json(scale) = body.map_err(|problem| Refusal(problem.status(), problem.body_text()))?;
    command(&handle, Command::Scale { pool, replicas: scale.replicas }).await
}

/// Starts nothing, lets the pool's replicas finish and go, and refuses requests, until `resume`.
#[utoipa::path(post, path = "/admin/pools/{pool}/pause", tag = "commands", params(("pool" = String, Path)),
    responses((status = 200, body = Done), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn pause(State(handle): State<Handle>, Path(pool): Path<String>) -> Answer<Done> {
    command(&handle, Command::Pause { pool }).await
}

/// The end of a pause.
#[utoipa::path(post, path = "/admin/pools/{pool}/resume", tag = "commands", params(("pool" = String, Path)),
    responses((status = 200, body = Done), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn resume(State(handle): State<Handle>, Path(pool): Path<String>) -> Answer<Done> {
    command(&handle, Command::Resume { pool }).await
}

/// Gives one replica no further requests, lets it finish, and stops it.
#[utoipa::path(post, path = "/admin/pools/{pool}/replicas/{replica}/drain", tag = "commands",
    params(("pool" = String, Path), ("replica" = String, Path)),
    responses((status = 200, body = Done), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn drain(
    State(handle): State<Handle>,
    Path((pool, replica)): Path<(String, String)>,
) -> Answer<Done> {
    command(&handle, Command::Drain { pool, replica }).await
}

async fn command(handle: &Handle, command: Command) -> Answer<Done> {
    Ok(Json(Done { done: handle.command(command).await? }))
}

fn find(handle: &Handle, name: &str) -> Result<PoolStatus, Refusal> {
    let found = handle.status().pools.into_iter().find(|pool| pool.name == name);
    found.ok_or_else(|| Refused::UnknownPool { pool: name.to_owned() }.into())
}

/// What no route answers.
pub(super) async fn unknown_path(uri: axum::http::Uri) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, format!("{}: no such path; /admin/openapi.json describes all", uri.path()))
}
