//! Scaling up and down under load: nothing that is in flight is ever cut off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::{descriptors, free_port};

use super::{config, goes_on, pool_world};

/// How long the number of replicas changes, where `make soak` does not say how often.
const TIME: Duration = Duration::from_secs(15);
/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Descriptors that differ by chance: five or six for each replica that waits at the end and not at the beginning. One for each of
/// those that came and went meanwhile would be far more.
const SPARE: usize = 16;

#[test]
fn random_scaling_under_load_cuts_nothing_off() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let file = |replicas: u32| {
        let policy = format!("policy = {{ kind = 'fixed', replicas = {replicas} }}\n");
        config(&world, port, &format!("concurrency = 2\nmax_replicas = 4\nwarm = 2\n{policy}"))
    };
    let serving = world.serve(&file(1));
    // How many wait beside the one that serves depends on what came before.
    let settled = || {
        let statuses: Vec<String> = serving.replicas().into_iter().map(|(_, status)| status).collect();
        let ready = statuses.iter().filter(|status| *status == "ready").count();
        ready == 1 && statuses.iter().filter(|status| *status == "paused").count() == statuses.len() - 1
    };
    world.await_state("one serves and the others wait", PATIENCE, settled);
    let open = || descriptors(serving.running().pid()) + descriptors(serving.gateway());
    let before = open();
    let (over, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let (over, answers) = (over.clone(), answers.clone());
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let path = match number % 3 {
                        0 => "/stream?n=5&ms=30",
                        1 => "/sleep?ms=70",
                        _ => "/check",
                    };
                    let answer = http::get(port, path).expect("an answer that is whole");
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let began = Instant::now();
    let mut moves = 0_u32;
    while goes_on(began, moves, "REWARM_SOAK_SCALINGS", TIME) {
        // A sequence without a pattern that scaling could follow.
        moves += 1;
        world.configure(&file(1 + moves.wrapping_mul(2_654_435_761).rotate_left(7) % 4));
        serving.running().signal(Signal::SIGHUP);
        std::thread::sleep(Duration::from_millis(400));
    }
    over.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().expect("every answer was good"));
    assert!(answers.load(Ordering::Relaxed) > 50 && moves > 5);
    world.configure(&file(1));
    serving.running().signal(Signal::SIGHUP);
    world.await_state("one serves and the others wait", PATIENCE, settled);
    world.await_state("no more descriptors than before", PATIENCE, || open() <= before + SPARE);
    serving.end();
    world.finish();
}
