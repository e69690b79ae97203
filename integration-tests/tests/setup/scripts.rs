//! `make demo` and `make soak`, with the program under test.

use std::time::Duration;

use rewarm_integration_tests::{Need, needs};
use serde_json::Value;

use crate::world;

/// As long as a test of a thing that is made to run for hours may take.
const SOAK_MINUTES: &str = "0.2";
/// A server that starts, serves three times and is compared each time, beside other tests.
const DEMO_MAX: Duration = Duration::from_secs(240);
/// The last turn is brought to its end.
const SOAK_MAX: Duration = Duration::from_secs(240);

#[test]
fn the_demo_compares_twelve_answers_three_times_and_leaves_nothing() {
    let needs = [needs::REPLICA, &[Need::Torch, Need::Garage]].concat();
    let Some(world) = world(&needs) else { return };
    let world = world.heavy();
    let output = world.setup("demo").timeout(DEMO_MAX).ok();
    let table: Vec<&str> = output.stdout.lines().filter(|line| !line.starts_with("demo: ")).collect();
    let row = |name: &str| {
        let found = table.iter().find(|line| line.starts_with(name));
        *found.unwrap_or_else(|| panic!("no row {name:?} in\n{output}"))
    };
    assert!(row("cold start").contains("first answer"), "{output}");
    assert!(row("snapshot").contains("s3://demo/embedding@"), "{output}");
    for restore in ["restore 1", "restore 2", "restore 3"] {
        assert!(row(restore).contains("answers equal: 12 of 12"), "{output}");
    }
    assert!(row("stages of the last restore").contains("replay"), "{output}");
    world.finish();
}

/// `make soak` runs this for hours; what it does is the same.
#[test]
fn some_seconds_of_kills_at_random_moments() {
    let needs = [needs::REPLICA, &[Need::Node, Need::Nginx]].concat();
    let Some(world) = world(&needs) else { return };
    let world = world.heavy();
    let record = world.files().join("soak.json");
    let call = world.setup("soak").args(["--minutes", SOAK_MINUTES, "--record"]).arg(&record);
    let output = call.timeout(SOAK_MAX).ok();
    let text =
        std::fs::read_to_string(&record).unwrap_or_else(|error| panic!("no record ({error}) by\n{output}"));
    let result: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(result["failure"], Value::Null, "{output}");
    for what in ["snapshot", "restore"] {
        assert!(result["counts"][what].as_u64().is_some_and(|count| count > 0), "no {what} in {text}");
    }
    world.finish();
}
