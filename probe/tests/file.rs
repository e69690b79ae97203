//! The probe file: what it takes, and what each mistake is told.

use std::path::Path;

use rewarm_probe::{Compare, Probe};
use rewarm_report::{Class, Classify};

fn refused(text: &str) -> String {
    let error = Probe::parse(text, Path::new("p.toml")).expect_err("refused");
    assert_eq!(error.class(), Class::Usage);
    error.to_string()
}

#[test]
fn the_example_of_the_documentation_is_a_probe() {
    let document = include_str!("../../docs/probe.md");
    let example =
        document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("question.bin"), [1, 2, 3]).expect("writes");
    let path = folder.path().join("probe.toml");
    std::fs::write(&path, example).expect("writes");
    let probe = Probe::load(&path).expect("a good probe");
    let names: Vec<&str> = probe.requests.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["GET /health", "embed", "chat", "binary"]);
    assert_eq!(probe.requests[0].method, "GET");
    assert_eq!(probe.requests[1].method, "POST");
    assert_eq!(probe.requests[3].body.as_deref(), Some(&[1, 2, 3][..]));
    assert_eq!(probe.requests[3].compare, Compare::Body);
}

#[test]
fn every_key_that_the_documentation_lists_is_known_and_the_other_way_round() {
    let document = include_str!("../../docs/probe.md");
    let listed = |key: &str| document.lines().any(|line| line.starts_with(&format!("| `{key}`")));
    for key in
        ["port", "timeout", "name", "method", "path", "headers", "body", "body_json", "body_file", "status"]
    {
        assert!(listed(key), "docs/probe.md has no row for {key}");
    }
    for key in ["compare", "compare_headers", "json", "ignore", "tolerance", "relative"] {
        assert!(listed(key), "docs/probe.md has no row for {key}");
    }
}

#[test]
fn each_mistake_is_told_with_the_value_seen_and_the_one_expected() {
    assert_eq!(refused(""), "request of probe file p.toml is given 0 times, expected 1 to 64 of [[request]]");
    assert_eq!(
        refused("[[request]]\npath = 'health'"),
        "path of probe file p.toml, request 1 is \"health\", expected a path that starts with / and is percent-encoded"
    );
    assert_eq!(
        refused("[[request]]\npath = '/'\ncompare = 'bdy'"),
        "compare of probe file p.toml, request 1 is \"bdy\", expected \"status\", \"body\" or { json = [PATHS], tolerance = NUMBER }"
    );
    assert_eq!(
        refused("[[request]]\npath = '/'\ncompare = { tolerance = 1 }"),
        "compare of probe file p.toml, request 1 is { tolerance = 1 }, expected \"status\", \"body\" or { json = [PATHS], tolerance = NUMBER }"
    );
    assert_eq!(
        refused("[[request]]\npath = '/'\nbody = 'a'\nbody_json = 1"),
        "body of probe file p.toml, request 1 is given twice, expected one of body, body_json and body_file"
    );
    assert_eq!(
        refused("[[request]]\npath = '/'\ntimeout = '5'"),
        "timeout of probe file p.toml, request 1 is \"5\", expected a time such as \"500ms\" or \"10s\""
    );
    assert_eq!(
        refused("[[request]]\nname='a'\npath = '/'\ncompare = { json = ['$'], tolerance = -1 }"),
        "tolerance of probe file p.toml, request 1 (a) is -1, expected a number from 0 up"
    );
    assert_eq!(
        refused("[[request]]\npath = '/'\n[[request]]\npath = '/'"),
        "name of probe file p.toml is \"GET /\" twice, expected a name of its own, so that a difference says which request it is"
    );
    assert!(refused("[[request]]\npath = '/'\ncompare = { json = ['a b'] }").contains("expected JSON paths"));
    assert!(refused("[[request]]\npath = '/'\nheaders = { a = 1 }").contains("a = 1"));
    assert!(refused("[[request]]\npath = '/'\nport = 0").contains("port"));
    assert!(refused("[[request]]\npath = '/'\nmethod = 'get'").contains("method"));
    assert_eq!(refused("[[request]"), "parse p.toml");
    assert_eq!(refused("[[request]]\npath = 3"), "parse p.toml");
}

#[test]
fn a_missing_file_is_named() {
    let error = Probe::load(Path::new("/nowhere/p.toml")).expect_err("absent");
    assert_eq!(error.to_string(), "read /nowhere/p.toml");
    let error = Probe::parse("[[request]]\npath='/'\nbody_file='b.bin'", Path::new("/nowhere/p.toml"))
        .expect_err("absent");
    assert_eq!(error.to_string(), "read /nowhere/b.bin");
}
