//! Snapshots whose signature is missing, wrong or unknown: exit 5 before anything is started.

use std::fs;

use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::server::Server;

use crate::{world, world_for};

#[test]
fn a_required_signature() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let keys = world.files().join("keys").to_string_lossy().into_owned();
    let public = |name: &str| {
        let made = world.rewarm_json().args(["key", "new", name, "--dir", &keys]).ok().json();
        made["public"].as_str().expect("a public key").to_owned()
    };
    let (ours, theirs) = (public("ours"), public("theirs"));
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "unsigned", &[]);
    world.snapshot_call(&source, "signed", &["--sign", "ours"]).env("REWARM_KEYS", &keys).ok();
    world.snapshot_call(&source, "other", &["--sign", "theirs"]).env("REWARM_KEYS", &keys).ok();
    source.remove();
    let traces = world.traces();
    let restore = |tag: &str, flags: &[&str]| {
        world.restore_call("plain", tag, server.port, flags).env("REWARM_KEYS", &keys)
    };
    restore("unsigned", &["--require-signature=ours"]).fails(5).says(&["no signature", &ours]);
    restore("unsigned", &["--require-signature"]).fails(5).says(&["no signature", &ours, &theirs]);
    restore("other", &["--require-signature=ours"]).fails(5).says(&[&ours, &theirs]);
    restore("signed", &["--require-signature=absent"]).fails(4).says(&["absent.pub"]);
    // An operator's file says the same without a flag, and a flag cannot say less.
    let config = world.files().join("config.toml");
    let rule = format!(
        "[[store]]\nurl_prefix = {:?}\nrequire_signature = true\nkeys = [\"ours\"]\n",
        world.store_folder()
    );
    fs::write(&config, rule).expect("our own folder");
    let config = config.to_string_lossy().into_owned();
    restore("unsigned", &["--config", &config]).fails(5).says(&["no signature", &ours]);
    restore("other", &["--config", &config, "--require-signature=theirs"]).fails(5);
    // What nobody trusts says nothing of what is to be started instead: only the caller does.
    restore("unsigned", &["--config", &config, "--cold-fallback"]).fails(5).says(&["no signature", &ours]);
    no_residue(&world, &traces);
    let fallback = ["--config", &config, "--ready", &server.ready, "--cold-fallback", "--"];
    let output = restore("unsigned", &fallback).args(&server.command).ok();
    let told = output.json();
    assert_eq!(told["started"], "cold", "{output}");
    assert!(told["replicas"][0]["cold_because"].to_string().contains("no signature"), "{output}");
    let cold = Replica::of_restore(&world, server.port, &output);
    assert_ne!(answers(&cold[0], &server), before, "a cold start makes its own token");
    cold[0].remove();
    let clone = world.name("clone");
    let output = restore("signed", &["--config", &config, "--require-signature", "--name", &clone]).ok();
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    // What nobody could restore is not taken.
    let call = world.snapshot_call(&clones[0], "again", &["--config", &config]);
    call.env("REWARM_KEYS", &keys).fails(2).says(&["--sign", &ours]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_configuration_that_is_not_understood() {
    let Some(world) = world(&[]) else { return };
    let config = world.files().join("config.toml");
    fs::write(&config, "[[store]]\nurl_prefix = \"s3://a\"\nrequire_signatures = true\n")
        .expect("our own folder");
    let config = config.to_string_lossy().into_owned();
    let output = world.rewarm().args(["--config", &config, "restore", "/a/b"]).run();
    // Without what containers need the machine is refused before.
    assert!(matches!(output.code, Some(2 | 3)), "{output}");
    if output.code == Some(2) {
        output.says(&["require_signatures", &config]);
    }
}
