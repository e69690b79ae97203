//! GPUs of another kind than at the snapshot, and tags that have a variant for each.

use rewarm_gpu_sim::device::NAME;
use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};

use super::{start, world_with};

const OTHER: &str = "Simulated GPU of another kind";

#[test]
fn a_gpu_of_another_kind_is_refused_before_data_move() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let restore = |flags: &[&str]| {
        let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call.args(flags))
    };
    // Content that is asked for would be missing.
    let (packs, away) = (world.store_folder().join("packs"), world.store_folder().join("away"));
    std::fs::rename(&packs, &away).expect("our own folder");
    devices.replace(0, 0xe0, OTHER);
    devices.control("restore result 999");
    for flags in [&[][..], &["--gpu", "auto"]] {
        restore(flags).fails(3).says(&[&format!(
            "nothing here takes the place of GPU-00000000-0000-0000-0000-0000000000d0 ({NAME}, {} bytes)",
            64 << 20
        )]);
    }
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    no_residue(&world, &traces);
    devices.control("");
    std::fs::rename(&away, &packs).expect("our own folder");
    // Another one of the same kind.
    devices.replace(0, 0xe0, NAME);
    let clones = Replica::of_restore(&world, server.port, &restore(&[]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_tag_keeps_a_variant_for_each_kind_of_gpu() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let mut known = Vec::new();
    for (kind, uuid, seed) in [(NAME, 0xd0, "1"), (OTHER, 0xe0, "2")] {
        devices.replace(0, uuid, kind);
        let mut server = devices.server(16);
        server.command.extend(["--seed", seed].map(str::to_owned));
        let source = start(&world, &devices, &format!("seed-{seed}"), &server);
        let before = answers(&source, &server);
        let reference = world.reference("device", "v1");
        world.rewarm_json().args(["snapshot", source.name(), &reference]).ok();
        source.remove();
        known.push((kind, uuid, server, before));
    }
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    assert_eq!(inspected["variants"].as_array().map(Vec::len), Some(2), "{inspected}");
    // The older one too is found where it fits.
    for (kind, uuid, server, before) in &known {
        devices.replace(0, *uuid, kind);
        let call = devices.seen_by(world.restore_call("device", "v1", server.port, &[]));
        let clones = Replica::of_restore(&world, server.port, &call.ok());
        server_answers_as_before(&clones[0], server, before);
        clones[0].remove();
    }
    devices.replace(0, 0xf0, "Simulated GPU of a third kind");
    let call = devices.seen_by(world.restore_call("device", "v1", known[0].2.port, &[]));
    call.fails(3).says(&["nothing here takes the place of"]);
    world.finish();
}
