//! The program that the tests of this crate start: as a shim, as a command that is killed half way, as a resident.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rewarm_container::shim::resident::{Control, ToShim};
use rewarm_container::shim::{self, Client, DumpRequest, Prepare};
use rewarm_container::{Name, Origin, Spec, State};

#[expect(clippy::print_stdout, reason = "the test reads how far the command came")]
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[1..] {
        ["shim", "--state", state, "--name", name] => {
            shim::main(Path::new(state), &name.parse().expect("name"), None).into()
        }
        ["command", state, name, spec, step] => {
            let spec = serde_json::from_str(spec).expect("a specification");
            let _client = command(&PathBuf::from(state), &name.parse().expect("name"), spec, step);
            println!("reached {step}");
            std::thread::sleep(Duration::from_secs(60));
            ExitCode::FAILURE
        }
        ["dump", state, name, criu] => dump(Path::new(state), &name.parse().expect("name"), criu),
        ["resident", behaviour] => resident(behaviour),
        _ => ExitCode::FAILURE,
    }
}

/// Makes a replica and stops after `step`.
fn command(state: &Path, name: &Name, spec: Spec, step: &str) -> Box<dyn std::any::Any> {
    let state = State::open(state, "test").expect("state");
    let claim = state.create(name).expect("name");
    if step == "create" {
        return Box::new(claim);
    }
    let client = Client::spawn(claim, &std::env::current_exe().expect("own path")).expect("shim");
    if step == "spawn" {
        return Box::new(client);
    }
    client.prepare(Prepare { spec, origin: Origin::Cold, generation: 0, devices: false }).expect("prepare");
    if step == "prepare" {
        return Box::new(client);
    }
    client.start(Duration::from_secs(20)).expect("start");
    if step == "start" {
        return Box::new(client);
    }
    client.commit().expect("commit");
    if step == "freeze" {
        client.freeze().expect("freeze");
    }
    Box::new(client)
}

/// Dumps into a socket from which nobody reads.
fn dump(state: &Path, name: &Name, criu: &str) -> ExitCode {
    let state = State::open(state, "test").expect("state");
    let client = Client::connect(&state, name).expect("shim");
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
    let request = DumpRequest {
        criu: criu.into(),
        config: format!(
            "network-lock skip\nmanage-cgroups=ignore\npage-server\nps-socket {}\n",
            DumpRequest::SOCKET
        ),
        tcp_established: true,
        file_locks: false,
        real_ids: None,
        timeout_ms: 60_000,
    };
    let result = client.dump(request, &theirs);
    panic!("the test kills this command before {result:?}");
}

/// A pager that is none.
fn resident(behaviour: &str) -> ExitCode {
    let control = Control::inherited().expect("started by a shim");
    if behaviour == "never-ready" {
        return ExitCode::SUCCESS;
    }
    let given = Control::given(0).expect("one descriptor");
    control.tell(&ToShim::Hold, &[std::os::fd::AsFd::as_fd(&given)]).expect("hold");
    drop(given);
    control.tell(&ToShim::Ready, &[]).expect("ready");
    if behaviour == "dies-before-restored" {
        return ExitCode::SUCCESS;
    }
    let restored = control.next().expect("a message").expect("the shim lives");
    assert_eq!(restored.1.len(), 1, "a pidfd comes along");
    match behaviour {
        "dies-after-restored" => return ExitCode::SUCCESS,
        "fails" => control.tell(&ToShim::Failed("a chunk is damaged".into()), &[]).expect("tell"),
        _ => control.tell(&ToShim::Done, &[]).expect("tell"),
    }
    // Ends when the shim closes its side, or at once after `Done`.
    if behaviour != "done" {
        let _ = control.next();
    }
    ExitCode::SUCCESS
}
