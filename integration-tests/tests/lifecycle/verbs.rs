//! The verbs that act on a replica: `ps`, `logs`, `exec`, `stop`, `wait`, `rm`, and `snapshot --stop`.

use std::time::Duration;

use nix::sys::signal::Signal;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::replica::names;
use rewarm_integration_tests::residue;
use rewarm_integration_tests::server::Server;

use crate::world_for;

/// The status with which the plain server ends on SIGTERM.
const PLAIN_STATUS: i32 = 7;

#[test]
fn exec_passes_input_output_status_and_signals() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let input: Vec<u8> = (0..=255u8).cycle().take(300_000).collect();
    let counted = replica.exec(&["sh", "-c", "wc -c; echo to stderr >&2; exit 23"]).input(input).fails(23);
    assert_eq!(counted.stdout.trim(), "300000");
    assert!(counted.stderr.contains("to stderr"), "{counted}");

    // The command runs in the replica's own namespaces, as the server does.
    assert_eq!(replica.sh("readlink /proc/self/ns/pid"), replica.sh("readlink /proc/1/ns/pid"));
    assert_eq!(replica.sh("readlink /proc/self/ns/net"), replica.sh("readlink /proc/1/ns/net"));
    let flags = [
        "exec",
        replica.name(),
        "--env",
        "WORD=hello",
        "--workdir",
        "/usr",
        "--",
        "sh",
        "-c",
        "echo $WORD; pwd",
    ];
    assert_eq!(world.rewarm().args(flags).ok().stdout, "hello\n/usr\n");

    let traps = "for name in INT TERM HUP QUIT USR1; do trap \"echo caught $name; exit 9\" $name; done";
    let script = format!("{traps}; echo ready; while :; do sleep 0.05; done");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1] {
        let running = replica.exec(&["sh", "-c", &script]).timeout(Duration::from_secs(20)).spawn();
        running.await_stdout("ready");
        running.signal(signal);
        let output = running.wait();
        output.expect_code(9);
        let name = signal.as_str().trim_start_matches("SIG");
        assert!(output.stdout.contains(&format!("caught {name}")), "{output}");
    }
    // One that does not handle it ends by it, with the status that a shell shows.
    let running = replica.exec(&["sh", "-c", "echo ready; exec sleep 60"]).spawn();
    running.await_stdout("ready");
    world.await_state("the program runs", Duration::from_secs(10), || {
        residue::processes(world.id()).iter().any(|(_, command)| command == "sleep 60")
    });
    running.signal(Signal::SIGTERM);
    running.wait().expect_code(128 + Signal::SIGTERM as i32);
    world.finish();
}

/// As shells have it: 127 for a program that is not there, 126 for one that cannot be run.
#[test]
fn exec_of_what_cannot_be_run_has_the_status_of_a_shell() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    replica.sh("echo '#!/bin/sh' > /srv/plain-text");
    let traces = world.traces();
    for program in ["/no/such/program", "no-such-program-in-the-path"] {
        replica.exec(&[program]).fails(127).says(&[program]);
    }
    // Executable by its mode, and no program of any kind.
    replica.sh("printf 'garbage' > /srv/garbage && chmod +x /srv/garbage");
    for program in ["/srv/plain-text", "/srv", "/srv/garbage"] {
        replica.exec(&[program]).fails(126).says(&[program]);
    }
    // The program's own status is never mistaken for it, and a folder that is missing is not a missing program.
    for code in [1, 126, 127, 255] {
        replica.exec(&["sh", "-c", &format!("exit {code}")]).fails(code);
    }
    let call = world.rewarm().args(["exec", replica.name(), "--workdir", "/no/such/folder", "--", "true"]);
    call.fails(1).says(&["/no/such/folder"]);
    no_residue(&world, &traces);
    world.finish();
}

/// Names are those of the replica's own files, not of the host's.
#[test]
fn exec_knows_the_users_of_the_replica() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    replica
        .sh("echo 'inside:x:4242:4343::/:/bin/sh' >> /etc/passwd; echo 'extra:x:4444:inside' >> /etc/group");
    let id = |user: &str| {
        let call = world.rewarm().args(["exec", replica.name(), "--user", user, "--", "id"]);
        call.ok().stdout.trim().to_owned()
    };
    assert_eq!(id("inside"), "uid=4242(inside) gid=4343 groups=4343,4444(extra)");
    assert_eq!(id("inside:extra"), "uid=4242(inside) gid=4444(extra) groups=4444(extra)");
    assert_eq!(id("77:88"), "uid=77 gid=88 groups=88");
    let call = world.rewarm().args(["exec", replica.name(), "--user", "nobody-knows-me", "--", "id"]);
    call.fails(3).says(&["user \"nobody-knows-me\" is not in", "etc/passwd"]);
    world.finish();
}

#[test]
fn logs_have_both_outputs_and_follow_until_the_end() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let first = world.rewarm().args(["logs", replica.name()]).ok();
    for line in ["listening", "a line on stderr"] {
        assert!(
            format!("{}{}", first.stdout, first.stderr).contains(line),
            "{line:?} is missing in\n{first}"
        );
    }
    let following = world.rewarm().args(["logs", "-f", replica.name()]).spawn();
    following.await_stdout("listening");
    let _ = replica.json("/count");
    following.await_stdout("asked /count");
    replica.stop();
    let output = following.wait();
    output.expect_code(0);
    assert!(output.stdout.contains("ending"), "{output}");
    // A stopped replica keeps its logs until `rm`.
    assert!(world.rewarm().args(["logs", replica.name()]).ok().stdout.contains("ending"));
    world.rewarm().args(["rm", replica.name()]).ok();
    world.rewarm().args(["logs", replica.name()]).fails(4);
    world.finish();
}

#[test]
fn a_clone_writes_to_logs_of_its_own() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    let _ = clones[0].json("/count");
    let logs = |name: &str| world.rewarm().args(["logs", name]).ok().stdout;
    assert!(logs(clones[0].name()).contains("asked /count"));
    assert!(!logs(clones[1].name()).contains("asked /count"));
    assert!(!logs(source.name()).contains("asked /count"));
    world.finish();
}

#[test]
fn stop_wait_and_rm_know_the_status_of_the_server() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let waiting = world.rewarm().args(["wait", replica.name()]).spawn();
    world.rewarm().args(["rm", replica.name()]).fails(1).says(&[replica.name()]);
    replica.stop();
    waiting.wait().expect_code(PLAIN_STATUS);
    world.rewarm().args(["wait", replica.name()]).fails(PLAIN_STATUS);

    assert!(!names(&world.rewarm_json().arg("ps").ok()).contains(&replica.name().to_owned()));
    let entry = replica.entry().expect("ps --all shows it");
    assert!(entry.to_string().contains(&PLAIN_STATUS.to_string()), "no status in {entry}");

    // Its name may be used again without `rm`.
    let again = world.start("plain", &server);
    assert_eq!(again.name(), replica.name());
    again.remove();
    assert!(again.entry().is_none());
    world.finish();
}

#[test]
fn stop_kills_a_server_that_does_not_end_by_itself() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    server.command[2] = server.command[2].replace("signal.signal(signal.SIGTERM, end)", "");
    let replica = world.start("plain", &server);
    let output = world.rewarm().args(["stop", replica.name(), "--timeout", "300ms"]).ok();
    assert!(output.took < Duration::from_secs(8), "{output}");
    world.rewarm().args(["wait", replica.name()]).fails(128 + Signal::SIGKILL as i32);
    world.finish();
}

/// A server that ends by itself is a stopped replica with its status, and nothing but logs is left.
#[test]
fn a_server_that_ends_leaves_its_status() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let waiting = world.rewarm().args(["wait", replica.name()]).spawn();
    // The kernel delivers it to process 1, which has a handler.
    replica.exec(&["kill", "-TERM", "1"]).run();
    waiting.wait().expect_code(PLAIN_STATUS);
    assert!(names(&world.rewarm_json().arg("ps").ok()).is_empty());
    world.finish();
}

#[test]
fn snapshot_with_stop_ends_the_server_after_it_is_published() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--stop"]);
    assert!(names(&world.rewarm_json().arg("ps").ok()).is_empty(), "the server still runs");
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// Commands may be killed at any moment; replicas go on, and a later command finds them.
#[test]
fn replicas_outlive_the_command_that_made_them() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let entry = replica.entry().expect("ps shows it");
    let following = world.rewarm().args(["logs", "-f", replica.name()]).spawn();
    following.await_stdout("listening");
    following.signal(Signal::SIGKILL);
    assert_eq!(following.wait().signal, Some(Signal::SIGKILL as i32));
    assert_eq!(replica.json("/count")["count"], 1);
    assert_eq!(replica.entry().expect("ps shows it")["name"], entry["name"]);
    world.finish();
}

#[test]
fn memory_and_processor_limits_reach_the_cgroup() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let has = |name: &str, memory: &str, cpu: &str| {
        let limits = cgroup_values(&world, name);
        assert!(limits.iter().any(|value| value == memory), "no limit of {memory} bytes in {limits:?}");
        let of_period = format!("{cpu} 100000");
        assert!(
            limits.iter().any(|value| value == cpu || *value == of_period),
            "no quota of {cpu} in {limits:?}"
        );
    };
    let replica = world.start_with("plain", &server, &["--memory", "300MiB", "--cpus", "0.5"]);
    has(replica.name(), "314572800", "50000");
    // A clone has those of its source, or what it is given.
    world.snapshot(&replica, "v1", &["--stop"]);
    let name = world.name("same");
    let _ = world.restore("plain", "v1", server.port, &["--name", &name]);
    has(&name, "314572800", "50000");
    let name = world.name("other");
    let flags = ["--name", &name, "--memory", "200MiB", "--cpus", "0.25"];
    let _ = world.restore("plain", "v1", server.port, &flags);
    has(&name, "209715200", "25000");
    world.finish();
}

/// The environment of a restored server is part of its memory; what is started in a clone afterwards has the one that was given.
#[test]
fn the_environment_of_a_restore_is_for_what_is_started_then() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start_with("plain", &server, &["--env", "WORD=first", "--env", "KEPT=kept"]);
    world.snapshot(&source, "v1", &["--post", "echo $WORD $KEPT > /srv/words", "--stop"]);
    let words = |flags: &[&str]| {
        let name = world.name("clone");
        let clones = world.restore("plain", "v1", server.port, &[&["--name", &name], flags].concat());
        let seen = clones[0].sh("cat /srv/words; echo $WORD $KEPT");
        let own = clones[0].json("/environment")["WORD"].clone();
        clones[0].remove();
        (seen, own)
    };
    assert_eq!(words(&[]), ("first kept\nfirst kept".to_owned(), "first".into()));
    assert_eq!(words(&["--env", "WORD=second"]), ("second kept\nsecond kept".to_owned(), "first".into()));
    let flags = ["--env", "WORD=cold", "--ready", &server.ready, "--cold-fallback", "--"];
    let output = world.restore_call("plain", "absent", server.port, &flags).args(&server.command).ok();
    let cold = rewarm_integration_tests::Replica::of_restore(&world, server.port, &output);
    assert_eq!(cold[0].json("/environment")["WORD"], "cold");
    world.finish();
}

fn cgroup_values(world: &rewarm_integration_tests::World, name: &str) -> Vec<String> {
    let files = ["memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max"];
    let groups = rewarm_integration_tests::residue::cgroups(world.id());
    let groups = groups.iter().filter(|path| path.to_string_lossy().contains(name));
    let read =
        |path: std::path::PathBuf| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    groups.flat_map(|path| files.map(|file| path.join(file))).filter_map(read).collect()
}

/// A server that talks without end must not fill the disk.
#[test]
fn logs_have_a_limit() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    // 200 MiB over the server's own pipe.
    replica.sh("head -c 209715200 /dev/zero | tr '\\0' 'x' | fold -w 1000 > /proc/1/fd/1; echo the end > /proc/1/fd/1");
    let following = world.rewarm().args(["logs", "-n", "1", "-f", replica.name()]).spawn();
    following.await_stdout("the end");
    let folder = world.state().join("replicas").join(replica.name()).join("logs");
    let size = |entry: std::fs::DirEntry| entry.metadata().map(|data| data.len()).unwrap_or_default();
    let bytes: u64 = std::fs::read_dir(&folder).expect("the logs").flatten().map(size).sum();
    assert!(bytes > 0 && bytes <= 64 << 20, "{bytes} bytes of logs in {}", folder.display());
    drop(following);
    assert_eq!(replica.json("/count")["count"], 1, "the server waits for its log");
    world.finish();
}

/// Two starts of a deterministic server lie at the same addresses, and so does a clone.
#[test]
fn a_deterministic_server_has_the_same_addresses_at_each_start() {
    const NO_RANDOM_ADDRESSES: u64 = 0x004_0000;
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let host = |replica: &rewarm_integration_tests::Replica<'_>, file: &str| {
        let pid = replica.entry().expect("ps shows it")["pid"].to_string();
        std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it runs")
    };
    let addresses = |replica: &rewarm_integration_tests::Replica<'_>| {
        let maps = host(replica, "maps");
        let of = |name: &str| maps.lines().find(|line| line.contains(name)).map(str::to_owned);
        ["/python3", "libc.so", "[heap]", "[stack]"]
            .map(|name| of(name).unwrap_or_else(|| panic!("no {name}:\n{maps}")))
    };
    let start = |n: &str, flags: &[&str]| addresses(&world.start_with(n, &server, flags));
    let programs = |found: &[String; 4]| [0, 1].map(|at| found[at].split(' ').next().map(str::to_owned));
    assert_ne!(
        programs(&start("a", &[])),
        programs(&start("b", &[])),
        "this machine has no random addresses"
    );
    let first = world.start_with("first", &server, &["--deterministic"]);
    let found = addresses(&first);
    assert_eq!(programs(&found), programs(&start("second", &["--deterministic"])));
    let personality = u64::from_str_radix(host(&first, "personality").trim(), 16).expect("a number");
    assert_ne!(personality & NO_RANDOM_ADDRESSES, 0, "{personality:#x}");
    assert_eq!(first.json("/environment")["PYTHONHASHSEED"], "0");
    let own = world.start_with("own", &server, &["--deterministic", "--env", "PYTHONHASHSEED=5"]);
    assert_eq!(own.json("/environment")["PYTHONHASHSEED"], "5");
    assert_eq!(own.json("/environment")["MALLOC_MMAP_THRESHOLD_"], "131072");
    let before = answers(&first, &server);
    world.snapshot(&first, "v1", &["--stop"]);
    let clones = world.restore("first", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!(programs(&addresses(&clones[0])), programs(&found));
    world.finish();
}

#[test]
fn labels_are_shown() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start_with("plain", &server, &["--label", "team=vision", "--label", "tier=a=b"]);
    let entry = replica.entry().expect("ps shows it");
    let labels = serde_json::json!({ "team": "vision", "tier": "a=b" });
    assert_eq!(entry["labels"], labels, "{entry}");
    // They go with the snapshot and on to its clones.
    world.snapshot(&replica, "v1", &["--stop"]);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("plain", "v1")]).ok().json();
    let facts = &inspected["variants"][0]["manifest"]["facts"];
    assert_eq!(facts["labels"], labels, "{facts}");
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    assert_eq!(clones[0].entry().expect("ps shows it")["labels"], labels);
    world.finish();
}
