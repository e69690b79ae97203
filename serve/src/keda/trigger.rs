//! What a trigger of a ScaledObject asks for, and the answers for its pool.

use tonic::Status as Refusal;

use super::proto::{GetMetricSpecResponse, GetMetricsResponse, MetricSpec, MetricValue, ScaledObjectRef};
use crate::status::{Handle, PoolStatus, Status};

/// A metric that a trigger may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metric {
    /// What the policy wants.
    DesiredReplicas,
    /// Requests in flight and held.
    InFlight,
}

impl Metric {
    const ALL: [Metric; 2] = [Metric::DesiredReplicas, Metric::InFlight];

    fn name(self) -> &'static str {
        match self {
            Metric::DesiredReplicas => "desired_replicas",
            Metric::InFlight => "in_flight",
        }
    }

    fn named(name: &str) -> Result<Self, Refusal> {
        Self::ALL.into_iter().find(|metric| metric.name() == name).ok_or_else(|| {
            Refusal::invalid_argument(format!("metric {name:?}: expected desired_replicas or in_flight"))
        })
    }

    fn value(self, pool: &PoolStatus) -> u32 {
        match self {
            Metric::DesiredReplicas => pool.desired,
            Metric::InFlight => pool.in_flight + pool.held,
        }
    }
}

/// A trigger's metadata: `pool`, `metric` and `target`. What else stands there is KEDA's.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Trigger {
    pool: String,
    metric: Metric,
    target: Option<f64>,
}

impl Trigger {
    /// Reads it. The pool may be left out where there is only one.
    pub(super) fn of(asked: &ScaledObjectRef, handle: &Handle) -> Result<Self, Refusal> {
        let said =
            |key: &str| asked.scaler_metadata.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let status = handle.status();
        let pool = match said("pool") {
            Some(name) => find(&status, name)?.name.clone(),
            None => match status.pools.as_slice() {
                [only] => only.name.clone(),
                pools => {
                    let problem = format!(
                        "metadata pool: missing, and there are {} pools: {}",
                        pools.len(),
                        names(&status)
                    );
                    return Err(Refusal::invalid_argument(problem));
                }
            },
        };
        let metric = said("metric").map_or(Ok(Metric::DesiredReplicas), Metric::named)?;
        let target = said("target").map(target).transpose()?;
        if target.is_some() && metric == Metric::DesiredReplicas {
            return Err(Refusal::invalid_argument(
                "metadata target: only with metric in_flight; desired_replicas is divided by 1",
            ));
        }
        Ok(Self { pool, metric, target })
    }

    pub(super) fn pool(&self) -> &str {
        &self.pool
    }

    /// Whether there should be a replica.
    pub(super) fn is_active(&self, status: &Status) -> Result<bool, Refusal> {
        let pool = find(status, &self.pool)?;
        Ok(pool.in_flight + pool.held + pool.desired > 0)
    }

    /// The metric of this trigger and its target.
    pub(super) fn spec(&self, status: &Status) -> Result<GetMetricSpecResponse, Refusal> {
        let pool = find(status, &self.pool)?;
        let target = match self.metric {
            Metric::DesiredReplicas => 1.0,
            Metric::InFlight => self.target.unwrap_or_else(|| f64::from(pool.limits.target_concurrency)),
        };
        let spec = MetricSpec {
            metric_name: self.metric.name().to_owned(),
            target_size: target.ceil() as i64,
            target_size_float: target,
        };
        Ok(GetMetricSpecResponse { metric_specs: vec![spec] })
    }

    /// The value of a metric now; without a name, of this trigger's.
    pub(super) fn values(&self, status: &Status, name: &str) -> Result<GetMetricsResponse, Refusal> {
        let pool = find(status, &self.pool)?;
        let metric = if name.is_empty() { self.metric } else { Metric::named(name)? };
        let value = metric.value(pool);
        let value = MetricValue {
            metric_name: metric.name().to_owned(),
            metric_value: i64::from(value),
            metric_value_float: f64::from(value),
        };
        Ok(GetMetricsResponse { metric_values: vec![value] })
    }
}

fn target(text: &str) -> Result<f64, Refusal> {
    text.parse().ok().filter(|target: &f64| target.is_finite() && *target > 0.0).ok_or_else(|| {
        Refusal::invalid_argument(format!("metadata target: {text:?}: expected a number above 0"))
    })
}

fn find<'a>(status: &'a Status, name: &str) -> Result<&'a PoolStatus, Refusal> {
    status.pools.iter().find(|pool| pool.name == name).ok_or_else(|| {
        Refusal::not_found(format!("no pool is called {name:?}; there are: {}", names(status)))
    })
}

fn names(status: &Status) -> String {
    status.pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>().join(", ")
}
