//! `rewarm pause` and `rewarm wake`.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::http::{get, request};
use rewarm_integration_tests::load::Load;
use rewarm_integration_tests::pool::free_port;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Output, Replica};

use super::{start, world_with};
use crate::world_for;

/// Weights and KV cache, in whole pieces of 2 MiB.
const DEVICE_MIB: u64 = 16 + 2;

#[track_caller]
fn printed(output: &Output, words: &str) {
    assert!(output.stdout.contains(words), "{words:?} is missing in {output}");
}

#[test]
fn a_server_gives_its_device_memory_back_and_takes_it_again() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    for server in [devices.server(16), devices.python_server()] {
        let replica = start(&world, &devices, server.name, &server);
        let before = answers(&replica, &server);
        let used = devices.used_mib(0);
        assert!(used >= 10, "{used} MiB used by {}", server.name);
        for round in 0..2 {
            let paused = world.rewarm_json().args(["pause", replica.name()]).ok().json();
            assert_eq!(paused["device_bytes"], used << 20, "{paused}");
            assert_eq!(devices.used_mib(0), 0);
            let entry = replica.entry().expect("it is listed");
            assert_eq!((&entry["status"], &entry["device_bytes"]), (&"paused".into(), &0.into()), "{entry}");
            assert!(entry["wakes_in_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{entry}");
            // Its copies are in host memory now, all but what of them is zero.
            assert!(entry["host_bytes"].as_u64().is_some_and(|bytes| bytes > used << 19), "{entry}");
            printed(&world.rewarm().args(["wake", replica.name()]).ok(), "back in device memory");
            let entry = replica.entry().expect("it is listed");
            assert_eq!(
                (&entry["status"], &entry["device_bytes"]),
                (&"ready".into(), &(used << 20).into()),
                "{round}"
            );
            server_answers_as_before(&replica, &server, &before);
        }
        replica.remove();
    }
    world.finish();
}

#[test]
fn a_server_without_device_memory_stands_still_until_it_is_woken() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let before = answers(&replica, &server);
    printed(&world.rewarm().args(["pause", replica.name()]).ok(), "is paused: took");
    let name = replica.name();
    let reference = world.reference("plain", "v1");
    for (call, code) in
        [(&["pause", name][..], 1), (&["exec", name, "--", "true"], 1), (&["snapshot", name, &reference], 3)]
    {
        world.rewarm().args(call).fails(code).says(&["is paused"]);
    }
    printed(&world.rewarm().args(["wake", name]).ok(), "is awake: took");
    server_answers_as_before(&replica, &server, &before);
    let output = world.rewarm().args(["wake", name]).fails(1);
    output.says(&["wake needs a replica that is paused, but", "is ready"]);
    // Stopped while paused, it may still handle the signal.
    world.rewarm().args(["pause", name]).ok();
    printed(&replica.stop(), "is stopped: it ended with code 7");
    world.finish();
}

/// It stands still: it computes nothing, and what it is asked it answers when it is awake.
#[test]
fn a_request_to_a_paused_server_waits_until_it_is_woken() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let with_device = devices.server(16);
    for server in [Server::plain(), with_device] {
        let name = world.name(server.name);
        let output = devices.seen_by(world.run_call(&name, &server, &[])).ok();
        let replica = Replica::of_run(&world, name, server.port, &output);
        let (before, port) = (answers(&replica, &server), replica.port());
        let pid = replica.entry().and_then(|entry| entry["pid"].as_u64()).expect("it is listed");
        // One that would compute without an end.
        let started = replica.sh("sh -c 'while :; do :; done' </dev/null >/dev/null 2>&1 & echo $!");
        let spinning = outside(pid, started.parse().expect("a number"));
        let ticked = ticks(spinning);
        world.await_state("it computes", Duration::from_secs(20), || ticks(spinning) > ticked);
        world.rewarm().args(["pause", replica.name()]).ok();
        let ticked = ticks(spinning);
        let question = &server.questions[0];
        std::thread::scope(|scope| {
            let asked =
                scope.spawn(|| request(port, question.method, &question.path, question.body.as_deref()));
            std::thread::sleep(Duration::from_millis(700));
            assert!(!asked.is_finished(), "{}: it answered while it was paused", server.name);
            assert_eq!(ticks(spinning), ticked, "{}: it computed while it was paused", server.name);
            world.rewarm().args(["wake", replica.name()]).ok();
            let answer = asked.join().expect("no panic").expect("it is answered in the end");
            assert_eq!(answer.status, 200, "{}", answer.text());
        });
        world.await_state("it goes on", Duration::from_secs(20), || ticks(spinning) > ticked);
        server_answers_as_before(&replica, &server, &before);
        replica.remove();
    }
    world.finish();
}

/// The number on this machine of a process that has the number `inside` in the namespace of process `init`.
fn outside(init: u64, inside: u64) -> u64 {
    let namespace = |pid: u64| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let numbers = |pid: u64| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_whitespace().next_back()?.parse::<u64>().ok()
    };
    let wanted = namespace(init);
    let all = std::fs::read_dir("/proc").expect("the kernel's").flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    pids.find(|pid| namespace(*pid) == wanted && numbers(*pid) == Some(inside)).expect("it runs")
}

/// Processor time of a process so far, in ticks (`utime` and `stime`, fields 14 and 15 of proc_pid_stat(5)).
fn ticks(pid: u64) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let rest = stat.rsplit(')').next().expect("its name ends");
    rest.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
}

#[test]
fn a_pause_goes_on_when_its_command_is_killed_and_excludes_others() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    // Long enough that others come while it lasts.
    devices.control("checkpoint rate 12");
    let running = world.rewarm().args(["pause", replica.name()]).spawn();
    world.await_state("the pause begins", Duration::from_secs(10), || {
        let output = world.rewarm().args(["wake", replica.name()]).run();
        output.stderr.contains("is busy: pause")
    });
    running.signal(Signal::SIGKILL);
    let _ = running.wait();
    world.await_state("the replica is paused", Duration::from_secs(20), || {
        replica.entry().is_some_and(|entry| entry["status"] == "paused")
    });
    assert_eq!(devices.used_mib(0), 0);
    world.rewarm().args(["wake", replica.name()]).ok();
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}

#[test]
fn a_wake_that_fails_leaves_the_server_paused_and_one_that_breaks_it_is_exit_6() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    world.rewarm().args(["pause", replica.name()]).ok();
    // A call that met too little memory could be the server's end: it is not made.
    devices.control("restore result 999");
    let neighbour = devices.neighbour(0, 56);
    let output = world.rewarm().args(["wake", replica.name()]).fails(1);
    output.says(&[
        "(Simulated GPU) needs 18874368 bytes of device memory free and has",
        "the driver was not called; the server stays paused and can be woken again",
    ]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    assert_eq!(replica.entry().expect("listed")["status"], "paused");
    std::fs::remove_file(neighbour).expect("remove");
    world.rewarm().args(["wake", replica.name()]).ok();
    server_answers_as_before(&replica, &server, &before);

    world.rewarm().args(["pause", replica.name()]).ok();
    devices.control("restore failed");
    let output = world.rewarm().args(["wake", replica.name()]).fails(6);
    output.says(&["is left failed", "rewarm stop NAME"]);
    devices.control("");
    printed(&replica.stop(), "is stopped: it ended with signal SIGKILL");
    assert_eq!(devices.used_mib(0), 0);
    world.finish();
}

/// What is frozen dies at once under cgroup v2, and under v1 when it is thawed.
#[test]
fn a_server_that_is_killed_while_it_is_paused_is_told_of_by_a_wake_and_leaves_nothing() {
    for alone_on_v2 in [false, true] {
        let Some((world, devices)) = world_with(&[64]) else { return };
        let world = if alone_on_v2 { world.on_cgroup_v2() } else { world };
        for server in [devices.server(16), Server::plain()] {
            let traces = world.traces();
            let replica = start(&world, &devices, server.name, &server);
            let status = || replica.entry().expect("it is listed")["status"].clone();
            let limit = Duration::from_secs(20);
            world.rewarm().args(["pause", replica.name()]).ok();
            let pid = replica.entry().and_then(|entry| entry["pid"].as_i64()).expect("it is listed");
            let pid = Pid::from_raw(i32::try_from(pid).expect("a process"));
            kill(pid, Signal::SIGKILL).expect("it is there");
            if alone_on_v2 {
                world.await_state("it has ended", limit, || status() == "exited");
            }
            let output = world.rewarm().args(["wake", replica.name()]).fails(1);
            output.says(&["is exited"]);
            world.await_state("it has ended", limit, || status() == "exited");
            assert_eq!(devices.used_mib(0), 0);
            printed(&world.rewarm().args(["wait", replica.name()]).run(), "SIGKILL");
            world.rewarm().args(["rm", replica.name()]).ok();
            no_residue(&world, &traces);
        }
        world.finish();
    }
}

/// The driver tells the same state as before.
#[test]
fn a_server_that_the_driver_will_not_restore_again_is_exit_6() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    for (rule, first) in [("restore*1 oom", 6), ("restore oom", 1)] {
        let replica = start(&world, &devices, "device", &server);
        world.rewarm().args(["pause", replica.name()]).ok();
        devices.control(rule);
        let output = world.rewarm().args(["wake", replica.name()]).fails(first);
        output.says(&["out of memory (2)"]);
        devices.control("");
        let output = world.rewarm().args(["wake", replica.name()]).fails(6);
        output.says(&[
            "is left checkpointed, and the driver will not restore it: operating system (304)",
            "rewarm stop NAME",
        ]);
        assert_eq!(replica.entry().expect("listed")["status"], "paused");
        printed(&replica.stop(), "is stopped: it ended with signal SIGKILL");
        world.rewarm().args(["rm", replica.name()]).ok();
    }
    assert_eq!(devices.used_mib(0), 0);
    world.finish();
}

/// Nothing is claimed of a server of which one process cannot go on: not by the command's words, and not by `ps` afterwards.
#[test]
fn a_server_that_a_pause_or_snapshot_stranded_shows_as_such_and_can_only_be_stopped() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let snapshot = |replica: &Replica<'_>, flags: &[&str]| world.snapshot_call(replica, "v1", flags);
    for verb in ["pause", "snapshot", "snapshot --stop"] {
        let replica = start(&world, &devices, "device", &server);
        let call = match verb {
            "pause" => world.rewarm().args([verb, replica.name()]),
            "snapshot" => snapshot(&replica, &[]),
            _ => snapshot(&replica, &["--stop"]),
        };
        devices.control("checkpoint failed");
        let output = call.fails(6);
        output.says(&["is left failed; only stopping the replica is left"]);
        assert!(!output.stderr.contains("goes on serving"), "{verb}: {output}");
        devices.control("");
        let status = || replica.entry().expect("listed")["status"].clone();
        assert_eq!(status(), "stranded", "{verb}");
        for (call, code) in [
            (world.rewarm().args(["pause", replica.name()]), 1),
            (world.rewarm().args(["wake", replica.name()]), 1),
            (snapshot(&replica, &[]), 3),
        ] {
            call.fails(code).says(&["is stranded"]);
        }
        assert_eq!(status(), "stranded", "{verb}");
        let _ = replica.stop();
        assert_eq!(devices.used_mib(0), 0, "{verb}");
        world.rewarm().args(["rm", replica.name()]).ok();
    }
    world.finish();
}

/// What waits in a pool is restored and paused: it has no device memory, and answers as soon as it has it back.
#[test]
fn a_warm_replica_of_a_pool_has_device_memory_only_while_it_serves() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let question = &server.questions[0];
    let before = source.ask(question.method, &question.path, question.body.as_deref()).expect("an answer");
    world.snapshot(&source, "v1", &[]);
    source.remove();
    // Its replicas have names of this world.
    let (name, snapshot, port) = (world.name("p"), world.reference("device", "v1"), free_port());
    let pool = format!(
        "name = '{name}'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\nmax_replicas = 1\nwarm = 1\n"
    );
    let serving = world.serve_as(&format!("[[pool]]\n{pool}"), |call| devices.seen_by(call));
    serving.await_replicas(&["paused"]);
    for round in 0..2 {
        assert_eq!(devices.used_mib(0), 0, "{round}: it waits");
        let answer =
            request(port, question.method, &question.path, question.body.as_deref()).expect("an answer");
        assert_eq!((answer.status, answer.text()), (200, before.text()), "{round}");
        // An idle one goes back soon.
        let load = Load::posting(port, "/generate", "under load");
        world.await_state("what serves has its device memory", Duration::from_secs(60), || {
            devices.used_mib(0) >= DEVICE_MIB
        });
        let seen = load.stop();
        assert_eq!((seen.wrong, seen.failures), (Vec::new(), Vec::new()), "{round}");
        serving.await_replicas(&["paused"]);
    }
    let _ = serving.end();
    world.finish();
}

/// What NVML says that the devices have is what there is: a start beyond it waits, and is not tried until something is given back.
#[test]
fn a_start_for_which_devices_have_no_memory_waits_for_it() {
    let Some((world, devices)) = world_with(&[DEVICE_MIB + DEVICE_MIB / 2]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let question = &server.questions[0];
    let before = source.ask(question.method, &question.path, question.body.as_deref()).expect("an answer");
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let (snapshot, admin) = (world.reference("device", "v1"), free_port());
    let ports = [free_port(), free_port()];
    let pool = |name: &str, port: u16| {
        format!(
            "[[pool]]\nname = '{}'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\nmax_replicas = 1\n\
             queue = {{ max = 10, deadline = '60s' }}\npolicy = {{ kind = 'rewarm', keep_last = 0.1, keep = 0.1 }}\n",
            world.name(name)
        )
    };
    let (first, second) = (pool("p", ports[0]), pool("q", ports[1]));
    let config = format!("[serve]\nadmin = '127.0.0.1:{admin}'\n{first}{second}");
    let serving = world.serve_as(&config, |call| devices.seen_by(call));
    // Its body never comes, so the replica that is restored for it stays.
    let mut client = TcpStream::connect(("127.0.0.1", ports[0])).expect("it listens");
    client.write_all(b"POST /generate HTTP/1.1\r\nhost: p\r\ncontent-length: 5\r\n\r\n").expect("it is sent");
    serving.await_replicas(&["ready"]);
    let (method, path, body) = (question.method, question.path.clone(), question.body.clone());
    let asked =
        std::thread::spawn(move || request(ports[1], method, &path, body.as_deref()).expect("an answer"));
    let status = || get(admin, "/admin/status").expect("an answer").json()["pools"][1].clone();
    world.await_state("a start waits", Duration::from_secs(60), || status()["obstacle"].is_string());
    let waits = status();
    let obstacle = waits["obstacle"].as_str().expect("text");
    assert!(obstacle.starts_with("a start waits for memory: device memory: "), "{obstacle}");
    assert!(!asked.is_finished());
    drop(client);
    let answer = asked.join().expect("no panic");
    assert_eq!((answer.status, answer.text()), (200, before.text()));
    // Nothing was tried in vain.
    let starts = status()["starts"].as_array().cloned().expect("a list");
    assert_eq!(starts.len(), 1, "{starts:?}");
    let _ = serving.end();
    world.finish();
}

/// Nobody else would end it: the `serve` whose replica it was is gone.
#[test]
fn a_stranded_replica_of_a_pool_is_ended_when_the_pool_is_served_again() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let name = world.name("pooled");
    let output = devices.seen_by(world.run_call(&name, &server, &["--label", "rewarm.pool=p"])).ok();
    let replica = Replica::of_run(&world, name, server.port, &output);
    devices.control("checkpoint failed");
    world.rewarm().args(["pause", replica.name()]).fails(6);
    devices.control("");
    assert_eq!(replica.entry().expect("listed")["status"], "stranded");
    let (snapshot, port) = (world.reference("device", "v1"), free_port());
    let serving = world.serve(&format!(
        "[[pool]]\nname = 'p'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\nmin_replicas = 0\nwarm = 0\n"
    ));
    world.await_state("it is ended", Duration::from_secs(60), || replica.entry().is_none());
    assert_eq!(devices.used_mib(0), 0);
    let _ = serving.end();
    world.finish();
}

#[test]
fn a_pause_that_fails_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    for (rule, text) in [
        ("checkpoint result 801", "not supported (801); the server runs on; managed memory and CUDA IPC"),
        ("lock result 600", "not ready (600); the server runs on"),
        ("checkpoint die", "the GPU helper ended during the call; the server runs on"),
    ] {
        devices.control(rule);
        world.rewarm().args(["pause", replica.name()]).fails(1).says(&[text]);
        devices.control("");
        assert_eq!(replica.entry().expect("listed")["status"], "ready", "{rule}");
        server_answers_as_before(&replica, &server, &before);
    }
    assert_eq!(devices.used_mib(0), DEVICE_MIB);
    // Paused, a server cannot answer a signal: it is ended as it stands.
    world.rewarm().args(["pause", replica.name()]).ok();
    printed(&replica.stop(), "is stopped: it ended with signal SIGKILL");
    world.finish();
}

#[test]
fn a_pause_takes_its_hook_before_and_a_wake_takes_its_own_after() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    let call = |words: &[&str]| world.rewarm().args([words[0], replica.name()]).args(&words[1..]);
    let status = || replica.entry().expect("listed")["status"].clone();
    // On its devices still, and again.
    let hook = |word: &str| format!("echo {word} >> /tmp/steps; test -e /tmp/ok");
    let (pre, post) = (hook("pre"), hook("post"));
    call(&["pause", "--pre", &pre]).fails(1).says(&["hook"]);
    assert_eq!(
        (status(), devices.used_mib(0)),
        ("ready".into(), DEVICE_MIB),
        "one that fails pauses nothing"
    );
    replica.sh("touch /tmp/ok");
    call(&["pause", "--pre", &pre]).ok();
    assert_eq!((status(), devices.used_mib(0)), ("paused".into(), 0));
    call(&["wake", "--post", &post]).ok();
    assert_eq!(replica.sh("cat /tmp/steps"), "pre\npre\npost");
    server_answers_as_before(&replica, &server, &before);
    // A pause without one asks the server nothing, and a wake whose hook fails has woken it.
    call(&["pause"]).ok();
    call(&["wake", "--post", "exit 3"]).fails(1).says(&["hook"]);
    assert_eq!(status(), "ready");
    assert_eq!(replica.sh("cat /tmp/steps"), "pre\npre\npost");
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}

#[test]
fn a_pause_waits_for_a_kernel_as_long_as_it_is_told_to() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    let pause = |limit: &str| world.rewarm().args(["pause", replica.name(), "--lock-timeout", limit]);
    let kernel = |ms: &str| {
        let asked = replica.ask("POST", &format!("/kernel?{ms}"), None).expect("it answers");
        assert_eq!(asked.status, 200);
    };
    // Its helper attaches before, so that nothing but the kernel is waited for.
    pause("5s").ok();
    world.rewarm().args(["wake", replica.name()]).ok();
    kernel("60000");
    let began = std::time::Instant::now();
    pause("300ms").fails(1).says(&["lock of process", "not ready (600); the server runs on"]);
    assert!(began.elapsed() < Duration::from_secs(9), "it waited {:?}, as without the flag", began.elapsed());
    assert_eq!(replica.entry().expect("listed")["status"], "ready");
    replica.remove();
    let replica = start(&world, &devices, "device", &server);
    let pause = |limit: &str| world.rewarm().args(["pause", replica.name(), "--lock-timeout", limit]);
    assert_eq!(replica.ask("POST", "/kernel?13000", None).expect("it answers").status, 200);
    // Longer than a pause waits that is told nothing.
    pause("30s").ok();
    world.rewarm().args(["wake", replica.name()]).ok();
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}
