//! `rewarm run --gpu`: devices and libraries that a replica is given, by a forged CDI file or as a forged machine shows them.

use std::path::Path;
use std::time::Duration;

use rewarm_gpu_sim::NODES_ENV;
use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::command::Rewarm;
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use tempfile::TempDir;

use super::world_with;

/// Real device files, in place of a GPU's.
const NODES: [&str; 2] = ["/dev/loop-control", "/dev/fuse"];

/// A CDI file that gives those devices and the driver's library, and a server that needs it.
fn cdi(devices: &Devices) -> (TempDir, Server) {
    let cdi = tempfile::tempdir().expect("a folder");
    let library = devices.libraries().join("libcuda.so.1");
    let text = serde_json::json!({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": NODES[0]}]}}],
        "containerEdits": {
            "deviceNodes": [{"path": NODES[1]}],
            "mounts": [{"hostPath": library, "containerPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.1"}],
            "env": ["REWARM_GIVEN=by-cdi"],
        },
    });
    std::fs::write(cdi.path().join("nvidia.json"), text.to_string()).expect("write");
    let mut server = devices.server(16);
    server.command[2] = "libcuda.so.1".into();
    server.env.retain(|(name, _)| name != NODES_ENV);
    server.env.push((NODES_ENV.to_owned(), NODES.join(":")));
    (cdi, server)
}

#[test]
fn a_replica_gets_devices_and_libraries_by_the_cdi_file_of_the_machine() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (cdi, server) = cdi(&devices);
    let given = |call: Rewarm| devices.seen_by(call).env("REWARM_CDI", cdi.path());
    let name = world.name("given");
    let output = given(world.run_call(&name, &server, &["--gpu", "0"])).ok();
    let source = Replica::of_run(&world, name.clone(), server.port, &output);
    let before = answers(&source, &server);
    let env = world.rewarm().args(["exec", &name, "--", "sh", "-c", "echo $REWARM_GIVEN; ls /dev"]).ok();
    assert!(env.stdout.contains("by-cdi") && env.stdout.contains("loop-control"), "{env}");
    // The devices are open, and CRIU refuses an open device: the driver has let them go for the dump.
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    let restore = || world.restore_call("given", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &given(restore()).ok());
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    // A machine that has none says so before data move.
    let empty = tempfile::tempdir().expect("a folder");
    let output = devices.seen_by(restore()).env("REWARM_CDI", empty.path()).fails(3);
    output.says(&["this machine has no GPU", "there is no CDI file in"]);
    let output = world.run_call(&world.name("none"), &server, &["--gpu", "3"]);
    given(output).fails(3).says(&["there is no GPU 3", "nvidia.json has 0"]);
    world.finish();
}

#[test]
fn the_driver_is_attached_to_when_a_replica_with_gpus_is_ready_and_not_when_it_is_paused() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (cdi, server) = cdi(&devices);
    let rule = "init wait 0";
    let given = |call: Rewarm| devices.seen_by(call).env("REWARM_CDI", cdi.path());
    let name = world.name("given");
    devices.control(rule);
    let output = given(world.run_call(&name, &server, &["--gpu", "0"])).ok();
    let replica = Replica::of_run(&world, name, server.port, &output);
    let before = answers(&replica, &server);
    devices.await_rule(&world);
    for verb in ["pause", "wake"] {
        world.rewarm().args([verb, replica.name()]).ok();
    }
    server_answers_as_before(&replica, &server, &before);
    assert_eq!(devices.met(), [rule], "once, by the helper that makes the calls");
    replica.remove();
    // Nobody knows of one that was given none.
    let server = devices.server(16);
    let replica = super::start(&world, &devices, "none", &server);
    devices.control(rule);
    let before = answers(&replica, &server);
    assert!(!devices.met_rule(), "{:?}", devices.met());
    world.rewarm().args(["pause", replica.name()]).ok();
    assert_eq!(devices.met(), [rule]);
    world.rewarm().args(["wake", replica.name()]).ok();
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}

/// It was forked without exec, and the driver does not know it.
#[test]
fn a_child_that_keeps_a_device_open_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (cdi, server) = cdi(&devices);
    let name = world.name("given");
    let call = devices.seen_by(world.run_call(&name, &server, &["--gpu", "0"]));
    let source = Replica::of_run(&world, name, server.port, &call.env("REWARM_CDI", cdi.path()).ok());
    let before = answers(&source, &server);
    // Without a pipe: whether its other end is there yet would be counted too.
    let processes = || source.sh("set -- /proc/[0-9]*; echo $#").trim().parse::<u32>().expect("a number");
    let alone = processes();
    let answer = source.ask("POST", "/fork", None).expect("it answers");
    assert_eq!(answer.status, 200, "{}", answer.text());
    world.await_state("the child lives", Duration::from_secs(20), || processes() > alone);
    // A lock would be seen.
    devices.control("lock die");
    let output = world.snapshot_call(&source, "v1", &[]).fails(3);
    output.says(&["holds /dev/loop-control and does not use CUDA itself"]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// What a folder becomes for the program that is started: `/dev` with two GPUs, what the driver says of them, its libraries (from
/// the folder `given`) in `driver`, the loader's cache. In a mount namespace of its own, so neither others nor a container see any
/// of it.
const MACHINE: &str = r#"set -e
mount -t tmpfs forged "$0/driver"
cp "$0"/given/*.so.1 "$0/driver"
printf 'include /etc/ld.so.conf\n%s\n' "$0/driver" > "$0/driver/conf"
/sbin/ldconfig -X -C "$0/driver/cache" -f "$0/driver/conf"
mount --bind "$0/driver/cache" /etc/ld.so.cache
mount -t tmpfs forged "$0/dev"
for name in null zero full random urandom tty ptmx fuse net userfaultfd; do
  if [ -d /dev/$name ]; then mkdir "$0/dev/$name"; mount --rbind /dev/$name "$0/dev/$name"
  elif [ -e /dev/$name ]; then : > "$0/dev/$name"; mount --bind /dev/$name "$0/dev/$name"; fi
done
for name in pts shm; do mkdir "$0/dev/$name"; mount --rbind /dev/$name "$0/dev/$name"; done
ln -s /proc/self/fd "$0/dev/fd"
mknod "$0/dev/nvidia0" c 10 237
mknod "$0/dev/nvidia1" c 10 237
mknod "$0/dev/nvidiactl" c 10 229
mount --move "$0/dev" /dev
mount -t tmpfs forged /proc/driver
cp -r "$0/nvidia" /proc/driver
exec "$@"
"#;

fn uuid(index: usize) -> String {
    format!("GPU-00000000-0000-0000-0000-0000000000d{index}")
}

/// A folder for [`MACHINE`], and a CDI file for the same GPUs in its folder `cdi`.
fn machine(devices: &Devices) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::os::unix::fs::symlink(devices.libraries(), at("given")).expect("a link");
    for name in ["dev", "driver", "cdi", "none"] {
        std::fs::create_dir(at(name)).expect("a folder");
    }
    for index in 0..2 {
        let gpu = at(&format!("nvidia/gpus/0000:0{index}:00.0"));
        std::fs::create_dir_all(&gpu).expect("a folder");
        let text = format!("Model: \t\t x\nGPU UUID: \t {}\nDevice Minor: \t {index}\n", uuid(index));
        std::fs::write(gpu.join("information"), text).expect("write");
    }
    let nodes = |name: &str, indices: &[usize]| {
        let path = |index: &usize| serde_json::json!({"path": format!("/dev/nvidia{index}")});
        let nodes: Vec<_> = indices.iter().map(path).collect();
        serde_json::json!({"name": name, "containerEdits": {"deviceNodes": nodes}})
    };
    let named = [("0", 0), ("1", 1), (&*uuid(0), 0), (&*uuid(1), 1)];
    let mut listed: Vec<_> = named.map(|(name, index)| nodes(name, &[index])).into();
    listed.push(nodes("all", &[0, 1]));
    let library = at("driver/libcuda.so.1");
    let text = serde_json::json!({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": listed,
        "containerEdits": {
            "deviceNodes": [{"path": "/dev/nvidiactl"}],
            "mounts": [{"hostPath": library, "containerPath": library}],
        },
    });
    std::fs::write(at("cdi/nvidia.json"), text.to_string()).expect("write");
    folder
}

/// What the call does on that machine.
fn on(machine: &Path, call: Rewarm) -> Rewarm {
    let folder = machine.display().to_string();
    call.under("unshare", &["--mount", "--propagation", "private", "sh", "-c", MACHINE, &folder])
}

#[test]
fn all_gpus_or_one_by_its_identity_arrive_with_and_without_a_cdi_file() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let machine = machine(&devices);
    let driver = machine.path().join("driver");
    let library = driver.join("libcuda.so.1").display().to_string();
    let second = uuid(1);
    let all = ["nvidia0", "nvidia1", "nvidiactl"];
    for (cdi, wanted, expected) in [
        ("cdi", "all", &all[..]),
        ("cdi", &second, &all[1..]),
        ("none", "all", &all),
        ("none", &second, &all[1..]),
    ] {
        let mut server = devices.server(16);
        server.command[2].clone_from(&library);
        server.env.retain(|(name, _)| name != NODES_ENV);
        server.env.push((NODES_ENV.to_owned(), "/dev/nvidia1:/dev/nvidiactl".to_owned()));
        let given = |call: Rewarm| {
            on(machine.path(), devices.seen_by(call).env("REWARM_CDI", machine.path().join(cdi)))
        };
        let name = world.name(&format!("{cdi}-{}", expected.len()));
        let output = given(world.run_call(&name, &server, &["--gpu", wanted])).ok();
        let source = Replica::of_run(&world, name.clone(), server.port, &output);
        let before = answers(&source, &server);
        assert_eq!(source.sh("cd /dev; ls -d nvidia*").lines().collect::<Vec<_>>(), expected, "{name}");
        // Without a CDI file: all of the driver's libraries that the loader's cache has.
        let libraries: &[&str] =
            if cdi == "none" { &["libcuda.so.1", "libnvidia-ml.so.1"] } else { &["libcuda.so.1"] };
        let found = source.sh(&format!("grep -q {library} /proc/1/maps && ls {}", driver.display()));
        assert_eq!(found.lines().collect::<Vec<_>>(), libraries, "{name}");
        if wanted != "all" {
            world.snapshot(&source, "v1", &[]);
            let flags = ["--name", &world.name("clone")];
            let call = world.restore_call(source.short(), "v1", server.port, &flags);
            let clones = Replica::of_restore(&world, server.port, &given(call).ok());
            server_answers_as_before(&clones[0], &server, &before);
            clones[0].remove();
        }
        source.remove();
    }
    let call = world.run_call(&world.name("no"), &devices.server(16), &["--gpu", &uuid(7)]);
    let call = devices.seen_by(call).env("REWARM_CDI", machine.path().join("none"));
    on(machine.path(), call).fails(3).says(&[&format!("there is no GPU {}", uuid(7)), &second]);
    world.finish();
}
