//! All that the workloads of the simulated driver say has the word in it: none of it was computed on a device.

use rewarm_integration_tests::Replica;

use super::{start, world_with};

/// Host memory that the server leaves alone.
const BALLAST_MIB: u64 = 64;
/// As much beside it at most.
const ASIDE_MIB: u64 = 16;
const HUGE: u64 = 2 << 20;

/// Where the first huge page within the ballast begins.
fn ballast(replica: &Replica<'_>) -> u64 {
    let pid = replica.entry().expect("it is listed")["pid"].clone();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let ballast = maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).expect("an address"));
        // Neighbours that are as private count as the same mapping.
        let fits = (BALLAST_MIB << 20..(BALLAST_MIB + ASIDE_MIB) << 20).contains(&(end - start));
        (fits && fields.next() == Some("rw-p")).then_some(start)
    });
    let first = ballast.unwrap_or_else(|| panic!("no ballast in {maps}")) + (ASIDE_MIB << 20);
    first.next_multiple_of(HUGE)
}

#[test]
fn every_answer_of_the_workloads_says_that_it_is_simulated() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let says = |replica: &Replica<'_>, method: &str, path: &str, body: &str, status: u16| {
        let answer = replica.ask(method, path, Some(body)).expect("it answers");
        let value: serde_json::Value =
            serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!((answer.status, &value["simulated"]), (status, &true.into()), "{path}: {value}");
        value
    };
    let mut rust = devices.server(16);
    rust.command.extend(["--ballast".to_owned(), BALLAST_MIB.to_string()]);
    let replica = start(&world, &devices, rust.name, &rust);
    for (method, path, status) in [
        ("GET", "/health", 200),
        ("GET", "/check", 200),
        ("GET", "/ballast", 200),
        ("POST", "/generate", 200),
        ("POST", "/kernel?1", 200),
        ("POST", "/begin", 200),
        ("POST", "/managed?4", 200),
        ("POST", "/fill?16", 200),
        ("POST", "/fork", 200),
        ("GET", "/nothing", 503),
        ("POST", "/nothing", 503),
    ] {
        says(&replica, method, path, "a prompt", status);
    }
    let handle = says(&replica, "POST", "/share", "", 200)["handle"].clone();
    says(&replica, "POST", "/open", handle.as_str().expect("digits"), 200);
    let mut from = ballast(&replica);
    // A replica has no userfaultfd; with one these are asked in gpu/tests/device/devices.rs.
    for (path, status) in [("/populated", 200), ("/huge", 200), ("/put-back", 503), ("/absent", 503)] {
        let to = from + HUGE;
        says(&replica, "POST", &format!("{path}?{from:x}-{to:x}"), "", status);
        from = to;
    }
    let said = world.rewarm().args(["logs", replica.name()]).ok().stdout;
    assert!(said.contains("simulated device memory"), "{said}");
    replica.remove();

    let python = devices.python_server();
    let replica = start(&world, &devices, python.name, &python);
    for (method, path, status) in [
        ("GET", "/healthz", 200),
        ("GET", "/check", 200),
        ("POST", "/generate", 200),
        ("POST", "/sleep", 200),
        ("POST", "/wake", 200),
        ("GET", "/nothing", 404),
    ] {
        says(&replica, method, path, "a prompt", status);
    }
    let said = world.rewarm().args(["logs", replica.name()]).ok().stdout;
    assert!(said.contains("simulated device memory"), "{said}");
    replica.remove();
    world.finish();
}
