//! Memory that is filled right, whatever its owner does.

use libtest_mimic::{Failed, Trial};
use rewarm_restore::pager::{Command, Heard, Mode, Report, Summary, WorkingSet};

use crate::source::Fault;
use crate::world::{PATIENCE, Scene, World, seed};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("fills::lazily_with_every_event", lazily_with_every_event),
        Trial::test("fills::lazily_from_a_near_source", lazily_from_a_near_source),
        Trial::test("fills::lazily_from_a_slow_source", lazily_from_a_slow_source),
        Trial::test("fills::a_wrong_byte_is_noticed", a_wrong_byte_is_noticed),
        Trial::test("fills::eagerly_before_the_first_instruction", eagerly_before_the_first_instruction),
        Trial::test("fills::eagerly_into_what_may_not_be_written", eagerly_into_what_may_not_be_written),
        Trial::test(
            "fills::before_the_first_instruction_in_small_pages",
            before_the_first_instruction_in_small_pages,
        ),
        Trial::test(
            "fills::a_working_set_is_recorded_and_comes_first",
            a_working_set_is_recorded_and_comes_first,
        ),
        Trial::test("fills::the_subject_runs_before_all_is_there", the_subject_runs_before_all_is_there),
        Trial::test("fills::faults_go_ahead_of_the_background", faults_go_ahead_of_the_background),
        Trial::test("fills::neighbours_of_a_fault_come_along", neighbours_of_a_fault_come_along),
    ]
}

/// How often a scene with random events is repeated; a long proof sets more.
fn rounds() -> u64 {
    std::env::var("REWARM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

fn ends_right(scene: &Scene) -> Result<(), Failed> {
    let at = format!("seed {} (repeat with REWARM_SEED)", scene.shape.seed);
    let mut world = World::start(scene);
    let heard = world.hear_all();
    let Heard::Done(summary) = heard else { return Err(format!("{at}: {heard:?}").into()) };
    let status = world.end_of_subject();
    if !status.success() {
        return Err(format!("{at}: subject ended with {status}, {summary:?}").into());
    }
    let status = world.end_of_pager();
    if status.success() { Ok(()) } else { Err(format!("{at}: pager ended with {status}").into()) }
}

fn lazily_with_every_event() -> Result<(), Failed> {
    (0..rounds()).try_for_each(|_| {
        let mut scene = Scene::new(seed());
        scene.manner.delay_us = 300;
        ends_right(&scene)
    })
}

fn lazily_from_a_near_source() -> Result<(), Failed> {
    (0..rounds()).try_for_each(|_| {
        let mut scene = Scene::new(seed());
        scene.manner.near = true;
        scene.manner.delay_us = 100;
        ends_right(&scene)
    })
}

fn lazily_from_a_slow_source() -> Result<(), Failed> {
    (0..rounds() / 4).try_for_each(|_| {
        let mut scene = Scene::new(seed());
        scene.manner.delay_us = 15_000;
        scene.manner.chunk = 64 << 10;
        ends_right(&scene)
    })
}

/// Were it not, the other scenes would show nothing.
fn a_wrong_byte_is_noticed() -> Result<(), Failed> {
    let mut scene = Scene::new(seed());
    (scene.shape.dense, scene.operations, scene.manner.fault) = (true, 0, Fault::Wrong);
    match ends_right(&scene) {
        Err(error) if error.message().is_some_and(|text| text.contains("subject ended with")) => Ok(()),
        other => Err(format!("{other:?}: a wrong byte was not noticed").into()),
    }
}

fn eagerly_before_the_first_instruction() -> Result<(), Failed> {
    eagerly(&full())
}

/// What the plan calls writable is not when it comes to be written from outside.
fn eagerly_into_what_may_not_be_written() -> Result<(), Failed> {
    eagerly(&Scene { protected: 500, ..full() })
}

/// As what has holes, and as where huge pages are slow to get.
fn before_the_first_instruction_in_small_pages() -> Result<(), Failed> {
    eagerly(&Scene::new(seed()))
}

/// Memory that is taken out of the userfaultfd before it is written.
fn full() -> Scene {
    let mut scene = Scene::new(seed());
    scene.shape.dense = true;
    scene
}

fn eagerly(scene: &Scene) -> Result<(), Failed> {
    let summary = stopped(&Scene { mode: Mode::Eager, ..scene.clone() })?;
    if summary.eager_bytes == 0 || summary.background_bytes != 0 {
        return Err(format!("{summary:?}: all should be filled before").into());
    }
    Ok(())
}

/// Fills a subject that is stopped, and lets it go on when all is in place.
fn stopped(scene: &Scene) -> Result<Summary, Failed> {
    let mut scene = Scene { stop: true, ..scene.clone() };
    scene.shape.pages = 3000;
    let mut world = World::start(&scene);
    world.hear_until(|report| *report == Report::Finished);
    world.wait_stopped();
    world.tell(Command::Fill);
    let heard = world.hear_all();
    let Heard::Done(summary) = heard else { return Err(format!("{heard:?}").into()) };
    World::signal(world.subject.id(), nix::sys::signal::Signal::SIGCONT);
    let status = world.end_of_subject();
    if status.success() { Ok(summary) } else { Err(format!("seed {}: {status}", scene.shape.seed).into()) }
}

fn a_working_set_is_recorded_and_comes_first() -> Result<(), Failed> {
    let mut scene = Scene::new(seed());
    (scene.shape.dense, scene.shape.pages) = (true, 4000);
    (scene.mode, scene.record, scene.touch_first) = (Mode::LazyWhenTold, true, 1000);
    let (set, first) = run_recorded(&scene)?;
    // The first 1000 pages, and the page in the middle of each of four areas that the restorer touches.
    let least = 1000 * 4096;
    if set.bytes() < least || set.bytes() > least + 6 * (64 << 10) {
        return Err(format!("{} bytes recorded for {least} touched: {set:?}", set.bytes()).into());
    }
    scene.working_set = set;
    let (_, second) = run_recorded(&scene)?;
    if second * 4 > first {
        return Err(format!("{second} faults with a working set, {first} without").into());
    }
    Ok(())
}

/// The working set and the number of faults until the subject has touched its first pages.
fn run_recorded(scene: &Scene) -> Result<(WorkingSet, u64), Failed> {
    let mut world = World::start(scene);
    world.hear_until(|report| *report == Report::Finished);
    if !scene.working_set.extents.is_empty() {
        // As a server does: the first request comes when the working set is in place.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    world.go_on();
    if world.line() != "touched" {
        return Err("the subject did not touch its first pages".into());
    }
    world.tell(Command::StopRecording);
    let Report::Recorded { set } = world.hear_until(|report| matches!(report, Report::Recorded { .. }))
    else {
        return Err("no working set".into());
    };
    let faults = set.extents.iter().map(|extent| extent.length.div_ceil(64 << 10)).sum();
    world.tell(Command::Fill);
    world.go_on();
    let heard = world.hear_all();
    let Heard::Done(_) = heard else { return Err(format!("{heard:?}").into()) };
    let status = world.end_of_subject();
    if status.success() { Ok((set, faults)) } else { Err(format!("{status}").into()) }
}

fn the_subject_runs_before_all_is_there() -> Result<(), Failed> {
    let mut scene = Scene::new(seed());
    scene.touch_first = 10;
    touched_early(scene)
}

/// What is touched is what the background fills last.
fn faults_go_ahead_of_the_background() -> Result<(), Failed> {
    let mut scene = Scene::new(seed());
    scene.touch_last = 10;
    touched_early(scene)
}

/// What the subject touches is there long before all is.
fn touched_early(mut scene: Scene) -> Result<(), Failed> {
    (scene.shape.dense, scene.shape.pages) = (true, 4000);
    // 250 chunks of 10 ms, in two threads: more than a second.
    (scene.manner.delay_us, scene.manner.chunk) = (10_000, 256 << 10);
    let mut world = World::start(&scene);
    world.hear_until(|report| *report == Report::Finished);
    let start = std::time::Instant::now();
    world.go_on();
    if world.line() != "touched" {
        return Err("the subject did not touch its pages".into());
    }
    let touched = start.elapsed();
    world.go_on();
    let heard = world.hear_all();
    let Heard::Done(summary) = heard else { return Err(format!("{heard:?}").into()) };
    let present = std::time::Duration::from_micros(summary.present_us);
    assert!(present < PATIENCE);
    if touched * 4 > present {
        return Err(format!("pages after {touched:?}, all after {present:?}").into());
    }
    let status = world.end_of_subject();
    if status.success() { Ok(()) } else { Err(format!("{status}").into()) }
}

/// One fault brings its chunk: who goes on to the next page finds it there.
fn neighbours_of_a_fault_come_along() -> Result<(), Failed> {
    /// Pages of a chunk.
    const CHUNK: u64 = 64;
    /// The restorer touches one page in each of four areas. The subject may be faster than what follows the first 64 KiB
    /// of a chunk.
    const FAULTS_MAX: u64 = 4 + 8;
    let mut scene = Scene::new(seed());
    (scene.mode, scene.shape.dense, scene.shape.pages) = (Mode::LazyWhenTold, true, 4000);
    (scene.manner.chunk, scene.touch_last, scene.operations) = (CHUNK * 4096, 4 * CHUNK, 0);
    let mut world = World::start(&scene);
    world.hear_until(|report| *report == Report::Finished);
    world.go_on();
    if world.line() != "touched" {
        return Err("the subject did not touch its pages".into());
    }
    world.tell(Command::Fill);
    // It waits until all is in place: nothing else faults.
    let heard = world.hear_all();
    let Heard::Done(summary) = heard else { return Err(format!("{heard:?}").into()) };
    let chunks = scene.touch_last / CHUNK;
    if summary.faults < chunks || summary.faults > FAULTS_MAX + chunks {
        return Err(format!("{} faults for {chunks} chunks: {summary:?}", summary.faults).into());
    }
    // Four chunks that the restorer touched, and those of the subject.
    if summary.fault_bytes != (4 + chunks) * CHUNK * 4096 {
        return Err(format!("{} bytes came by faults: {summary:?}", summary.fault_bytes).into());
    }
    world.go_on();
    let status = world.end_of_subject();
    if status.success() { Ok(()) } else { Err(format!("{status}").into()) }
}
