//! Machines that are made otherwise than most: cgroup v2 alone, a state folder that lies on an overlay.

use rewarm_integration_tests::checks::{answers, server_answers_as_before, store_verifies};
use rewarm_integration_tests::mounts::{mount, unmount};
use rewarm_integration_tests::residue;
use rewarm_integration_tests::server::Server;

use crate::world_for;

/// Every verb on a machine with cgroup v2 alone. A clone has a cgroup of its own, so that `stop` finds all of it, also when
/// the source still runs.
#[test]
fn a_machine_with_cgroup_v2_only() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let world = world.on_cgroup_v2();
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    let cgroup = |replica: &rewarm_integration_tests::Replica<'_>| {
        let pid = replica.entry().expect("ps shows it")["pid"].to_string();
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no v2 in {text}"))
    };
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
        assert!(cgroup(clone).contains(clone.name()), "{}: {}", clone.name(), cgroup(clone));
    }
    // A frozen server goes on, and one that is stopped is gone.
    world.snapshot(&source, "v2", &["--stop"]);
    clones[0].remove();
    server_answers_as_before(&clones[1], &server, &before);
    assert!(
        !residue::cgroups(world.id()).iter().any(|path| path.to_string_lossy().contains(clones[0].name()))
    );
    store_verifies(&world);
    let again = world.restore("plain", "v2", server.port, &[]);
    server_answers_as_before(&again[0], &server, &before);
    // A limit that nobody would enforce is refused.
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers.contains("memory") {
        let flags = ["--memory", "1GiB"];
        world
            .run_call(&world.name("limited"), &server, &flags)
            .fails(3)
            .says(&["the cgroup controller memory"]);
    }
    world.finish();
}

/// As inside of a container: the upper layers of replicas cannot lie on another overlay, so they lie in memory.
#[test]
fn a_state_folder_on_an_overlay() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let layers = world.root().join("layers");
    std::fs::create_dir(&layers).expect("our own folder");
    mount(&["-t", "tmpfs", "-o", "size=64m", "tmpfs"], &layers);
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(layers.join(name)).expect("our own folder");
    }
    let part = |name: &str| layers.join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", part("lower"), part("upper"), part("work"));
    mount(&["-t", "overlay", "-o", &options, "overlay"], &world.state());
    let doctor = world.rewarm_json().arg("doctor").run().json();
    let needs = doctor["needs"].as_array().cloned().unwrap_or_default();
    let state = needs.iter().find(|need| need["name"] == "state folder").expect("doctor looks at it");
    assert_eq!(state["state"], "degraded", "{state}");

    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    source.sh("echo written > /srv/note");
    world.snapshot(&source, "v1", &["--stop"]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!(clones[0].sh("cat /srv/note"), "written");
    clones[0].remove();
    source.remove();
    // The fetcher has its log there.
    world.await_no_services();
    unmount(&world.state());
    unmount(&layers);
    world.finish();
}
