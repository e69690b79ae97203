//! Metrics for Prometheus, in its text format. docs/admin.md has the table of all of them.
//!
//! Nearly everything is read off a [`Status`] when Prometheus asks. What a status does not sum up (how long starts and
//! their stages took) is counted here from the notices.

mod replicas;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use rewarm_autoscaler::pool::{State as ReplicaState, Tier};
use rewarm_report::Stage;
use tokio::sync::broadcast::error::RecvError;

use crate::status::{Handle, Histogram, Notice, PoolStatus, StartOutcome, StartStatus, Status};

pub(crate) use replicas::of_replicas;

/// What is counted from notices, and the handle for the rest. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    handle: Handle,
    counted: Arc<Mutex<Counted>>,
}

#[derive(Debug, Default)]
struct Counted {
    starts: BTreeMap<(String, Tier), Histogram>,
    stages: BTreeMap<(String, Stage), Histogram>,
    missed: u64,
}

impl Metrics {
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle, counted: Arc::default() }
    }

    /// Counts until nobody sends notices any more.
    pub(crate) async fn follow(&self) {
        let mut notices = self.handle.notices();
        loop {
            match notices.recv().await {
                Ok(Notice::Start { pool, start }) => self.count(&pool, &start),
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => self.lock().missed += missed,
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// A start that failed took as long as its timeout, which says nothing about starts.
    fn count(&self, pool: &str, start: &StartStatus) {
        if start.outcome != StartOutcome::Ready {
            return;
        }
        let mut counted = self.lock();
        counted.starts.entry((pool.to_owned(), start.tier)).or_default().record(start.took_ms / 1000.0);
        for timing in &start.stages {
            counted
                .stages
                .entry((pool.to_owned(), timing.stage))
                .or_default()
                .record(timing.took_ms / 1000.0);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it as text.
    fn text(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("rewarm");
        registry
            .register_collector(Box::new(Reading { status: self.handle.status(), metrics: self.clone() }));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// The handler of `/metrics`.
pub(crate) async fn of_this_program(State(metrics): State<Metrics>) -> Response {
    match metrics.text() {
        Ok(text) => ([(CONTENT_TYPE, prometheus_text::CONTENT_TYPE)], text).into_response(),
        Err(fmt::Error) => (StatusCode::INTERNAL_SERVER_ERROR, "a metric cannot be written").into_response(),
    }
}

/// One scrape.
#[derive(Debug)]
struct Reading {
    status: Status,
    metrics: Metrics,
}

/// A label and its value.
type Label<'a> = (&'static str, &'a str);

impl Collector for Reading {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Writer { encoder };
        let status = &self.status;
        to.gauge("build_info", "The program; always 1", |one| one(&[("version", &status.version)], 1.0))?;
        let since = status.since as f64 / 1000.0;
        to.gauge("start_time_seconds", "When the program began to serve, in seconds since 1970", |one| {
            one(&[], since)
        })?;
        self.memory(&mut to)?;
        self.requests(&mut to)?;
        self.replicas(&mut to)?;
        self.starts(&mut to)?;
        let missed = self.metrics.lock().missed;
        to.counter("notices_missed", "Events that came faster than the metrics could count them", |one| {
            one(&[], missed)
        })
    }
}

impl Reading {
    fn memory(&self, to: &mut Writer<'_>) -> fmt::Result {
        let memory = &self.status.memory;
        to.gauge("memory_host_bytes", "Host memory that is counted for replicas", |one| {
            one(&[], memory.host_used as f64)
        })?;
        if let Some(limit) = memory.host_limit {
            to.gauge("memory_host_limit_bytes", "Host memory that replicas may take together", |one| {
                one(&[], limit as f64)
            })?;
        }
        if let Some(limit) = memory.cache_limit {
            to.gauge("memory_cache_limit_bytes", "Host memory that decoded snapshots may take", |one| {
                one(&[], limit as f64)
            })?;
        }
        to.gauge("memory_device_bytes", "Device memory that is counted for replicas", |one| {
            one(&[], memory.device_used as f64)
        })
    }

    fn requests(&self, to: &mut Writer<'_>) -> fmt::Result {
        let pools = &self.status.pools;
        to.pool_gauge(pools, "requests_in_flight", "Requests in flight in replicas", |pool| {
            f64::from(pool.in_flight)
        })?;
        to.pool_gauge(pools, "requests_held", "Requests that wait for a slot", |pool| f64::from(pool.held))?;
        to.pool_gauge(pools, "oldest_held_seconds", "How long the oldest held request has waited", |pool| {
            pool.oldest_held_ms.unwrap_or(0.0) / 1000.0
        })?;
        to.pool_counter(pools, "requests", "Requests that came", |pool| pool.totals.requests)?;
        to.pool_counter(pools, "requests_delayed", "Requests that were held at first", |pool| {
            pool.totals.held
        })?;
        to.counter("responses", "Requests that were answered, by status", |one| {
            pools.iter().try_for_each(|pool| {
                let responses = &pool.totals.responses;
                responses.iter().try_for_each(|(code, count)| {
                    one(&[("pool", &pool.name), ("code", &code.to_string())], *count)
                })
            })
        })?;
        to.counter(
            "requests_refused",
            "Requests that got no slot: the queue was full (429) or their deadline passed (503)",
            |one| {
                pools.iter().try_for_each(|pool| {
                    one(&[("pool", &pool.name), ("reason", "full")], pool.totals.refused_full)?;
                    one(&[("pool", &pool.name), ("reason", "deadline")], pool.totals.refused_late)
                })
            },
        )?;
        to.pool_counter(
            pools,
            "requests_abandoned",
            "Requests whose client left while they were held",
            |pool| pool.totals.left,
        )?;
        to.pool_counter(pools, "requests_retried", "Requests that were tried a second time", |pool| {
            pool.totals.retried
        })?;
        to.pool_counter(pools, "requests_cut_off", "Requests whose replica died", |pool| {
            pool.totals.cut_off
        })?;
        to.pool_counter(
            pools,
            "requests_killed",
            "Requests that were cut off because a drain took longer than the pool allows",
            |pool| pool.totals.killed_in_flight,
        )?;
        to.pool_counter(pools, "request_bytes", "Bytes of requests' bodies", |pool| {
            pool.totals.request_bytes
        })?;
        to.pool_counter(pools, "response_bytes", "Bytes of responses' bodies", |pool| {
            pool.totals.response_bytes
        })?;
        to.histogram("request_wait_seconds", "How long requests waited for a slot", |one| {
            pools.iter().try_for_each(|pool| one(&[("pool", &pool.name)], &pool.totals.wait_seconds))
        })?;
        to.histogram("request_service_seconds", "From the slot to the last byte of the answer", |one| {
            pools.iter().try_for_each(|pool| one(&[("pool", &pool.name)], &pool.totals.service_seconds))
        })
    }

    fn replicas(&self, to: &mut Writer<'_>) -> fmt::Result {
        let pools = &self.status.pools;
        to.gauge("replicas", "Replicas by what they are doing", |one| {
            let states = || ReplicaState::ALL.into_iter().filter(|state| *state != ReplicaState::Cold);
            pools.iter().try_for_each(|pool| {
                states().try_for_each(|state| {
                    let count = pool.replicas.iter().filter(|replica| replica.state == state).count();
                    one(&[("pool", &pool.name), ("state", &word(&state))], count as f64)
                })
            })
        })?;
        to.pool_gauge(pools, "replicas_desired", "Replicas that the last decision wanted", |pool| {
            f64::from(pool.desired)
        })?;
        to.pool_gauge(pools, "replicas_min", "Fewest replicas", |pool| f64::from(pool.limits.min_replicas))?;
        to.pool_gauge(pools, "replicas_max", "Most replicas", |pool| f64::from(pool.limits.max_replicas))?;
        to.pool_gauge(
            pools,
            "replica_slots",
            "Requests that one replica answers at once, at most",
            |pool| f64::from(pool.limits.concurrency),
        )?;
        to.pool_gauge(pools, "pool_paused", "1 while the pool is paused by hand", |pool| {
            f64::from(u8::from(pool.paused))
        })?;
        to.pool_gauge(pools, "pool_fixed", "1 while the number of replicas is set by hand", |pool| {
            f64::from(u8::from(pool.fixed.is_some()))
        })?;
        to.pool_counter(pools, "decisions", "Decisions that changed the number of replicas", |pool| {
            pool.totals.decisions
        })?;
        to.pool_counter(pools, "replicas_died", "Replicas that ended although nobody asked them to", |pool| {
            pool.totals.died
        })
    }

    fn starts(&self, to: &mut Writer<'_>) -> fmt::Result {
        let pools = &self.status.pools;
        to.counter("starts", "Starts that have ended, by where they came from and how they ended", |one| {
            pools.iter().try_for_each(|pool| {
                let starts = &pool.totals.starts;
                starts.iter().try_for_each(|(tier, outcome, count)| {
                    one(&[("pool", &pool.name), ("tier", &word(tier)), ("outcome", outcome.name())], *count)
                })
            })
        })?;
        to.gauge("start_expected_seconds", "What a start is expected to take", |one| {
            pools.iter().try_for_each(|pool| {
                one(&[("pool", &pool.name), ("tier", "wake")], pool.start_seconds.wake)?;
                one(&[("pool", &pool.name), ("tier", "restore")], pool.start_seconds.restore)
            })
        })?;
        to.pool_gauge(
            pools,
            "circuit_open",
            "1 while starts of one kind are left alone, after failures in a row",
            |pool| f64::from(u8::from(pool.circuit.is_some())),
        )?;
        let counted = self.metrics.lock();
        to.histogram("start_seconds", "How long starts took that succeeded", |one| {
            counted
                .starts
                .iter()
                .try_for_each(|((pool, tier), values)| one(&[("pool", pool), ("tier", &word(tier))], values))
        })?;
        to.histogram("start_stage_seconds", "How long the stages of restores took", |one| {
            counted.stages.iter().try_for_each(|((pool, stage), values)| {
                one(&[("pool", pool), ("stage", stage.name())], values)
            })
        })
    }
}

/// The word for it in JSON.
fn word(value: &impl serde::Serialize) -> String {
    let json = serde_json::to_value(value).expect("a unit variant");
    json.as_str().expect("a word").to_owned()
}

/// Writes families: a name, its help, and one value for each set of labels.
struct Writer<'a> {
    encoder: DescriptorEncoder<'a>,
}

type One<'a, V> = &'a mut dyn FnMut(&[Label<'_>], V) -> fmt::Result;
type OneHistogram<'a> = &'a mut dyn FnMut(&[Label<'_>], &Histogram) -> fmt::Result;

impl Writer<'_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        each: impl FnOnce(One<'_, f64>) -> fmt::Result,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        each(&mut |labels, value: f64| family.encode_family(&labels)?.encode_gauge(&value))
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        each: impl FnOnce(One<'_, u64>) -> fmt::Result,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        each(&mut |labels, value: u64| {
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)
        })
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        each: impl FnOnce(OneHistogram<'_>) -> fmt::Result,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        each(&mut |labels, values: &Histogram| {
            let bounds = values.bounds.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(values.counts.iter().copied()).collect();
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                values.sum,
                values.count(),
                &buckets,
                None,
            )
        })
    }

    fn pool_gauge(
        &mut self,
        pools: &[PoolStatus],
        name: &str,
        help: &str,
        value: impl Fn(&PoolStatus) -> f64,
    ) -> fmt::Result {
        self.gauge(name, help, |one| {
            pools.iter().try_for_each(|pool| one(&[("pool", &pool.name)], value(pool)))
        })
    }

    fn pool_counter(
        &mut self,
        pools: &[PoolStatus],
        name: &str,
        help: &str,
        value: impl Fn(&PoolStatus) -> u64,
    ) -> fmt::Result {
        self.counter(name, help, |one| {
            pools.iter().try_for_each(|pool| one(&[("pool", &pool.name)], value(pool)))
        })
    }
}
