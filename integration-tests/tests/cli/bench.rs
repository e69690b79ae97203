//! `rewarm bench`: every pair of case and place is measured, and nothing of it is left.

use std::collections::BTreeSet;

use rewarm_integration_tests::needs::Need;
use rewarm_integration_tests::residue;
use serde_json::Value;

use crate::world;

const PAIRS: [(&str, &str); 9] = [
    ("running", "none"),
    ("cold", "none"),
    ("criu-eager", "file-warm"),
    ("criu-lazy", "file-warm"),
    ("rewarm-eager", "file-warm"),
    ("rewarm-lazy", "file-warm"),
    ("rewarm-lazy-recorded", "file-warm"),
    ("rewarm-eager", "cache"),
    ("rewarm-lazy-recorded", "cache"),
];

#[test]
fn a_benchmark_measures_every_pair_and_leaves_nothing() {
    let Some(world) = world(&[Need::Root, Need::Criu, Need::Runc]) else { return };
    let work = world.root().join("tmp");
    let plot = world.root().join("files/bench.svg");
    let flags = ["bench", "--size", "16MiB", "--rounds", "2", "--json", "--work"];
    let command = world.rewarm().args(flags).arg(&work).arg("--plot").arg(&plot);
    let report = command.timeout(std::time::Duration::from_secs(300)).ok().json();
    let results = report["results"].as_array().expect("results");
    let pair = |row: &Value| (row["case"].clone(), row["store"].clone());
    let seen: Vec<_> = results.iter().map(pair).collect();
    let expected: Vec<_> =
        PAIRS.iter().map(|(case, store)| (Value::from(*case), Value::from(*store))).collect();
    assert_eq!(seen, expected);
    for row in results {
        assert_eq!(row["rounds"], 2, "{row}");
        let first = &row["first_answer_ms"];
        let [least, median, most] =
            ["min", "median", "max"].map(|key| first[key].as_f64().expect("a number"));
        assert!(0.0 < least && least <= median && median <= most, "{row}");
        let restored = row["store"] != "none";
        assert_eq!(row["present_ms"].is_object(), restored, "{row}");
    }
    let picture = std::fs::read_to_string(plot).expect("the picture");
    assert!(picture.contains("rewarm-lazy-recorded (cache)"), "{picture}");
    let left: Vec<_> = std::fs::read_dir(&work).expect("the work folder").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    let processes = residue::processes(world.id());
    assert_eq!(processes.iter().collect::<BTreeSet<_>>().len(), 0, "{processes:?}");
    world.finish();
}

#[test]
fn a_server_file_with_a_mistake_is_malformed() {
    let Some(world) = world(&[Need::Root, Need::Criu, Need::Runc]) else { return };
    let file = world.root().join("files/server.toml");
    std::fs::write(&file, "command = [\"true\"]\nprot = 8000\n").expect("our own folder");
    let output = world.rewarm().args(["bench", "--server"]).arg(&file).fails(2);
    output.says(&["server.toml", "unknown key \"prot\"", "\"port\""]);
    world.finish();
}
