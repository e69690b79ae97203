//! `make demo`, `make soak` and `setup/bench-torch`, with the program under test.

use std::time::Duration;

use rewarm_integration_tests::{Need, needs};
use serde_json::Value;

use crate::world;

/// As long as a test of a thing that is made to run for hours may take.
const SOAK_MINUTES: &str = "0.2";
/// By this seed the first turn is one server, of which the first snapshot and the first restore are killed early.
const SOAK_SEED: &str = "33762";
/// A server that starts, serves three times and is compared each time, beside other tests.
const DEMO_MAX: Duration = Duration::from_secs(240);
/// The last turn is brought to its end.
const SOAK_MAX: Duration = Duration::from_secs(240);
/// Four starts, two restores and one round without Rewarm, of a small server.
const TORCH_MAX: Duration = Duration::from_secs(120);
/// What the bench with a GPU has to tell, in its order.
const TORCH_FIGURES: [&str; 19] = [
    "cold start to first answer",
    "pause",
    "pause, within the driver",
    "wake",
    "wake, within the driver",
    "wake to first answer",
    "snapshot to a store in memory",
    "snapshot, by stage",
    "restore to first answer, the first of this machine",
    "restore to first answer, decoded in memory",
    "restore, within the driver",
    "restore, by stage, decoded in memory",
    "answers equal",
    "weights equal after a restore",
    "floor: copying from pinned memory",
    "floor: the driver's copying as it is today",
    "cuda-checkpoint and CRIU: dump to memory",
    "cuda-checkpoint and CRIU: restore to first answer",
    "cuda-checkpoint and CRIU: weights equal",
];

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
    let has = |name: &str, words: &[&str]| {
        words.iter().for_each(|word| assert!(row(name).contains(word), "{word:?} of {name:?} in\n{output}"));
    };
    has("snapshot", &["s3://demo/embedding@", "took ", "frozen ", " MiB held", " MiB stored"]);
    for restore in ["restore 1", "restore 2", "restore 3"] {
        has(restore, &["ready ", "first answer ", " times ", "answers equal: 12 of 12"]);
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
    let call = world.setup("soak").args(["--minutes", SOAK_MINUTES, "--seed", SOAK_SEED, "--record"]);
    let call = call.arg(&record);
    let output = call.timeout(SOAK_MAX).ok();
    let text =
        std::fs::read_to_string(&record).unwrap_or_else(|error| panic!("no record ({error}) by\n{output}"));
    let result: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(result["failure"], Value::Null, "{output}");
    for what in ["snapshot", "restore", "snapshot killed", "restore killed"] {
        assert!(result["counts"][what].as_u64().is_some_and(|count| count > 0), "no {what} in {text}");
    }
    world.finish();
}

/// Nobody here has a GPU: the script that measures one is carried out against the simulated driver, and must not hide that.
#[test]
fn the_bench_of_a_gpu_tells_every_figure_and_that_it_is_simulated() {
    let Some(world) = world(needs::REPLICA) else { return };
    // As the script expects built things: in one folder.
    let built = world.files().join("built");
    std::fs::create_dir(&built).expect("a folder");
    let program = std::env::current_exe().expect("this program");
    let library = "librewarm_gpu_sim.so";
    std::fs::copy(program.with_file_name(library), built.join(library)).expect("the simulated driver");
    std::fs::copy(env!("CARGO_BIN_EXE_gpu-workload"), built.join("gpu-workload")).expect("the workload");
    let criu = needs::criu().expect("a CRIU is needed");
    let call = world.setup("bench-torch").args(["--simulated", "--mib", "32", "--rounds", "1"]);
    let output = call.arg("--criu").arg(criu).env("TARGET", &built).timeout(TORCH_MAX).ok();
    let lines: Vec<Value> = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let figures: Vec<&str> = lines.iter().filter_map(|line| line["figure"].as_str()).collect();
    assert_eq!(figures, TORCH_FIGURES, "{output}");
    for line in &lines {
        assert_eq!(
            (&line["simulated"], &line["machine"], &line["driver"]),
            (&Value::Bool(true), &"simulated".into(), &"simulated".into()),
            "{line}"
        );
        let figure = line["figure"].as_str().unwrap_or_default();
        if let Some(stages) = line["stages_ms"].as_object() {
            assert!(figure.contains("by stage"), "{line}");
            let expected =
                if figure.starts_with("snapshot") { ["dump", "publish"] } else { ["skeleton", "ready"] };
            let took = |stage| stages.get(stage).and_then(Value::as_f64) > Some(0.0);
            assert!(expected.into_iter().all(took), "{line}");
        } else if figure.contains("equal") {
            assert!(line["seen"] == line["of"] && line["of"].as_u64() > Some(0), "{line}");
        } else if figure.contains("floor") {
            let (took, rate) = (line["would_take"].as_f64(), line["gigabytes_a_second"].as_f64());
            let moved = took.zip(rate).map(|(took, rate)| took * rate * 1e9);
            // To the last digit that is printed.
            assert!(moved.is_some_and(|bytes| (bytes - f64::from(34 << 20)).abs() < 4e6), "{line}");
        } else {
            assert!(line["seconds"].as_f64() > Some(0.0) && line["date"].is_string(), "{line}");
        }
    }
    world.finish();
}
