//! Spans of what a pool does for requests: holding them, and the starts that they wait for.
//!
//! A start is written down when it is over, since only then is known who waited for it: the first held request that gets a slot of
//! its replica. Its span lies below that request's `held`; further requests that waited for it as well are linked to it. One that
//! nobody waited for is a trace of its own.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Span as _, SpanContext, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::pool::{ReplicaId, Tier};
use rewarm_report::Timing;

use super::inner::Inner;
use crate::status::{StartOutcome, StartStatus};

/// A start that has ended.
#[derive(Debug)]
pub(super) struct Start {
    ended: SystemTime,
    status: StartStatus,
}

/// What is known of a replica's start.
#[derive(Debug, Default)]
pub(super) struct StartSpan {
    /// Ready, and in no trace yet.
    waits: Option<Start>,
    /// Its span, and when its replica began to serve.
    told: Option<(SpanContext, Moment)>,
}

/// A context below which spans are children of this one.
fn below(parent: Option<&SpanContext>) -> Context {
    let context = Context::new();
    match parent {
        Some(parent) => context.with_remote_span_context(parent.clone()),
        None => context,
    }
}

impl Start {
    /// Writes its span, and those of its stages.
    fn tell(self, tracer: &SdkTracer, pool: &str, parent: Option<&SpanContext>) -> SpanContext {
        let Self { ended, status } = self;
        let millis = |count: f64| Duration::from_secs_f64(count.max(0.0) / 1e3);
        let began = ended.checked_sub(millis(status.took_ms)).unwrap_or(ended);
        let attributes = vec![
            KeyValue::new("rewarm.pool", pool.to_owned()),
            KeyValue::new("rewarm.replica", status.replica),
            KeyValue::new("rewarm.outcome", status.outcome.name()),
        ];
        let name = match status.tier {
            Tier::Wake => "wake",
            Tier::Restore => "restore",
            Tier::Cold => "cold",
        };
        let builder = tracer.span_builder(name).with_start_time(began).with_attributes(attributes);
        let mut span = tracer.build_with_context(builder, &below(parent));
        if matches!(status.outcome, StartOutcome::Failed | StartOutcome::TimedOut) {
            span.set_status(Status::error(status.reason.unwrap_or_default()));
        }
        let context = span.span_context().clone();
        for Timing { stage, start_ms, took_ms } in status.stages {
            let from = began + millis(start_ms);
            let builder = tracer.span_builder(stage.name()).with_start_time(from);
            let mut span = tracer.build_with_context(builder, &below(Some(&context)));
            span.end_with_timestamp(from + millis(took_ms));
        }
        span.end_with_timestamp(ended);
        context
    }
}

impl Inner {
    /// A request is held from now on.
    pub(super) fn held_span(&self, request: Option<&SpanContext>) -> Option<Box<Span>> {
        let tracer = self.shared.tracer.as_ref()?;
        let pool = KeyValue::new("rewarm.pool", self.config.name.clone());
        let builder = tracer.span_builder("held").with_attributes(vec![pool]);
        Some(Box::new(tracer.build_with_context(builder, &below(Some(request?)))))
    }

    /// A held request that came then got a slot of this replica.
    pub(super) fn waited_for(&mut self, id: ReplicaId, came: Moment, held: Option<Box<Span>>) {
        let (Some(mut held), Some(tracer)) = (held, &self.shared.tracer) else { return };
        let Some(start) = self.members.get_mut(&id).map(|member| &mut member.start_span) else { return };
        if let Some(waits) = start.waits.take() {
            let context = waits.tell(tracer, &self.config.name, Some(held.span_context()));
            start.told = Some((context, self.now));
        } else if let Some((context, ready)) = &start.told
            && came < *ready
        {
            held.add_link(context.clone(), Vec::new());
        }
        held.end();
    }

    /// A start has ended.
    pub(super) fn trace_start(&mut self, id: ReplicaId, status: &StartStatus) {
        let Some(tracer) = &self.shared.tracer else { return };
        let start = Start { ended: SystemTime::now(), status: status.clone() };
        if status.outcome == StartOutcome::Ready {
            if let Some(member) = self.members.get_mut(&id) {
                member.start_span = StartSpan { waits: Some(start), told: None };
            }
        } else {
            // Whoever has waited longest waits on, for the next one.
            let waiting = self.queue.get(0).and_then(|(_, waiter)| waiter.span.as_ref());
            start.tell(tracer, &self.config.name, waiting.map(|span| span.span_context()));
        }
    }

    /// Nobody waited for this replica's start, or nobody does any more.
    pub(super) fn unawaited(&mut self, id: ReplicaId) {
        let Some(tracer) = &self.shared.tracer else { return };
        let Some(start) = self.members.get_mut(&id).map(|member| &mut member.start_span) else { return };
        if let Some(waits) = start.waits.take() {
            start.told = Some((waits.tell(tracer, &self.config.name, None), self.now));
        }
    }
}
