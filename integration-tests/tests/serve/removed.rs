//! A pool that leaves the file while clients wait for it.

use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::World;
use rewarm_integration_tests::http::{self, Response};
use rewarm_integration_tests::pool::{Serving, free_port};

use super::{pool, pool_world};

/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pool with one request in flight and another one held behind it, which is then removed.
struct Removed<'a> {
    serving: Serving<'a>,
    port: u16,
    in_flight: JoinHandle<Response>,
    held: JoinHandle<Response>,
}

impl<'a> Removed<'a> {
    fn begin(world: &'a World, path: &'static str) -> Self {
        let (port, admin) = (free_port(), free_port());
        let stays =
            format!("[serve]\nadmin = '127.0.0.1:{admin}'\n") + &pool(world, "q", "v1", free_port(), "");
        let limits = "concurrency = 1\nmax_replicas = 1\nmin_replicas = 1\nretry = false\n";
        let serving = world.serve(&(stays.clone() + &pool(world, "p", "v1", port, limits)));
        serving.await_replicas(&["ready"]);
        let seen = |field: &str| {
            let answer = http::get(admin, &format!("/admin/pools/{}", world.name("p"))).expect("an answer");
            answer.json()[field].as_u64().expect("a number")
        };
        let ask = |path| std::thread::spawn(move || http::get(port, path).expect("an answer"));
        let in_flight = ask(path);
        world.await_state("the first one is in flight", PATIENCE, || seen("in_flight") == 1);
        let held = ask("/check");
        world.await_state("the second one is held", PATIENCE, || seen("held") == 1);
        world.configure(&stays);
        serving.running().signal(Signal::SIGHUP);
        serving.running().await_stderr("the configuration was read again");
        Self { serving, port, in_flight, held }
    }

    fn answers(in_flight: JoinHandle<Response>, held: JoinHandle<Response>) -> [u16; 2] {
        [in_flight, held].map(|client| client.join().expect("no panic").status)
    }
}

#[test]
fn a_pool_that_leaves_the_file_answers_what_it_has_and_what_it_holds() {
    let Some(world) = pool_world() else { return };
    let Removed { serving, port, in_flight, held } = Removed::begin(&world, "/sleep?ms=2000");
    assert_eq!(Removed::answers(in_flight, held), [200, 200]);
    serving.await_replicas(&[]);
    http::get(port, "/check").expect_err("nobody listens");
    serving.end();
    world.finish();
}

#[test]
fn sigterm_waits_for_pools_that_have_left_the_file() {
    let Some(world) = pool_world() else { return };
    let Removed { serving, in_flight, held, .. } = Removed::begin(&world, "/sleep?ms=2000");
    serving.end();
    assert_eq!(Removed::answers(in_flight, held), [200, 200]);
    world.finish();
}

#[test]
fn what_is_held_in_a_pool_that_has_left_the_file_is_answered_by_another_replica_if_its_own_dies() {
    let Some(world) = pool_world() else { return };
    let Removed { serving, in_flight, held, .. } = Removed::begin(&world, "/hang");
    let server = world.rewarm_json().arg("ps").ok().json()["replicas"][0]["pid"].as_i64().expect("a process");
    let server = Pid::from_raw(i32::try_from(server).expect("a process id"));
    kill(server, Signal::SIGKILL).expect("our own process");
    assert_eq!(Removed::answers(in_flight, held), [502, 200]);
    serving.await_replicas(&[]);
    serving.end();
    world.finish();
}
