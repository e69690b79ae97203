//! Stores that are slow, stand still, fail, refuse and change what they hold, while a replica is restored from them.

use std::time::Duration;

use rewarm_integration_tests::checks::{no_residue, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, Slow, World};

use super::filling::{LARGE_MIB, MIB, answers_of, await_crash, await_present, entry, far, lazily};

/// Does something to the store while nothing of it arrives, and ends the answers that are under way: what is missing must
/// be asked for again.
fn meanwhile(slow: &Slow, change: impl FnOnce()) {
    slow.stall(true);
    change();
    slow.cut_after(1);
    slow.stall(false);
    std::thread::sleep(Duration::from_secs(1));
    slow.cut_after(0);
    slow.throttle(0);
}

/// Removes the snapshot and collects garbage, not by the slow way.
fn collect(world: &World, server: &Server, flags: &[&str]) {
    let call = || {
        world.garage().env().into_iter().fold(world.rewarm(), |call, (name, value)| call.env(&name, value))
    };
    call().args(["rm", &world.reference(server.name, "v1")]).ok();
    for _ in 0..2 {
        call().args(["gc", world.store()]).args(flags).ok();
    }
}

/// What a store is slow at for a while must not be taken for one that brings nothing.
#[test]
fn a_store_at_50_kb_a_second_is_waited_for() {
    let server = Server::memory_of(16);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(50_000);
    let call = world.restore_call(server.name, "v1", server.port, &["--mode", "lazy"]);
    let running = call.env("REWARM_STORE_PATIENCE", "2s").spawn();
    std::thread::sleep(Duration::from_secs(10));
    slow.throttle(0);
    let output = running.wait();
    output.expect_code(0);
    let replica = Replica::of_restore(&world, server.port, &output).remove(0);
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    world.finish();
}

/// Longer than a connection may be silent: requests are given up and made again.
#[test]
fn a_store_that_stalls_for_30_s_is_waited_for() {
    let server = Server::memory_of(64);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(2 * MIB);
    let replica = lazily(&world, &server, "2m");
    slow.stall(true);
    std::thread::sleep(Duration::from_secs(35));
    assert_eq!(entry(&replica)["memory"], "filling");
    slow.throttle(0);
    slow.stall(false);
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    world.finish();
}

#[test]
fn a_store_that_fails_every_third_request_costs_time_only() {
    let server = Server::memory_of(64);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.fail_every(3);
    for mode in ["lazy", "eager"] {
        let flags = ["--mode", mode, "--name", &world.name(mode)];
        let replica = world.restore(server.name, "v1", server.port, &flags).remove(0);
        server_answers_as_before(&replica, &server, &before);
        await_present(&world, &replica);
        replica.remove();
        world.await_no_services();
    }
    assert!(slow.failed() > 3, "{} requests were not answered", slow.failed());
    world.finish();
}

#[test]
fn credentials_that_expire_in_the_middle_end_what_is_being_filled_with_the_reason() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "2s");
    assert_eq!(entry(&replica)["memory"], "filling");
    meanwhile(&slow, || world.garage().let_read(false));
    let reason = await_crash(&world, &replica);
    assert!(reason.contains(world.id()), "the store is not named: {reason}");
    assert!(reason.contains("denied") || reason.contains("403"), "{reason}");
    world.garage().let_read(true);
    world.finish();
}

#[test]
fn credentials_that_come_back_in_time_cost_time_only() {
    let server = Server::memory_of(96);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    meanwhile(&slow, || world.garage().let_read(false));
    std::thread::sleep(Duration::from_secs(2));
    world.garage().let_read(true);
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    world.finish();
}

/// Within its grace time gc removes nothing that a restore may still read.
#[test]
fn gc_leaves_alone_what_a_restore_reads() {
    let server = Server::memory_of(96);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    meanwhile(&slow, || collect(&world, &server, &[]));
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    world.finish();
}

/// Who says that nobody restores must be right; where he is not, no wrong byte is read.
#[test]
fn gc_without_grace_ends_what_is_being_filled_with_the_reason() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    meanwhile(&slow, || collect(&world, &server, &["--grace", "0s"]));
    let reason = await_crash(&world, &replica);
    assert!(reason.contains("damaged"), "{reason}");
    world.finish();
}

/// A pack that is damaged is found when its turn comes: before the replica is ready, or after.
#[test]
fn content_that_changes_on_its_way_reaches_no_process() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    assert_eq!(entry(&replica)["memory"], "filling");
    slow.flip(true);
    slow.throttle(0);
    let reason = await_crash(&world, &replica);
    assert!(reason.contains("damaged"), "{reason}");
    replica.remove();
    world.await_no_services();
    let traces = world.traces();
    for mode in ["lazy", "eager"] {
        let flags = ["--mode", mode, "--name", &world.name(mode)];
        world.restore_call(server.name, "v1", server.port, &flags).fails(5).says(&["damaged", world.id()]);
        no_residue(&world, &traces);
    }
    world.finish();
}
