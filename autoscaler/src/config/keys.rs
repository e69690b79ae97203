//! Which keys there are, and where their values go.

use toml::Value;

use super::values::{
    aggregation, bool_value, count, duration, number, optional_count, percent_above_100, positive, share,
    start_samples, whole,
};
use super::{Config, FixedSettings, bad, set};
use crate::error::Result;
use crate::policy::{hpa, kpa, rewarm, tracker};
use crate::queue::QueueLimits;
use crate::simulate::StartSamples;
use crate::trace::ServiceTime;

/// Something whose fields are set by name.
pub(super) trait Keys {
    /// The names.
    fn names(&self) -> &'static [&'static str];

    /// Sets one of them.
    fn set(&mut self, key: &str, value: &Value, place: &str) -> Result<()>;
}

/// The name that is most like `key`.
pub(super) fn nearest<'a>(key: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    let likeness = |known: &str| strsim::jaro_winkler(key, known);
    names.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("each list of names has entries")
}

/// Names, and for each where its value goes and how it is read.
macro_rules! keys {
    ($type:ty: $($name:literal => |$target:ident, $value:ident| $set:expr, $expected:expr;)*) => {
        impl Keys for $type {
            fn names(&self) -> &'static [&'static str] {
                &[$($name),*]
            }

            fn set(&mut self, key: &str, value: &Value, place: &str) -> Result<()> {
                let (done, expected): (Option<()>, &'static str) = match key {
                    $($name => {
                        let ($target, $value) = (self, value);
                        ((|| { $set; Some(()) })(), $expected)
                    })*
                    _ => unreachable!("only known names are set"),
                };
                done.ok_or_else(|| bad(key, place, value, expected))
            }
        }
    };
}

const TIME: &str = "a time with its unit, such as \"500ms\" or \"5s\"";
const SHARE: &str = "a share above 0 and at most 1";
const NUMBER: &str = "a number from 0 up";
const POSITIVE: &str = "a number above 0";
const BOOL: &str = "true or false";
const COUNT: &str = "a whole number from 0 to 10000";
const COUNT_FROM_1: &str = "a whole number from 1 to 10000";
const PERCENT: &str = "a number from 100 up";

keys! { rewarm::Settings:
    "rescue" => |to, v| to.rescue = bool_value(v)?, BOOL;
    "patience" => |to, v| to.patience = number(v).filter(|share| *share <= 1.0)?, "a share from 0 to 1";
    "margin" => |to, v| to.margin = duration(v)?, TIME;
    "caution" => |to, v| to.caution = number(v)?, NUMBER;
    "foresight" => |to, v| to.foresight = number(v)?, NUMBER;
    "floor" => |to, v| to.floor = bool_value(v)?, BOOL;
    "floor_z" => |to, v| to.floor_z = number(v)?, NUMBER;
    "burst" => |to, v| to.burst = bool_value(v)?, BOOL;
    "burst_window" => |to, v| to.burst_window = duration(v).filter(|time| time.as_secs() <= 86_400)?, "a time of at most a day";
    "burst_quantile" => |to, v| to.burst_quantile = number(v).filter(|share| *share <= 1.0)?, "a share from 0 to 1";
    "keep" => |to, v| to.keep = number(v)?, NUMBER;
    "keep_last" => |to, v| to.keep_last = number(v)?, NUMBER;
    "ahead" => |to, v| to.ahead = bool_value(v)?, BOOL;
    "ahead_z" => |to, v| to.ahead_z = number(v)?, NUMBER;
    "spill_slack" => |to, v| to.spill_slack = number(v).filter(|share| *share <= 1.0)?, "a share from 0 to 1";
    "spill" => |to, v| to.spill = number(v).filter(|share| *share <= 1.0)?, "a share from 0 to 1";
}

keys! { kpa::Settings:
    "utilization" => |to, v| to.utilization = share(v)?, SHARE;
    "stable_window" => |to, v| to.stable_window = duration(v).filter(|time| (6..=3600).contains(&time.as_secs()))?,
        "a time from 6s to 1h";
    "panic_window_percentage" => |to, v| to.panic_window_percentage = number(v).filter(|p| (1.0..=100.0).contains(p))?,
        "a number from 1 to 100";
    "panic_threshold_percentage" => |to, v| to.panic_threshold_percentage = percent_above_100(v)?, PERCENT;
    "max_scale_up_rate" => |to, v| to.max_scale_up_rate = number(v).filter(|rate| *rate > 1.0)?, "a number above 1";
    "max_scale_down_rate" => |to, v| to.max_scale_down_rate = number(v).filter(|rate| *rate > 1.0)?, "a number above 1";
    "scale_down_delay" => |to, v| to.scale_down_delay = duration(v)?, TIME;
    "activation_scale" => |to, v| to.activation_scale = count(v)?, COUNT;
    "target_burst_capacity" => |to, v| to.target_burst_capacity = whole(v).filter(|tbc| *tbc >= -1).map(|tbc| tbc as f64)?,
        "a whole number from -1 up";
    "grace" => |to, v| to.grace = duration(v)?, TIME;
    "aggregation" => |to, v| to.aggregation = aggregation(v)?, "linear or weighted-exponential";
}

keys! { hpa::Settings:
    "utilization" => |to, v| to.utilization = share(v)?, SHARE;
    "sync" => |to, v| to.sync = duration(v).filter(|time| time.as_millis() > 0)?, "a time of at least 1ms";
    "tolerance" => |to, v| to.tolerance = number(v)?, NUMBER;
    "down_stabilization" => |to, v| to.down_stabilization = duration(v)?, TIME;
    "cooldown" => |to, v| to.cooldown = duration(v)?, TIME;
}

keys! { tracker::Settings:
    "utilization" => |to, v| to.utilization = share(v)?, SHARE;
    "look_back" => |to, v| to.look_back = duration(v)?, TIME;
    "down_delay" => |to, v| to.down_delay = duration(v)?, TIME;
    "undrain" => |to, v| to.undrain = bool_value(v)?, BOOL;
}

keys! { FixedSettings:
    "replicas" => |to, v| to.replicas = optional_count(v)?, COUNT;
}

keys! { ServiceTime:
    "base" => |to, v| to.base_s = duration(v)?.as_secs_f64(), TIME;
    "input_per_s" => |to, v| to.input_per_s = positive(v)?, POSITIVE;
    "output" => |to, v| to.output_s = duration(v)?.as_secs_f64(), TIME;
}

keys! { QueueLimits:
    "max" => |to, v| to.max = whole(v).and_then(|max| usize::try_from(max).ok())?, "a whole number from 0 up";
    "deadline" => |to, v| to.deadline = duration(v)?, TIME;
}

impl Keys for Config {
    fn names(&self) -> &'static [&'static str] {
        &[
            "restore",
            "wake",
            "cold",
            "warm",
            "concurrency",
            "min",
            "max",
            "target_wait",
            "seed",
            "clairvoyant",
            "replica_memory_gib",
            "queue",
            "service",
            "policy",
        ]
    }

    fn set(&mut self, key: &str, value: &Value, place: &str) -> Result<()> {
        const STARTS: &str = "a time such as \"5s\", or a file of measured times";
        let scenario = &mut self.scenario;
        let whole = |expected, from: u32| {
            count(value).filter(|count| *count >= from).ok_or_else(|| bad(key, place, value, expected))
        };
        match key {
            "restore" if value.as_str() == Some("none") => scenario.restore = None,
            "restore" => scenario.restore = Some(start_samples(key, value, place, STARTS)?),
            "wake" => scenario.wake = start_samples(key, value, place, STARTS)?,
            "cold" => scenario.cold = start_samples(key, value, place, STARTS)?,
            "warm" => scenario.warm = whole(COUNT, 0)?,
            "concurrency" => scenario.limits.concurrency = whole(COUNT_FROM_1, 1)?,
            "min" => scenario.limits.min = whole(COUNT, 0)?,
            "max" => scenario.limits.max = whole(COUNT_FROM_1, 1)?,
            "target_wait" => {
                scenario.limits.target_wait = duration(value).ok_or_else(|| bad(key, place, value, TIME))?;
            }
            "seed" => {
                scenario.seed = value
                    .as_integer()
                    .and_then(|seed| u64::try_from(seed).ok())
                    .ok_or_else(|| bad(key, place, value, "a whole number from 0 up"))?;
            }
            "clairvoyant" => {
                scenario.clairvoyant = bool_value(value).ok_or_else(|| bad(key, place, value, BOOL))?;
            }
            "replica_memory_gib" => {
                let gib = number(value).ok_or_else(|| bad(key, place, value, NUMBER))?;
                scenario.replica_memory = (gib * f64::from(1_u32 << 30)) as u64;
            }
            "queue" => inner(&mut scenario.queue, key, value, place)?,
            "service" => inner(&mut self.service, key, value, place)?,
            _ => unreachable!("only known names are set, and policies are taken out before"),
        }
        Ok(())
    }
}

/// A table inside the file.
fn inner(target: &mut dyn Keys, key: &str, value: &Value, place: &str) -> Result<()> {
    let Value::Table(table) = value else { return Err(bad(key, place, value, "a table")) };
    for (name, value) in table {
        set(target, name, value, &format!("{place}, {key}"))?;
    }
    Ok(())
}

impl std::str::FromStr for StartSamples {
    type Err = crate::Error;

    /// A time, or the path of a file with measured times.
    fn from_str(text: &str) -> Result<Self> {
        super::values::start_samples_of(text)
    }
}
