//! Whatever goes wrong: a subject ends right or is killed, and never sees a wrong page.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::Signal;
use rewarm_restore::pager::{Heard, Report};

use crate::layout::Random;
use crate::source::Fault;
use crate::world::{Scene, World, seed};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("endings::the_pager_is_killed_at_any_moment", the_pager_is_killed_at_any_moment),
        Trial::test("endings::the_pager_and_its_guard_are_killed", the_pager_and_its_guard_are_killed),
        Trial::test("endings::the_shim_leaves", the_shim_leaves),
        Trial::test("endings::the_source_misbehaves", the_source_misbehaves),
    ]
}

fn rounds() -> u64 {
    std::env::var("REWARM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// A scene that takes some tens of milliseconds to fill.
fn scene() -> Scene {
    let mut scene = Scene::new(seed());
    (scene.manner.delay_us, scene.manner.chunk) = (2_000, 128 << 10);
    scene
}

/// Right, or gone by SIGKILL.
fn right_or_gone(world: &mut World, seed: u64) -> Result<(), Failed> {
    let status = world.end_of_subject();
    if status.success() || status.signal() == Some(Signal::SIGKILL as i32) {
        return Ok(());
    }
    Err(format!("seed {seed} (repeat with REWARM_SEED): subject ended with {status}").into())
}

fn kill_somewhere(guard_too: bool) -> Result<(), Failed> {
    let mut gone = 0;
    for _ in 0..rounds() {
        let scene = scene();
        let mut world = World::start(&scene);
        let mut random = Random::new(scene.shape.seed);
        world.hear_until(|report| matches!(report, Report::Held { .. }));
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        let pager = world.pager.id();
        let children = std::fs::read_to_string(format!("/proc/{pager}/task/{pager}/children"));
        World::signal(pager, Signal::SIGKILL);
        if guard_too {
            for guard in children.unwrap_or_default().split_whitespace() {
                World::signal(guard.parse()?, Signal::SIGKILL);
            }
        }
        gone += u64::from(matches!(world.hear_all(), Heard::Kill { .. }));
        right_or_gone(&mut world, scene.shape.seed)?;
    }
    // Were the pager always done before it is killed, this would try nothing.
    if gone == 0 { Err("no pager was killed before it was done".into()) } else { Ok(()) }
}

fn the_pager_is_killed_at_any_moment() -> Result<(), Failed> {
    kill_somewhere(false)
}

fn the_pager_and_its_guard_are_killed() -> Result<(), Failed> {
    kill_somewhere(true)
}

fn the_shim_leaves() -> Result<(), Failed> {
    for _ in 0..rounds() {
        let scene = scene();
        let mut world = World::start(&scene);
        let mut random = Random::new(scene.shape.seed);
        world.hear_until(|report| matches!(report, Report::Held { .. }));
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        drop(world.holder.take());
        right_or_gone(&mut world, scene.shape.seed)?;
        world.end_of_pager();
    }
    Ok(())
}

fn the_source_misbehaves() -> Result<(), Failed> {
    let cases = [
        (Fault::Damaged, "chunk is damaged"),
        (Fault::Gone, "chunk cannot be fetched"),
        (Fault::Short, "bytes, "),
        (Fault::Silent, "has 0 bytes"),
        (Fault::Panics, "a bug in the source"),
        (Fault::Stalls, "did not come within"),
    ];
    for (fault, text) in cases {
        for near in [false, true] {
            if near && fault == Fault::Stalls {
                // A source that says that it is near and then stalls breaks its word, and the pager with it.
                continue;
            }
            let mut scene = scene();
            // Every page is wanted to the end, the last chunk's too.
            (scene.shape.dense, scene.operations) = (true, 0);
            scene.manner.fault = fault;
            scene.manner.near = near;
            if fault == Fault::Stalls {
                scene.chunk_within_ms = 1000;
            }
            let mut world = World::start(&scene);
            match world.hear_all() {
                Heard::Kill { chain } if chain.iter().any(|link| link.contains(text)) => {}
                other => return Err(format!("{fault:?}: {other:?}, {text:?} expected").into()),
            }
            let status = world.end_of_subject();
            if status.signal() != Some(Signal::SIGKILL as i32) {
                return Err(format!("{fault:?}: subject ended with {status}").into());
            }
            if world.end_of_pager().success() {
                return Err(format!("{fault:?}: the pager ended as if all were well").into());
            }
        }
    }
    Ok(())
}
