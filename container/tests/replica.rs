//! Replicas with real runc: the life of one, and what is left after each kind of death.

#[path = "support/world.rs"]
mod world;

use std::time::Duration;

use rewarm_container::shim::ExecRequest;
use rewarm_container::{Cause, ExitStatus, Status};
use world::{World, needs};

fn exec(command: &str) -> ExecRequest {
    ExecRequest { args: ["sh", "-c", command].map(Into::into).to_vec(), ..ExecRequest::default() }
}

#[test]
fn a_server_runs_answers_takes_commands_and_stops() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let client = world.run("a", &world::server());
    assert_eq!(world::get(&client, "/hello"), "hello");
    let output = client.exec(exec("echo out; echo err >&2; exit 3"), None).expect("exec");
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (3, "out\n", "err\n"));
    let identity = client.exec(exec("cat /run/rewarm/identity.json"), None).expect("exec").stdout;
    assert!(identity.contains(&client.status().expect("status").uuid.to_string()), "{identity}");
    assert_eq!(client.status().expect("status").status, Status::Ready);
    let exit = client.stop(Duration::from_secs(10)).expect("stop");
    assert_eq!((exit.status, &exit.cause), (ExitStatus::Code(7), &Cause::Stopped));
    let log = std::fs::read_to_string(client.paths().stdout()).expect("log");
    assert!(log.contains("serving") && log.contains("stopping"), "{log}");
    drop(client);
    let entry = world.entry("a").expect("kept");
    assert_eq!((entry.status, entry.exit), (Status::Exited, Some(exit)));
    world.only_logs_are_left("a");
    world.state.remove(&world::name("a")).expect("rm");
    world.nothing_is_left();
}

/// Where memory runs short the kernel may kill the server, never who watches over it.
#[test]
fn the_kernel_spares_the_shim_and_not_the_server() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let client = world.run("a", &world::server());
    let shim = client.status().expect("status").shim_pid;
    let adjustment = |of: &str| {
        let text = std::fs::read_to_string(format!("/proc/{of}/oom_score_adj")).expect("it lives");
        text.trim().to_owned()
    };
    // Only who may (CAP_SYS_RESOURCE) spares himself; others stay as they were.
    let spared = rewarm_sys::process::may_change_limits().then(|| "-999".to_owned());
    assert_eq!(adjustment(&shim.to_string()), spared.unwrap_or_else(|| adjustment("self")));
    for of in ["1", "self"] {
        let output = client.exec(exec(&format!("cat /proc/{of}/oom_score_adj")), None).expect("exec");
        assert_eq!(output.stdout.trim(), "0", "of {of} in the container");
    }
    client.stop(Duration::from_secs(10)).expect("stop");
    drop(client);
    world.state.remove(&world::name("a")).expect("rm");
    world.nothing_is_left();
}
