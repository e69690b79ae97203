//! Spans of held requests and of the starts that they wait for.

use std::sync::Mutex;

use opentelemetry::trace::{
    SpanContext, SpanId, Status, TraceFlags, TraceId, TraceState, TracerProvider as _,
};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rewarm_report::Stage;

use super::*;

/// Spans that are over.
#[derive(Debug, Clone, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().expect("no panic").extend(batch);
        Ok(())
    }
}

impl Kept {
    fn tracer(&self) -> SdkTracer {
        SdkTracerProvider::builder().with_simple_exporter(self.clone()).build().tracer("test")
    }

    fn spans(&self) -> Vec<SpanData> {
        self.0.lock().expect("no panic").clone()
    }

    fn named(&self, name: &str) -> Vec<SpanData> {
        self.spans().into_iter().filter(|span| span.name == name).collect()
    }
}

/// A request of a trace of its own.
fn want(number: u8) -> Want {
    let (trace, span) = (TraceId::from(u128::from(number)), SpanId::from(u64::from(number)));
    let trace = SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::default());
    Want { trace: Some(trace), ..Want::default() }
}

fn stages() -> Vec<Timing> {
    [(Stage::Admit, 0.0, 0.01), (Stage::Fetch, 0.01, 0.02)]
        .map(|(stage, start_ms, took_ms)| Timing { stage, start_ms, took_ms })
        .into()
}

#[tokio::test]
async fn a_start_lies_below_the_first_request_that_waited_for_it_and_others_are_linked() {
    let kept = Kept::default();
    let world = World::new("", Some(kept.tracer()));
    let mut asked = Vec::new();
    for number in 1..=3 {
        asked.push(world.ask(want(number)));
        world.await_held(u32::from(number)).await;
    }
    let (name, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore);
    world.serves(&name, stages());
    let mut slots = Vec::new();
    for asked in asked {
        slots.push(asked.await.expect("no panic").expect("a slot"));
    }
    let (held, restores) = (kept.named("held"), kept.named("restore"));
    let [restore] = &restores[..] else { panic!("{restores:?}, expected one restore") };
    let traces: Vec<u128> =
        held.iter().map(|span| u128::from_be_bytes(span.span_context.trace_id().to_bytes())).collect();
    assert_eq!(traces, [1, 2, 3]);
    assert!(held.iter().zip(1_u64..).all(|(span, number)| span.parent_span_id == SpanId::from(number)));
    assert_eq!(restore.span_context.trace_id(), held[0].span_context.trace_id());
    assert_eq!(restore.parent_span_id, held[0].span_context.span_id());
    let links: Vec<Vec<SpanId>> =
        held.iter().map(|span| span.links.iter().map(|link| link.span_context.span_id()).collect()).collect();
    let own = restore.span_context.span_id();
    assert_eq!(links, [vec![], vec![own], vec![own]]);
    for (stage, name) in [(Stage::Admit, "admit"), (Stage::Fetch, "fetch")] {
        let spans = kept.named(name);
        assert_eq!(spans.len(), 1, "{stage}");
        assert_eq!(spans[0].parent_span_id, own, "{stage}");
        assert!(spans[0].start_time >= restore.start_time, "{stage}");
    }
    // One that finds a slot at once has waited for nothing.
    let again = world.ask(want(4)).await.expect("no panic").expect("a slot");
    assert_eq!((again.held, kept.named("held").len()), (None, 3));
}

#[tokio::test]
async fn a_start_that_fails_and_the_one_in_its_place_lie_below_the_same_request() {
    let kept = Kept::default();
    let world = World::new("", Some(kept.tracer()));
    let asked = world.ask(want(1));
    let (name, _) = world.start().await;
    world.live.heard(&name, Heard::Failed("no such chunk".to_owned()));
    assert!(matches!(world.told().await, ToParent::GiveUp { .. }));
    let (name, tier) = world.start().await;
    assert_eq!(tier, Tier::Cold);
    world.serves(&name, Vec::new());
    let _slot = asked.await.expect("no panic").expect("a slot");
    let held = kept.named("held");
    let parents = ["restore", "cold"].map(|name| kept.named(name).remove(0).parent_span_id);
    assert_eq!(parents, [held[0].span_context.span_id(); 2]);
    assert_eq!(kept.named("restore")[0].status, Status::error("no such chunk"));
}

#[tokio::test]
async fn a_start_that_nobody_waited_for_is_a_trace_of_its_own() {
    let kept = Kept::default();
    let world = World::new("min_replicas = 1\n", Some(kept.tracer()));
    world.live.with(Inner::pass);
    let (name, _) = world.start().await;
    world.serves(&name, stages());
    let restores = kept.named("restore");
    assert_eq!(restores.len(), 1);
    assert_eq!(restores[0].parent_span_id, SpanId::INVALID);
    assert_eq!(kept.named("fetch")[0].span_context.trace_id(), restores[0].span_context.trace_id());
}

#[tokio::test]
async fn a_request_that_is_refused_or_given_up_is_over_too() {
    let kept = Kept::default();
    let world = World::new("queue = { deadline = '10ms' }\n", Some(kept.tracer()));
    let late = world.ask(want(1));
    world.await_held(1).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    world.live.with(Inner::pass);
    assert!(matches!(late.await.expect("no panic"), Err(Refusal::Late { .. })));
    let left = world.ask(want(2));
    world.await_held(1).await;
    left.abort();
    world.await_held(0).await;
    let held = kept.named("held");
    assert_eq!(held.len(), 2);
    assert!(matches!(held[0].status, Status::Error { .. }), "{:?}", held[0].status);
}
