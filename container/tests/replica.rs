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
