//! The routes of the API together with their description, so that neither can be without the other; and how the types
//! of crates that know nothing of OpenAPI are described.

use rewarm_autoscaler::pool::{State, Tier};
use rewarm_report::Stage;
use serde::Serialize;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{Array, RefOr};
use utoipa::{OpenApi, PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Shared, api, events};
use crate::status::{Notice, StartOutcome};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Rewarm admin API",
        description = "Pools of replicas that follow their load: what they do, why, and what a person may ask of them. \
                       With `admin_token` in the configuration every call needs `Authorization: Bearer TOKEN`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "status", description = "Everything at one moment, and as it happens"),
        (name = "pools", description = "One pool"),
        (name = "commands", description = "What a person may ask for"),
    ),
    components(schemas(Notice)),
    modifiers(&Token),
    security((), ("token" = []))
)]
struct Document;

/// The token as a security scheme.
struct Token;

impl utoipa::Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

pub(super) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(api::status))
        .routes(routes!(api::history))
        .routes(routes!(api::decisions))
        .routes(routes!(events::events))
        .routes(routes!(api::pools))
        .routes(routes!(api::pool))
        .routes(routes!(api::replicas))
        .routes(routes!(api::starts))
        .routes(routes!(api::scale))
        .routes(routes!(api::pause))
        .routes(routes!(api::resume))
        .routes(routes!(api::drain))
}

/// How long a stage of a restore took.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only described: the type itself is `rewarm_report::Timing`")]
pub(crate) struct StageTiming {
    /// Which one.
    #[schema(schema_with = stage)]
    stage: Stage,
    /// Milliseconds from the beginning of the start.
    start_ms: f64,
    /// Milliseconds that it took.
    took_ms: f64,
}

/// One of the words that these values are in JSON.
fn one_of<T: Serialize>(values: impl IntoIterator<Item = T>) -> Schema {
    let words: Vec<serde_json::Value> =
        values.into_iter().map(|value| serde_json::to_value(value).expect("a unit variant")).collect();
    ObjectBuilder::new().schema_type(SchemaType::new(Type::String)).enum_values(Some(words)).into()
}

pub(crate) fn state() -> Schema {
    one_of(State::ALL)
}

pub(crate) fn tier() -> Schema {
    one_of([Tier::Wake, Tier::Restore, Tier::Cold])
}

fn stage() -> Schema {
    one_of(Stage::ALL)
}

/// Lists of three: tier, outcome, how many.
pub(crate) fn start_sums() -> Array {
    let parts: Vec<RefOr<Schema>> = vec![tier().into(), StartOutcome::schema(), u64::schema()];
    let parts = parts.into_iter().map(|part| match part {
        RefOr::T(schema) => schema,
        RefOr::Ref(_) => unreachable!("a schema of its own"),
    });
    let sum = ArrayBuilder::new().items(utoipa::openapi::schema::ArrayItems::False).prefix_items(parts);
    ArrayBuilder::new().items(sum).build()
}
