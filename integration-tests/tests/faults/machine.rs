//! The verdict: a machine that a snapshot does not fit is refused before any data moves, with every reason at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::server::{Server, own_library};
use rewarm_integration_tests::{Need, Replica, World};
use serde_json::Value;

use crate::world_for;

#[test]
fn libraries_that_changed_since_the_snapshot_are_all_named() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let libraries = ["libfirst.so", "libsecond.so"].map(|name| own_library(&world.files(), name));
    let preload =
        libraries.iter().map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>().join(":");
    server.env.push(("LD_PRELOAD".to_owned(), preload));
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();

    let traces = world.traces();
    let mut longer = fs::read(&libraries[0]).expect("our own file");
    longer.extend_from_slice(b"upgraded");
    fs::write(&libraries[0], longer).expect("our own file");
    fs::remove_file(&libraries[1]).expect("our own file");
    without_packs(&world, || {
        let output = world.restore_call("plain", "v1", server.port, &[]).fails(3);
        output.says(&["libfirst.so", "libsecond.so"]);
        assert!(output.took < Duration::from_secs(1), "{output}");
        no_residue(&world, &traces);
        // `inspect` gives the same verdict, and is no failure: it was asked for.
        let inspected = world.rewarm_json().args(["inspect", &world.reference("plain", "v1")]).ok();
        for word in ["libfirst.so", "libsecond.so"] {
            assert!(inspected.stdout.contains(word), "{inspected}");
        }
        // Whoever would rather wait than do without gets a cold one, and is told why.
        let output = world.restore_call("plain", "v1", server.port, &["--cold-fallback"]).ok();
        let told = output.json();
        assert_eq!(told["started"], "cold", "{output}");
        let because = told["replicas"][0]["cold_because"].to_string();
        assert!(because.contains("libfirst.so") && because.contains("libsecond.so"), "{output}");
        let cold = Replica::of_restore(&world, server.port, &output);
        assert_ne!(answers(&cold[0], &server), before, "a cold start makes its own token");
    });
    world.finish();
}

/// Stores the manifest of the only snapshot, the first that was written, again with other facts, and gives its digest.
fn with_facts(world: &World, change: impl FnOnce(&mut Value)) -> String {
    let folder = world.store_folder().join("manifests");
    let written = |entry: &fs::DirEntry| entry.metadata().and_then(|data| data.modified()).expect("a time");
    let first = fs::read_dir(&folder).expect("a folder").flatten().min_by_key(written);
    let path = first.expect("a manifest").path();
    let text = fs::read_to_string(&path).expect("text");
    let mut manifest: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("it is JSON");
    change(&mut manifest["facts"]);
    let text = format!("{manifest}\n{{\"signatures\":[]}}\n");
    let digest = rewarm_store::Digest::of(text.as_bytes());
    fs::write(folder.join(digest.hex()), text).expect("our own folder");
    digest.to_string()
}

/// What a snapshot says of its machine is what the kernel says there, and each kind of it that differs is a reason.
#[test]
fn reasons_of_every_kind_come_at_once() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let library = own_library(&world.files(), "libfirst.so");
    server.env.push(("LD_PRELOAD".to_owned(), library.to_string_lossy().into_owned()));
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let inspect = |target: &str| {
        let reference = world.reference("plain", target);
        world.rewarm_json().args(["inspect", &reference]).ok().json()["variants"][0].clone()
    };
    let facts = inspect("v1")["manifest"]["facts"].clone();
    let text = fs::read_to_string("/proc/cpuinfo").expect("the kernel tells");
    let flags = text.lines().find_map(|line| line.strip_prefix("flags\t\t: ")).expect("flags");
    let of_the_kernel: BTreeSet<&str> = flags.split_whitespace().collect();
    let written = facts["cpu"]["features"].as_array().expect("a list").iter().filter_map(Value::as_str);
    assert_eq!(written.collect::<BTreeSet<_>>(), of_the_kernel);
    assert_eq!(facts["architecture"], std::env::consts::ARCH);

    let other = with_facts(&world, |facts| {
        facts["architecture"] = "riscv64".into();
        facts["criu"] = "1.0".into();
        facts["cpu"]["features"].as_array_mut().expect("a list").push("amx_nowhere".into());
    });
    let intact = fs::read(&library).expect("our own file");
    fs::write(&library, [&intact[..], b"upgraded"].concat()).expect("our own file");
    let traces = world.traces();
    let words = [
        format!("the snapshot is for riscv64, this machine is {}", std::env::consts::ARCH),
        "this processor lacks amx_nowhere, which the server may use".to_owned(),
        format!(
            "the snapshot was made by CRIU 1.0, this machine has {}",
            facts["criu"].as_str().expect("text")
        ),
        format!("libfirst.so has {} bytes", intact.len() + 8),
    ];
    without_packs(&world, || {
        let output = world.restore_call("plain", &other, server.port, &[]).fails(3);
        output.says(&words.each_ref().map(String::as_str)).says(&["stage admit"]);
        assert!(output.took < Duration::from_secs(1), "{output}");
        let verdict = inspect(&other)["verdict"].clone();
        assert_eq!(verdict["fits"], false, "{verdict}");
        let reasons = verdict["reasons"].as_array().expect("a list");
        assert_eq!(reasons.len(), words.len(), "{verdict}");
        for (reason, word) in reasons.iter().zip(&words) {
            assert!(reason.as_str().is_some_and(|reason| reason.contains(word)), "{word} in {verdict}");
        }
    });
    no_residue(&world, &traces);
    // It was these facts: with those that were written, and the library as it was, it fits.
    fs::write(&library, intact).expect("our own file");
    let same = with_facts(&world, |_| ());
    let clones = world.restore("plain", &same, server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// The verdict needs none of the data: it is the same where the packs are gone, which is exit 5 for whoever reads them.
fn without_packs(world: &World, verdict: impl FnOnce()) {
    let (packs, away) = (world.store_folder().join("packs"), world.root().join("packs"));
    fs::rename(&packs, &away).expect("our own folder");
    verdict();
    fs::rename(&away, &packs).expect("our own folder");
}

/// Images belong to the version of CRIU that wrote them.
#[test]
fn another_version_of_criu_is_named_beside_the_one_of_the_snapshot() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let reference = world.reference("plain", "v1");
    let inspect = |criu: &[&str]| world.rewarm_json().args(criu).args(["inspect", &reference]).ok().json();
    let made_by = inspect(&[])["variants"][0]["manifest"]["facts"]["criu"].as_str().map(str::to_owned);
    let made_by = made_by.expect("the facts name it");
    let other = world.files().join("criu");
    fs::write(&other, "#!/bin/sh\necho 'Version: 44.3'\n").expect("our own folder");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).expect("our own file");
    let other = other.to_string_lossy().into_owned();
    let words = format!("the snapshot was made by CRIU {made_by}, this machine has 44.3");
    without_packs(&world, || {
        let call = world.restore_call("plain", "v1", server.port, &["--criu", &other]);
        call.fails(3).says(&["stage admit", &words]);
        let variant = inspect(&["--criu", &other])["variants"][0].clone();
        assert_eq!(variant["verdict"]["fits"], false, "{variant}");
        assert_eq!(variant["verdict"]["reasons"], serde_json::json!([words]));
    });
    no_residue(&world, &traces);
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// What was mounted must be found again, or it is named before anything is started.
#[test]
fn a_mount_that_is_gone_is_named() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let models = world.files().join("models");
    fs::create_dir(&models).expect("our own folder");
    fs::write(models.join("weights"), vec![7; 100_000]).expect("our own folder");
    server.mounts.push(format!("{}:/models:ro", models.display()));
    // Nothing of this one is open.
    let aside = world.files().join("aside");
    fs::create_dir(&aside).expect("our own folder");
    server.mounts.push(format!("{}:/aside", aside.display()));
    // The server keeps the file open.
    server.command[2] = format!("weights = open('/models/weights')\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();

    let traces = world.traces();
    fs::write(models.join("weights"), vec![7; 100_001]).expect("our own folder");
    world.restore_call("plain", "v1", server.port, &[]).fails(3).says(&["weights"]);
    fs::remove_file(models.join("weights")).expect("our own folder");
    world.restore_call("plain", "v1", server.port, &[]).fails(3).says(&["weights"]);
    fs::remove_dir(&models).expect("our own folder");
    world.restore_call("plain", "v1", server.port, &[]).fails(3).says(&["models"]);
    fs::remove_dir(&aside).expect("our own folder");
    let refused = world.restore_call("plain", "v1", server.port, &[]).fails(3);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("plain", "v1")]).ok().json();
    let reasons = inspected["variants"][0]["verdict"]["reasons"].as_array().expect("a list").clone();
    assert!(reasons.iter().any(|reason| reason.as_str().expect("text").contains("/aside")), "{reasons:?}");
    for reason in &reasons {
        refused.says(&[reason.as_str().expect("text")]);
    }
    no_residue(&world, &traces);
    world.finish();
}

/// A folder in which the server works is needed as much as a file that it has open.
#[test]
fn a_folder_that_is_gone_is_named() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let models = world.root().join("models");
    fs::create_dir_all(models.join("current")).expect("our own folder");
    server.mounts.push(format!("{}:/models", models.display()));
    server.command[2] = format!("import os\nos.chdir('/models/current')\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    fs::remove_dir(models.join("current")).expect("our own folder");
    let output = world.restore_call("plain", "v1", server.port, &[]).fails(3);
    output.says(&["stage admit", "the folder /models/current is missing"]);
    no_residue(&world, &traces);
    fs::create_dir(models.join("current")).expect("our own folder");
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A process cannot be given higher limits than the one that restores it has, unless that has CAP_SYS_RESOURCE.
#[test]
fn limits_that_cannot_be_given_are_named() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let call = world.restore_call("plain", "v1", server.port, &[]).under("prlimit", &["--nofile=512:512"]);
    if Need::Resource.is_met() {
        let clones = Replica::of_restore(&world, server.port, &call.ok());
        server_answers_as_before(&clones[0], &server, &before);
    } else {
        call.fails(3).says(&["stage admit", "Max open files", "512", "CAP_SYS_RESOURCE"]);
        no_residue(&world, &traces);
        let clones = world.restore("plain", "v1", server.port, &[]);
        server_answers_as_before(&clones[0], &server, &before);
    }
    world.finish();
}

#[test]
fn a_memory_limit_that_is_too_small_is_refused_before_the_start() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let output = world.restore_call("plain", "v1", server.port, &["--memory", "2MiB"]).fails(3);
    output.says(&["memory"]);
    assert!(output.took < Duration::from_secs(1), "{output}");
    no_residue(&world, &traces);
    world.finish();
}

/// What forked processes share on the source is not shared in a clone, so it counts once for each.
#[test]
fn memory_that_forked_processes_share_counts_for_each_of_them() {
    const MIB: u64 = 1 << 20;
    let mut server = Server::memory_of(64);
    let Some(world) = world_for(&server) else { return };
    server.command.push("--fork".to_owned());
    let source = world.start("memory", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let facts = world.rewarm_json().args(["inspect", &world.reference("memory", "v1")]).ok().json();
    let memory = &facts["variants"][0]["manifest"]["facts"]["memory"];
    let bytes = memory["logical_bytes"].as_u64().unwrap_or_else(|| panic!("{memory}"));
    assert!(bytes >= 128 * MIB, "two processes with 64 MiB each are counted as {bytes} bytes");
    let traces = world.traces();
    let output = world.restore_call("memory", "v1", server.port, &["--memory", "100MiB"]).fails(3);
    output.says(&["stage admit", "104857600", &bytes.to_string(), "without sharing"]);
    no_residue(&world, &traces);
    let clones = world.restore("memory", "v1", server.port, &["--memory", &(bytes + 64 * MIB).to_string()]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A command that gets less memory than the server's pages need: it makes do with less or says so, and the server goes on.
#[test]
fn memory_that_is_short_while_dumping() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    server.command[2] = format!("import os\nballast = os.urandom(1 << 20) * 400\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let mut rounds: BTreeMap<Option<i32>, Vec<i32>> = BTreeMap::new();
    // Short at different moments: for a thread, for the memory of pages, for a buffer. How much is enough depends on how many threads
    // meet, since each that waits for another in the allocator gets a part of it for itself: beyond the first limits it goes on until
    // one is.
    for mb in (380..=520).step_by(10).chain((550..=2000).step_by(50)) {
        if mb > 520 && rounds.contains_key(&Some(0)) {
            break;
        }
        let tag = format!("under-{mb}-mb");
        let limit = format!("--as={mb}000000");
        let output = world.snapshot_call(&source, &tag, &[]).under("prlimit", &[&limit]).run();
        // A small allocation that fails ends the program at once, and its lease with it.
        if output.code == Some(1) {
            output.says(&["memory", "the server goes on serving"]);
        }
        if output.code != Some(0) {
            assert!(!visible(&world).to_string().contains(&tag), "a snapshot is visible: {output}");
        }
        server_answers_as_before(&source, &server, &before);
        rounds.entry(output.code).or_default().push(mb);
    }
    // Otherwise all of them had far too little, or enough.
    assert!(rounds.contains_key(&Some(0)) && rounds.contains_key(&Some(1)), "codes by limit: {rounds:?}");
    no_residue(&world, &traces);
    world.finish();
}

/// Replicas do not survive a reboot, but the folder that knew them may.
#[test]
fn what_an_earlier_boot_left_is_swept() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    replica.stop();
    // As if the machine had lost power while it ran: no exit status, and the boot is another one.
    let folder = world.state().join("replicas").join(replica.name());
    fs::remove_file(folder.join("exit.json")).expect("a stopped replica has its status");
    let boot = world.state().join("boot-id");
    let today = fs::read_to_string(&boot).expect("the boot id");
    fs::write(&boot, "00000000-0000-4000-8000-000000000000\n").expect("our own folder");
    let list = world.rewarm_json().args(["ps"]).ok();
    assert!(!list.stdout.contains(replica.name()), "{list}");
    assert_eq!(fs::read_to_string(&boot).expect("the boot id"), today);
    let again = world.start("plain", &server);
    assert_eq!(again.json("/count")["count"], 1);
    world.finish();
}
