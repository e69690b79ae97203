//! Scaling up and down under load: nothing that is in flight is ever cut off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;

use super::{config, goes_on, pool_world};

/// How long the number of replicas changes, where `make soak` does not say how often.
const TIME: Duration = Duration::from_secs(15);

#[test]
fn random_scaling_under_load_cuts_nothing_off() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let file = |replicas: u32| {
        let policy = format!("policy = {{ kind = 'fixed', replicas = {replicas} }}\n");
        config(&world, port, &format!("concurrency = 2\nmax_replicas = 4\nwarm = 2\n{policy}"))
    };
    let serving = world.serve(&file(1));
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
    serving.end();
    world.finish();
}
