//! All that the workloads of the simulated driver say has the word in it: none of it was computed on a device.

use super::{start, world_with};

#[test]
fn every_answer_of_the_workloads_says_that_it_is_simulated() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let rust = [
        ("GET", "/health", 200),
        ("GET", "/check", 200),
        ("GET", "/ballast", 200),
        ("POST", "/generate", 200),
        ("POST", "/kernel?1", 200),
        ("POST", "/share", 200),
        ("POST", "/managed?4", 200),
        ("POST", "/fill?16", 200),
        ("GET", "/nothing", 503),
    ];
    let python = [
        ("GET", "/healthz", 200),
        ("GET", "/check", 200),
        ("POST", "/generate", 200),
        ("POST", "/sleep", 200),
        ("POST", "/wake", 200),
        ("GET", "/nothing", 404),
    ];
    for (server, paths) in [(devices.server(16), &rust[..]), (devices.python_server(), &python)] {
        let replica = start(&world, &devices, server.name, &server);
        for (method, path, status) in paths {
            let answer = replica.ask(method, path, Some("a prompt")).expect("it answers");
            let value: serde_json::Value =
                serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}"));
            assert_eq!((answer.status, &value["simulated"]), (*status, &true.into()), "{path}: {value}");
        }
        let said = world.rewarm().args(["logs", replica.name()]).ok().stdout;
        assert!(said.contains("simulated device memory"), "{said}");
        replica.remove();
    }
    world.finish();
}
