//! `rewarm bench`: every pair of case and place is measured, and nothing of it is left.

use std::collections::BTreeSet;
use std::net::TcpListener;

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
    assert_figures(&report, 2);
    let picture = std::fs::read_to_string(plot).expect("the picture");
    assert!(picture.contains("rewarm-lazy-recorded (cache)"), "{picture}");
    let left: Vec<_> = std::fs::read_dir(&work).expect("the work folder").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    let processes = residue::processes(world.id());
    assert_eq!(processes.iter().collect::<BTreeSet<_>>().len(), 0, "{processes:?}");
    world.finish();
}

/// Every key of the JSON, where it has a meaning and nowhere else.
fn assert_figures(report: &Value, rounds: u64) {
    let machine = &report["machine"];
    assert!(machine["processor"].is_string() && machine["kernel"].is_string(), "{machine}");
    assert!(
        machine["cores"].as_u64() >= Some(1) && machine["memory_bytes"].as_u64() > Some(1 << 20),
        "{machine}"
    );
    let date = report["date"].as_str().expect("a date");
    assert!(date.len() == 10 && date.split('-').all(|part| part.parse::<u16>().is_ok()), "{date}");
    for row in report["results"].as_array().expect("results") {
        assert_eq!(row["rounds"], rounds, "{row}");
        let restored = row["store"] != "none";
        let started = row["case"] != "running";
        for (key, told) in
            [("first_answer_ms", true), ("resume_ms", started), ("present_ms", restored), ("cpu_ms", started)]
        {
            let figures = ["min", "median", "max"].map(|figure| row[key][figure].as_f64());
            match figures {
                [Some(least), Some(median), Some(most)] if told => {
                    assert!(0.0 < least && least <= median && median <= most, "{key}: {row}");
                }
                _ => assert!(!told && row[key].is_null(), "{key}: {row}"),
            }
        }
        if row["case"].as_str().is_some_and(|case| case.ends_with("-eager")) {
            let [present, answered] =
                ["present_ms", "first_answer_ms"].map(|key| row[key]["median"].as_f64().expect("checked"));
            assert!(present < answered, "all of it is there before the server is asked: {row}");
        }
        let read = row["bytes_read"].as_u64();
        match row["store"].as_str() {
            Some("none") => assert_eq!(read, None, "{row}"),
            Some("cache") => assert_eq!(read, Some(0), "{row}"),
            _ => assert!(read > Some(1 << 20), "{row}"),
        }
    }
}

/// A user's server, over a bucket: the pairs with it come on top, and from nowhere else is anything read over the network.
#[test]
fn a_server_file_and_a_bucket_are_measured_too() {
    let Some(world) = world(&[Need::Root, Need::Criu, Need::Runc, Need::Garage]) else { return };
    let world = world.on_garage();
    let files = world.files();
    let write = |name: &str, text: &str| std::fs::write(files.join(name), text).expect("our own folder");
    write("server.py", include_str!("../../src/plain.py"));
    write("probe.toml", "[[request]]\npath = \"/healthz\"\ncompare = \"body\"\n");
    let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr()).expect("a port").port();
    let folder = files.display();
    let text = format!(
        "command = [\"/usr/bin/python3\", \"{folder}/server.py\", \"{port}\"]\nport = {port}\nprobe = \"probe.toml\"\n\
         ready = \"http://127.0.0.1:{port}/healthz\"\nmount = [\"{folder}:{folder}:ro\"]\n"
    );
    write("server.toml", &text);
    let work = world.root().join("tmp");
    let flags = ["bench", "--rounds", "1", "--json", "--store", world.store(), "--work"];
    let command = world.rewarm().args(flags).arg(&work).arg("--server").arg(files.join("server.toml"));
    let report = command.timeout(std::time::Duration::from_secs(300)).ok().json();
    assert_figures(&report, 1);
    let rows = report["results"].as_array().expect("results");
    let count = |store: &str| rows.iter().filter(|row| row["store"] == store).count();
    let counts = ["none", "file-warm", "file-cold", "s3", "cache"].map(count);
    assert_eq!((counts, rows.len()), ([2, 5, 5, 3, 2], 17), "{report:#}");
    let left: Vec<_> = std::fs::read_dir(&work).expect("the work folder").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(residue::processes(world.id()), []);
    world.finish();
}

/// 24 GiB of memory hold no more than six times that.
#[test]
fn more_than_4_gib_are_not_measured() {
    let Some(world) = world(&[Need::Root, Need::Criu, Need::Runc]) else { return };
    let output = world.rewarm().args(["bench", "--size", "4097MiB"]).fails(2);
    output.says(&["4097MiB", "--size", "at most 4GiB"]);
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
