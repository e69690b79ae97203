//! The pool as others see it.

use std::sync::atomic::Ordering;

use rewarm_autoscaler::moment::Moment;
use rewarm_gateway::desk::Traffic;

use super::circuit::Open;
use super::inner::Inner;
use crate::status::{
    CircuitStatus, LimitsStatus, PoolStatus, ReplicaStatus, StartSecondsStatus, Totals, UnixMs, now,
};

impl Inner {
    pub(super) fn oldest_held_ms(&self) -> Option<f64> {
        self.queue.arrivals().front().map(|came| self.now.seconds_since(*came) * 1e3)
    }

    pub(super) fn start_seconds(&self) -> StartSecondsStatus {
        let expected = self.expected();
        StartSecondsStatus { wake: expected.wake, restore: expected.restore }
    }

    fn circuit(&self) -> Option<CircuitStatus> {
        let Open { failures, until, reason } =
            self.tiers.open(self.now).or_else(|| self.tiers.degraded(self.now))?;
        Some(CircuitStatus { failures, until: self.at(until), reason })
    }

    /// A moment of this process as a time of day.
    fn at(&self, moment: Moment) -> UnixMs {
        let ahead = moment.since(self.now).as_millis();
        now().saturating_add(u64::try_from(ahead).unwrap_or(u64::MAX))
    }

    pub(super) fn picture(&self, traffic: &Traffic) -> PoolStatus {
        let config = &self.config;
        let millis = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let mut replicas: Vec<ReplicaStatus> = self
            .pool
            .replicas()
            .filter_map(|replica| {
                let member = self.members.get(&replica.id())?;
                Some(ReplicaStatus {
                    name: member.name.clone(),
                    state: replica.state(),
                    in_flight: replica.in_flight(),
                    requests: replica.assigned(),
                    since: member.since,
                    tier: replica.tier(),
                    source: member.source.clone(),
                    host_bytes: replica.memory().host,
                })
            })
            .collect();
        replicas.sort_by(|a, b| a.name.cmp(&b.name));
        PoolStatus {
            name: config.name.clone(),
            snapshot: config.snapshot.clone(),
            digest: self.known.as_ref().map(|known| known.source.clone()),
            listen: config.listen.to_string(),
            limits: LimitsStatus {
                concurrency: config.concurrency,
                target_concurrency: config.target_concurrency,
                min_replicas: config.min_replicas,
                max_replicas: config.max_replicas,
                warm: config.warm,
                queue_max: config.queue.max as u64,
                queue_deadline_ms: millis(config.queue.deadline),
                target_wait_ms: millis(config.target_wait),
            },
            policy: config.policy.spec.name.clone(),
            paused: self.paused,
            fixed: self.fixed,
            in_flight: self.pool.in_flight(),
            held: self.queue.len() as u32,
            oldest_held_ms: self.oldest_held_ms(),
            desired: self.desired,
            start_seconds: self.start_seconds(),
            circuit: self.circuit(),
            obstacle: self.obstacle.as_ref().map(ToString::to_string),
            replicas,
            decisions: self.decisions.iter().cloned().collect(),
            starts: self.starts.iter().cloned().collect(),
            totals: Totals {
                responses: traffic.by_status(),
                retried: traffic.retried.load(Ordering::Relaxed),
                request_bytes: traffic.requests.load(Ordering::Relaxed),
                response_bytes: traffic.responses.load(Ordering::Relaxed),
                ..self.totals.clone()
            },
        }
    }
}
