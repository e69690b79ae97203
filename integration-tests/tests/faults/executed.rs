//! Programs that become other programs (`execve`) while their memory is being filled: userfaultfd tells nobody of it.

use rewarm_integration_tests::checks::answers;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};

use super::filling::{LARGE_MIB, MIB, TOLD_MAX, await_present, entry, far, lazily, nothing_fills};

/// Sends a request without a body that must be answered.
fn post(replica: &Replica<'_>, path: &str) {
    let response = replica.ask("POST", path, None).unwrap_or_else(|error| panic!("POST {path}: {error}"));
    assert_eq!(response.status, 200, "POST {path}: {}", response.text());
}

/// Waits until the second program listens.
fn await_second(world: &World, replica: &Replica<'_>) {
    world.await_state("the second program listens", TOLD_MAX, || {
        let response = replica.ask("GET", "/program", None);
        response.is_ok_and(|response| response.status == 200 && response.json()["program"] == 2)
    });
}

/// A child becomes another program, then the server itself does; a second child goes on with the memory of the first one.
#[test]
fn programs_that_become_others_while_they_are_filled_hold_what_they_made() {
    let server = Server::becoming(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    post(&replica, "/start");
    post(&replica, "/become");
    await_second(&world, &replica);
    // What the child that stays lacks is still on its way.
    assert_eq!(entry(&replica)["memory"], "filling");
    slow.throttle(0);
    let _ = answers(&replica, &server);
    await_present(&world, &replica);
    nothing_fills(&world);
    let _ = answers(&replica, &server);
    world.finish();
}

/// Nobody is left who has the memory of the first program, so nobody waits for what is missing of it.
#[test]
fn a_server_that_becomes_another_program_alone_is_not_filled_any_more() {
    let server = Server::becoming(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    post(&replica, "/become?alone=1");
    await_second(&world, &replica);
    // All of it would take ten times as long as is waited for here.
    slow.throttle(MIB / 2);
    await_present(&world, &replica);
    nothing_fills(&world);
    let _ = answers(&replica, &server);
    slow.throttle(0);
    world.finish();
}
