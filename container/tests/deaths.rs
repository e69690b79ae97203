//! What is left when the command, the shim or the server dies, and what is refused before anything starts.

#[path = "support/world.rs"]
mod world;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rewarm_container::shim::{Client, ExecRequest, Prepare};
use rewarm_container::{Cause, Error, ExitStatus, Origin, Publish, Spec, Status};
use rewarm_report::{Class, Classify};
use world::{World, needs, program, wait_for};

/// A command that made a replica up to `step` and waits to be killed.
fn command(world: &World, replica: &str, step: &str) -> Child {
    let spec = serde_json::to_string(&world::server()).expect("json");
    let mut child = Command::new(program())
        .args(["command".as_ref(), world.dir().as_os_str(), replica.as_ref(), spec.as_ref(), step.as_ref()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("command");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("read");
    assert_eq!(line.trim(), format!("reached {step}"));
    child
}

fn kill(child: &mut Child) {
    child.kill().expect("kill");
    child.wait().expect("reap");
}

#[test]
fn a_command_killed_before_commit_leaves_nothing() {
    if !needs(&["root", "runc"]) {
        return;
    }
    for step in ["create", "spawn", "prepare", "start"] {
        let world = World::new();
        let mut child = command(&world, "killed", step);
        if matches!(step, "prepare" | "start") {
            world.remember(&Client::connect(&world.state, &world::name("killed")).expect("shim"));
        }
        kill(&mut child);
        // Without a shim there is nobody but the next command.
        if step == "create" {
            world.state.sweep().expect("sweep");
        }
        wait_for("the end of the directory", || world.entry("killed").is_none().then_some(()));
        world.nothing_is_left();
    }
}

#[test]
fn a_command_killed_in_the_middle_of_starting_leaves_nothing() {
    if !needs(&["root", "runc"]) {
        return;
    }
    for delay_ms in [5, 25, 60, 100] {
        let world = World::new();
        let mut child = command(&world, "midway", "create");
        kill(&mut child);
        world.state.sweep().expect("sweep");
        let spec = serde_json::to_string(&world::server()).expect("json");
        let mut child = Command::new(program())
            .args([
                "command".as_ref(),
                world.dir().as_os_str(),
                "midway".as_ref(),
                spec.as_ref(),
                "start".as_ref(),
            ])
            .stdout(Stdio::null())
            .spawn()
            .expect("command");
        std::thread::sleep(Duration::from_millis(delay_ms));
        kill(&mut child);
        wait_for("the end of the directory", || {
            world.state.sweep().expect("sweep");
            world.entry("midway").is_none().then_some(())
        });
        world.nothing_is_left();
    }
}

#[test]
fn a_committed_replica_outlives_its_command_and_a_freeze_does_not() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let mut child = command(&world, "frozen", "freeze");
    let client = Client::connect(&world.state, &world::name("frozen")).expect("connect");
    assert_eq!(client.status().expect("status").status, Status::Frozen);
    assert!(matches!(client.thaw(), Err(Error::Shim { .. })), "another command's freeze");
    kill(&mut child);
    let request = ExecRequest { args: vec!["true".into()], ..ExecRequest::default() };
    assert_eq!(client.exec(request, None).expect("the thaw is waited for").code, 0);
    wait_for("the thaw", || (client.status().ok()?.status == Status::Ready).then_some(()));
    wait_for("an answer", || world::try_get(&client, "/x").ok());
    client.kill("test").expect("kill");
}

#[test]
fn a_killed_shim_is_swept_with_its_server() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let client = world.run("orphan", &world::server());
    world.remember(&client);
    let shim = client.pid();
    let server = client.status().expect("status").pid.expect("pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim.cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .expect("kill");
    wait_for("the crash", || (world.entry("orphan")?.status == Status::Crashed).then_some(()));
    let swept = world.state.sweep().expect("sweep");
    assert!(swept.len() == 1 && swept[0].kept);
    wait_for("the server's end", || {
        (!std::path::Path::new(&format!("/proc/{server}")).exists()).then_some(())
    });
    let entry = world.entry("orphan").expect("kept");
    assert_eq!(entry.exit.expect("exit").cause, Cause::Crashed);
    world.only_logs_are_left("orphan");
    // The name can be used again.
    let client = world.run("orphan", &world::server());
    client.kill("test").expect("kill");
}

#[test]
fn the_exit_of_a_server_is_told_as_it_was() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let shell = |text: &str| Spec { command: ["sh", "-c", text].map(Into::into).to_vec(), ..Spec::default() };
    for (replica, text, status) in [
        ("code", "sleep 0.3; exit 5", ExitStatus::Code(5)),
        // A signal without a handler does not reach the first process of a namespace from inside: a child tells it.
        ("shell", "sleep 0.3; sh -c 'kill -9 $$'", ExitStatus::Code(137)),
    ] {
        let client = world.prepare(replica, &shell(text), Origin::Cold);
        client.start(Duration::from_secs(20)).expect("start");
        client.commit().expect("commit");
        let exit = client.wait().expect("wait");
        assert_eq!((exit.status, exit.cause), (status, Cause::Ended));
    }
    let client = world.prepare("deaf", &shell("sleep 600"), Origin::Cold);
    client.start(Duration::from_secs(20)).expect("start");
    client.commit().expect("commit");
    let began = std::time::Instant::now();
    // What ending takes on a busy machine is far from what would be waited for.
    let patience = Duration::from_secs(300);
    let exit = client.stop(patience).expect("stop");
    assert_eq!((exit.status, exit.cause), (ExitStatus::Signal(9), Cause::Stopped));
    assert!(began.elapsed() < patience / 2, "a server that is deaf to SIGTERM is not waited for");
}

#[test]
fn a_server_beyond_its_memory_limit_is_told_as_such() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let eater = "x = bytearray(256 << 20)";
    let spec = Spec {
        command: ["/usr/bin/python3", "-c", eater].map(Into::into).to_vec(),
        memory_bytes: Some(64 << 20),
        ..Spec::default()
    };
    let client = world.prepare("eater", &spec, Origin::Cold);
    client.start(Duration::from_secs(20)).expect("start");
    let exit = client.wait().expect("wait");
    assert_eq!((exit.status, exit.cause), (ExitStatus::Signal(9), Cause::OutOfMemory));
}

#[test]
fn a_command_that_does_not_exist_is_named() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let spec = Spec { command: vec!["no-such-program".into()], ..Spec::default() };
    let client = world.prepare("missing", &spec, Origin::Cold);
    world.remember(&client);
    let error = client.start(Duration::from_secs(20)).expect_err("missing");
    let Error::Shim { source, .. } = &error else { panic!("{error:?}") };
    assert!(source.chain().concat().contains("no-such-program"), "{source:?}");
    drop(client);
    wait_for("the end of the directory", || world.entry("missing").is_none().then_some(()));
    world.nothing_is_left();
}

#[test]
fn names_and_ports_in_use_are_refused_before_anything_starts() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let publish: Publish = "127.0.0.1:0:8000".parse().expect("publish");
    let spec = Spec { publish: vec![publish], ..world::server() };
    let client = world.run("first", &spec);
    let taken = client.status().expect("status").published[0];
    assert_ne!(taken.host_port, 0);
    let mut stream = std::net::TcpStream::connect(taken.host()).expect("published");
    assert_eq!(world::ask(&mut stream, "/through").expect("answer"), "through");
    assert!(matches!(world.state.create(&world::name("first")), Err(Error::NameInUse { .. })));
    let claim = world.state.create(&world::name("second")).expect("free");
    let second = Client::spawn(claim, program()).expect("shim");
    let spec = Spec { publish: vec![taken], ..world::server() };
    let error = second
        .prepare(Prepare { spec, origin: Origin::Cold, generation: 0, devices: false })
        .expect_err("the port is taken");
    let Error::Shim { source, class: Class::Failed, .. } = &error else { panic!("{error:?}") };
    assert!(source.to_string().contains(&taken.host().to_string()), "{source}");
    drop(second);
    wait_for("the end of the directory", || world.entry("second").is_none().then_some(()));
    client.kill("test").expect("kill");
}

#[test]
fn what_the_machine_cannot_give_is_refused_as_incompatible() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let claim = world.state.create(&world::name("greedy")).expect("free");
    let client = Client::spawn(claim, program()).expect("shim");
    let spec = Spec { user: Some("nobody-knows-me".parse().expect("user")), ..world::server() };
    let error = client
        .prepare(Prepare { spec, origin: Origin::Cold, generation: 0, devices: false })
        .expect_err("unknown user");
    assert_eq!(error.class(), Class::Incompatible);
}

#[test]
fn a_command_inside_gets_signals_and_dies_with_its_client() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let client = world.run("inside", &world::server());
    let request = |text: &str| ExecRequest {
        args: ["sh", "-c", text].map(Into::into).to_vec(),
        ..ExecRequest::default()
    };
    let started =
        |mark: &str| wait_for("the command", || world::get(&client, mark).contains("up").then_some(()));
    let running = client
        .exec_start(request("trap 'exit 9' TERM; echo up > /var/tmp/m1; while :; do sleep 0.05; done"), None)
        .expect("exec");
    wait_for("the command", || world::try_get(&client, "/read/m1").ok().filter(|text| text.contains("up")));
    started("/read/m1");
    running.signal(15).expect("signal");
    assert_eq!(running.wait().expect("wait").code, 9);
    let late = ExecRequest { timeout_ms: Some(300), ..request("echo begun; sleep 60") };
    let output = client.exec(late, None).expect("exec");
    assert!(output.timed_out && output.stdout == "begun\n", "{output:?}");
    let files = || {
        let folder = std::fs::read_dir(client.paths().dir()).expect("it is there");
        folder.map(|entry| entry.expect("an entry").file_name()).collect::<std::collections::BTreeSet<_>>()
    };
    let before = files();
    // At any moment: runc says who the command is only some time after it has begun.
    for moment in 0..40 {
        let running = client.exec_start(request("exec sleep 61"), None).expect("exec");
        std::thread::sleep(Duration::from_millis(3 * moment));
        drop(running);
    }
    let sleeping = || {
        client
            .exec(request("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"), None)
            .ok()
            .map(|o| o.stdout)
    };
    wait_for("the end of the command", || sleeping().filter(|text| !text.contains("sleep 61")));
    // The last command's end is waited for in the same way: who asked for it has gone.
    wait_for("the files of the commands to go", || (files() == before).then_some(()));
    client.kill("test").expect("kill");
}
