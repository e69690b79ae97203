//! The program as a user sees it, as far as no container is needed: help, errors, exit codes, generated documents.
//!
//! Error and help texts are interface, so they are compared whole. After a wanted change:
//! `INSTA_UPDATE=always cargo test -p rewarm-cli`.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A call of the program with nothing in its environment that could change what it says.
fn rewarm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewarm"));
    command.args(arguments).env_clear().env("PATH", "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin");
    // clap wraps at the terminal's width, which a test does not have.
    command.env("COLUMNS", "100").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    rewarm(arguments).output().expect("the program starts")
}

/// Exit code, stdout and stderr of a call, for a snapshot.
fn told(arguments: &[&str]) -> String {
    let output = run(arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().expect("not killed");
    format!("$ rewarm {}\nexit {code}\n--- stdout\n{stdout}--- stderr\n{stderr}", arguments.join(" "))
}

const VERBS: [&str; 27] = [
    "doctor",
    "run",
    "snapshot",
    "restore",
    "ps",
    "logs",
    "exec",
    "pause",
    "wake",
    "stop",
    "wait",
    "rm",
    "ls",
    "inspect",
    "verify",
    "diff",
    "cp",
    "gc",
    "key",
    "engine",
    "serve",
    "bench",
    "simulate",
    "cache",
    "completions",
    "man",
    "help",
];

#[test]
fn help_of_the_program_and_of_each_verb() {
    insta::assert_snapshot!("help", told(&["--help"]));
    for verb in VERBS {
        let help = told(&[verb, "--help"]);
        insta::assert_snapshot!(format!("help-{verb}"), help);
        if verb != "help" {
            assert!(help.contains("Example"), "{verb} --help has no example");
        }
    }
}

#[test]
fn each_verb_of_the_list_is_in_the_help_and_the_other_way_round() {
    let help = told(&["--help"]);
    let listed: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(listed, VERBS);
}

#[test]
fn words_of_the_glossary_that_are_not_to_be_used_are_not_in_the_help() {
    // docs/glossary.md says why; `checkpoint` and `thaw` belong to CRIU and to the freezer.
    const BANNED: [&str; 11] = [
        "checkpoint",
        "thaw",
        "suspend",
        "blob",
        "shard",
        "metadata",
        "instance",
        "worker",
        "daemon",
        "health check",
        " pod ",
    ];
    for verb in VERBS {
        let help = told(&[verb, "--help"]).to_lowercase();
        for word in BANNED {
            assert!(!help.contains(word), "{verb} --help says {word}");
        }
    }
}

#[test]
fn malformed_command_lines_end_with_2_and_say_what_is_expected() {
    let calls: [&[&str]; 20] = [
        &[],
        &["chekpoint"],
        &["run"],
        &["run", "Name", "--", "true"],
        &["run", "a"],
        &["run", "a", "--memory", "8Gib", "--", "true"],
        &["run", "a", "--cpus", "0", "--", "true"],
        &["run", "a", "--mount", "models:/m", "--", "true"],
        &["run", "a", "--publish", "8000", "--", "true"],
        &["run", "a", "--net", "bridge", "--", "true"],
        &["run", "a", "--ready", "https://localhost/", "--", "true"],
        &["run", "a", "--ready-timeout", "30", "--", "true"],
        &["run", "a", "--env", "KEY", "--", "true"],
        &["snapshot", "a", "/s/Name"],
        &["snapshot", "a", "/s/n@t", "--compression", "gzip"],
        &["snapshot", "a", "/s/n@t", "--pre", ""],
        &["restore", "ftp://h/n"],
        &["restore", "/s/n", "--", "true"],
        &["restore", "/s/n", "--count", "0"],
        &["restore", "/s/n", "--count", "2", "--publish", "80:80"],
    ];
    for (index, call) in calls.iter().enumerate() {
        let text = told(call);
        assert!(text.contains("\nexit 2\n"), "{text}");
        insta::assert_snapshot!(format!("malformed-{index:02}"), text);
    }
}

#[test]
fn a_digest_as_a_destination_is_malformed() {
    let digest = "0".repeat(64);
    let text = told(&["snapshot", "a", &format!("/s/n@blake3:{digest}")]);
    assert!(text.contains("\nexit 2\n"), "{text}");
    assert!(text.contains("expected a tag"), "{text}");
}

#[test]
fn unknown_names_end_with_4() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().to_str().expect("UTF-8");
    for verb in [
        &["logs", "ghost"][..],
        &["stop", "ghost"],
        &["wait", "ghost"],
        &["rm", "ghost"],
        &["exec", "ghost", "--", "true"],
    ] {
        let output = rewarm(verb).args(["--state", state]).output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{verb:?}: {stderr}");
        assert!(stderr.contains("no replica is named ghost"), "{stderr}");
        assert!(stderr.contains("hint: `rewarm ps --all` lists the replicas"), "{stderr}");
    }
}

#[test]
fn an_unknown_store_or_snapshot_ends_with_4_and_an_empty_state_lists_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().to_str().expect("UTF-8");
    for call in [&["ls", &format!("{root}/none")][..], &["inspect", &format!("{root}/none/n@t")]] {
        let output = run(call);
        assert_eq!(output.status.code(), Some(4), "{call:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let output = run(&["ps", "--json", "--state", root]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "{\"replicas\":[]}\n");
}

#[test]
fn a_failure_in_json_has_the_chain_and_the_exit_code() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = run(&["wait", "ghost", "--json", "--state", folder.path().to_str().expect("UTF-8")]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(json["error"]["class"], "not_found");
    assert_eq!(json["error"]["exit"], 4);
    assert_eq!(json["error"]["doing"], "wait for ghost");
    assert_eq!(json["error"]["chain"][0], "no replica is named ghost");
}

#[test]
fn a_closed_pipe_ends_quietly_with_0() {
    let mut child = rewarm(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("reads");
    assert_eq!((child.wait().expect("ends").code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn completions_and_manual_pages_know_every_verb() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0), "{shell}");
        let script = String::from_utf8_lossy(&output.stdout);
        assert!(script.contains("inspect") && script.contains("ready-timeout"), "{shell}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(run(&["man", folder.path().to_str().expect("UTF-8")]).status.code(), Some(0));
    for verb in VERBS.iter().filter(|verb| **verb != "help") {
        assert!(folder.path().join(format!("rewarm-{verb}.1")).is_file(), "no manual page of {verb}");
    }
    assert!(!folder.path().join("rewarm-shim.1").exists());
}

#[test]
fn exit_codes_are_told() {
    insta::assert_snapshot!("exit-codes", told(&["help", "exit-codes"]));
    insta::assert_snapshot!("help-of-nothing", told(&["help", "nothing"]));
}

#[test]
fn doctor_answers_in_json_and_says_all_or_ends_with_3() {
    let start = std::time::Instant::now();
    let output = run(&["doctor", "--json"]);
    let took = start.elapsed();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    let needs = report["needs"].as_array().expect("a list");
    let missing = needs.iter().any(|need| need["state"] == "missing");
    assert_eq!(report["ready"], !missing);
    assert_eq!(output.status.code(), Some(if missing { 3 } else { 0 }), "{report:#}");
    for name in
        ["kernel", "criu", "runc", "cgroups", "userfaultfd", "overlayfs", "capabilities", "disk", "memory"]
    {
        assert!(needs.iter().any(|need| need["name"] == name), "doctor does not look at {name}");
    }
    // The promise is 100 ms on a quiet machine; tests run beside others.
    assert!(took < std::time::Duration::from_secs(2), "{took:?}");
}

#[test]
fn doctor_names_an_old_criu_and_its_fix() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("criu");
    std::fs::write(&path, "#!/bin/sh\necho Version: 3.17.1\n").expect("writes");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let output = rewarm(&["doctor"]).env("REWARM_CRIU", &path).output().expect("starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("3.17.1") && text.contains("fix: "), "{text}");
}

#[test]
fn the_list_of_environment_variables_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/environment.md");
    let generated = rewarm_cli::env::document();
    if std::env::var_os("INSTA_UPDATE").is_some_and(|value| value == "always") {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(&path, &generated).expect("writes");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        written, generated,
        "run INSTA_UPDATE=always cargo test -p rewarm-cli, and commit docs/reference"
    );
}
