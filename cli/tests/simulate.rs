//! `rewarm simulate` as a user sees it: answers, JSON, pictures, mistakes.

use std::path::Path;
use std::process::{Command, Output, Stdio};

const SECONDS: &str = "arrival_s,service_s\n0,2\n0.1,2\n0.2,2\n30,1\n";

fn rewarm(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewarm"));
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").env("COLUMNS", "100");
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).expect("writes");
    }
    folder
}

fn told(folder: &Path, arguments: &[&str]) -> String {
    let output = rewarm(folder, arguments).output().expect("the program starts");
    text_of(&output, arguments)
}

fn text_of(output: &Output, arguments: &[&str]) -> String {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().expect("not killed");
    format!("$ rewarm {}\nexit {code}\n--- stdout\n{stdout}--- stderr\n{stderr}", arguments.join(" "))
}

#[test]
fn a_trace_through_every_policy() {
    let folder = folder(&[("t.csv", SECONDS)]);
    insta::assert_snapshot!("simulate", told(folder.path(), &["simulate", "t.csv", "--concurrency", "2"]));
}

#[test]
fn one_json_object_for_each_trace_with_the_promised_keys() {
    let folder = folder(&[("a.csv", SECONDS), ("b.csv", "0,1\n1,1\n")]);
    let call = ["simulate", "a.csv", "b.csv", "--json", "--policy", "rewarm", "--policy", "kpa"];
    let output = rewarm(folder.path(), &call).output().expect("starts");
    assert_eq!(output.status.code(), Some(0), "{}", text_of(&output, &call));
    let stdout = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect();
    assert_eq!(lines.iter().map(|line| line["trace"].clone()).collect::<Vec<_>>(), ["a.csv", "b.csv"]);
    for line in &lines {
        let policies = line["policies"].as_array().expect("a list");
        let names: Vec<&str> = policies.iter().filter_map(|policy| policy["name"].as_str()).collect();
        assert_eq!(names, ["rewarm", "kpa"]);
        let mut keys: Vec<&String> = policies[0].as_object().expect("an object").keys().collect();
        keys.sort();
        let promised = [
            "drops",
            "held_max",
            "killed_in_flight",
            "name",
            "paused_host_gib_s",
            "replica_seconds_per_request",
            "seed",
            "starts",
            "wait_ms",
            "within_target",
        ];
        assert_eq!(keys, promised);
        assert!(policies[0]["wait_ms"]["p999"].is_f64() && policies[0]["starts"]["cold"].is_u64());
    }
}

#[test]
fn a_picture_has_a_panel_for_each_trace() {
    let config = "[policy.tracker]\nutilization = [0.5, 1.0]\n[policy.rewarm]\n";
    let folder = folder(&[("a.csv", SECONDS), ("b.csv", SECONDS), ("c.toml", config)]);
    let call = ["simulate", "a.csv", "b.csv", "--config", "c.toml", "--plot", "p.svg"];
    let text = told(folder.path(), &call);
    assert!(text.contains("\nexit 0\n") && text.contains("tracker utilization=0.5"), "{text}");
    let picture = std::fs::read_to_string(folder.path().join("p.svg")).expect("a picture");
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    for word in ["a.csv", "b.csv", "tracker", "rewarm", "replica-seconds"] {
        assert!(picture.contains(word), "no {word} in the picture");
    }
}

#[test]
fn flags_win_over_the_file_and_the_programs_own_configuration_is_not_read() {
    let config = "restore = '9s'\nwarm = 0\n[policy.tracker]\n";
    let folder = folder(&[("t.csv", "0,1\n"), ("c.toml", config), ("own.toml", "nonsense = 1\n")]);
    let call = ["simulate", "t.csv", "--config", "c.toml", "--json"];
    let p50 = |more: &[&str]| -> f64 {
        let mut command = rewarm(folder.path(), &call);
        let output = command.args(more).env("REWARM_CONFIG", "own.toml").output().expect("starts");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        json["policies"][0]["wait_ms"]["p50"].as_f64().expect("a number")
    };
    assert_eq!((p50(&[]), p50(&["--restore", "2s"])), (9000.0, 2000.0));
    assert_eq!((p50(&["--restore", "none"]), p50(&["--warm", "1", "--wake", "50ms"])), (60_000.0, 50.0));
    let without = rewarm(folder.path(), &["simulate", "t.csv"]).env("REWARM_CONFIG", "own.toml").output();
    assert_eq!(without.expect("starts").status.code(), Some(0));
}

#[test]
fn measured_times_are_drawn_by_the_seed() {
    let times: String = (1..=40).map(|tenth| format!("{}\n", f64::from(tenth) / 10.0)).collect();
    let config = "seed = 7\n[policy.tracker]\n";
    let folder = folder(&[("t.csv", "0,1\n50,1\n99,1\n"), ("r.txt", &times), ("c.toml", config)]);
    let call = ["simulate", "t.csv", "--warm", "0", "--restore", "r.txt", "--json", "--policy", "tracker"];
    let plain = told(folder.path(), &call);
    assert_eq!(plain, told(folder.path(), &call));
    let seeded = rewarm(folder.path(), &call).args(["--config", "c.toml"]).output().expect("starts");
    let json: serde_json::Value = serde_json::from_slice(&seeded.stdout).expect("one object");
    assert_eq!(json["policies"][0]["seed"], 7);
    assert!(!plain.contains(&json["policies"][0]["wait_ms"].to_string()), "{plain}\n{json}");
}

#[test]
fn mistakes_end_with_2_and_say_where_and_what() {
    let folder = folder(&[
        ("good.csv", SECONDS),
        ("empty.csv", "arrival_s,service_s\n"),
        ("text.csv", "hello\n"),
        ("row.csv", "arrival_s,service_s\n0,1\n\n1,fast\n"),
        ("short.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808\n"),
        ("time.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n18:17,1,1\n"),
        ("row.jsonl", "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\n{\"timestamp\": 0}\n"),
        ("negative.csv", "0,1\n-1,1\n"),
        ("times.txt", "0.5\nsoon\n"),
        ("key.toml", "restor = '5s'\n"),
        ("policy-key.toml", "[policy.kpa]\nstable_windw = '60s'\n"),
        ("value.toml", "max = 0\n"),
        ("broken.toml", "max = \n"),
    ]);
    let calls: [&[&str]; 16] = [
        &["simulate"],
        &["simulate", "none.csv"],
        &["simulate", "empty.csv"],
        &["simulate", "text.csv"],
        &["simulate", "row.csv"],
        &["simulate", "short.csv"],
        &["simulate", "time.csv"],
        &["simulate", "row.jsonl"],
        &["simulate", "negative.csv"],
        &["simulate", "good.csv", "--policy", "rewam"],
        &["simulate", "good.csv", "--restore", "times.txt"],
        &["simulate", "good.csv", "--config", "key.toml"],
        &["simulate", "good.csv", "--config", "policy-key.toml"],
        &["simulate", "good.csv", "--config", "value.toml"],
        &["simulate", "good.csv", "--config", "broken.toml"],
        &["simulate", "good.csv", "--max", "0"],
    ];
    let mut all = String::new();
    for call in calls {
        let text = told(folder.path(), call);
        assert!(text.contains("\nexit 2\n"), "{text}");
        all.push_str(&text);
        all.push('\n');
    }
    insta::assert_snapshot!("simulate-mistakes", all);
}
