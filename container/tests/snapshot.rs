//! Dump and restore through the shim with real CRIU and images in local files.

#[path = "support/world.rs"]
mod world;

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_container::shim::{Client, DumpRequest, ResidentRequest, RestoreRequest};
use rewarm_container::tree::{self, Applier, Tree};
use rewarm_container::{Cause, Error, Origin, Spec, Status};
use world::{World, criu, needs, program, wait_for};

const CONFIG: &str = "network-lock skip\nmanage-cgroups=ignore\nghost-limit 1G\n";

/// A world in which a server can be dumped; nothing where something is missing for it.
fn world_of_dumps() -> Option<World> {
    needs(&["root", "runc", "criu"]).then(World::new)
}

fn dump_request(config: &str) -> DumpRequest {
    DumpRequest {
        criu: criu().expect("looked at before"),
        config: config.into(),
        tcp_established: true,
        file_locks: true,
        timeout_ms: 30_000,
        real_ids: None,
    }
}

fn restore_request() -> RestoreRequest {
    RestoreRequest {
        criu: criu().expect("looked at before"),
        config: CONFIG.into(),
        tcp_established: true,
        file_locks: true,
        lazy_pages: false,
        images_attached: false,
        residents: Vec::new(),
        timeout_ms: 30_000,
        waits: false,
        unblock: Vec::new(),
        device: None,
    }
}

fn restored() -> Origin {
    Origin::Restored { source: "test".into() }
}

/// What a snapshot keeps, in a directory.
struct Saved {
    images: PathBuf,
    upper: (Tree, Vec<u8>),
    shm: (Tree, Vec<u8>),
}

fn save(dir: &Path) -> (Tree, Vec<u8>) {
    let tree = tree::scan(dir).unwrap_or_else(|error| panic!("{error:?}"));
    let mut content = Vec::new();
    tree.read(dir).read_to_end(&mut content).expect("read");
    (tree, content)
}

/// Freezes, dumps to local files, copies the trees, and lets the server go on.
fn snapshot(client: &Client, to: &Path) -> Saved {
    client.freeze().expect("freeze");
    let (_ours, theirs) = UnixStream::pair().expect("pair");
    client.dump(dump_request(CONFIG), &theirs).unwrap_or_else(|error| {
        let log = std::fs::read_to_string(client.inside().dump_work().join("dump.log")).unwrap_or_default();
        panic!("{error:?}\n{}", log.lines().rev().take(20).collect::<Vec<_>>().join("\n"))
    });
    let inside = client.inside();
    let images = to.join("images");
    copy(&inside.dump_images(), &images);
    let saved = Saved { images, upper: save(&inside.upper()), shm: save(&inside.shm()) };
    client.release_dump().expect("release");
    client.thaw().expect("thaw");
    saved
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("create");
    for item in std::fs::read_dir(from).expect("read").flatten() {
        std::fs::copy(item.path(), to.join(item.file_name())).expect("copy");
    }
}

fn fill(client: &Client, saved: &Saved) {
    let inside = client.inside();
    for (dir, (tree, content)) in [(inside.upper(), &saved.upper), (inside.shm(), &saved.shm)] {
        let encoded = Tree::decode(&tree.encode()).expect("round trip");
        let applier = Applier::begin(&dir, encoded).unwrap_or_else(|error| panic!("{error:?}"));
        // The last part first.
        for (index, chunk) in content.chunks(8192).enumerate().collect::<Vec<_>>().into_iter().rev() {
            applier.put(index as u64 * 8192, chunk).expect("put");
        }
        applier.finish().unwrap_or_else(|error| panic!("{error:?}"));
    }
    copy(&saved.images, &inside.images());
}

fn restore_with(
    world: &World,
    replica: &str,
    saved: &Saved,
    request: RestoreRequest,
) -> Result<Client, Box<(Client, Error)>> {
    let client = world.prepare(replica, &world::server(), restored());
    world.remember(&client);
    fill(&client, saved);
    let socket = std::fs::File::open("/dev/null").expect("null");
    let fds = vec![socket.as_fd(); request.residents.iter().map(|resident| resident.fds).sum()];
    match client.restore(request, &fds) {
        Ok(_) => Ok(client),
        Err(error) => Err(Box::new((client, error))),
    }
}

fn restore(world: &World, replica: &str, saved: &Saved) -> Client {
    restore_with(world, replica, saved, restore_request()).unwrap_or_else(|failed| {
        let (client, error) = *failed;
        let log = std::fs::read_to_string(client.inside().work().join("restore.log")).unwrap_or_default();
        panic!("{error:?}\n{}", log.lines().rev().take(20).collect::<Vec<_>>().join("\n"))
    })
}

#[test]
fn clones_go_on_where_the_server_was_and_do_not_see_each_other() {
    let Some(world) = world_of_dumps() else { return };
    let source = world.run("source", &world::server());
    world::get(&source, "/write/file/before");
    world::get(&source, "/shm/shared-before");
    let first: u32 = world::get(&source, "/count").parse().expect("number");
    let saved = snapshot(&source, world.dir());
    world::get(&source, "/write/file/after");
    // Both at once.
    let clones = std::thread::scope(|scope| {
        let world = &world;
        let saved = &saved;
        let threads: Vec<_> =
            ["one", "two"].map(|name| scope.spawn(move || restore(world, name, saved))).into_iter().collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    for clone in &clones {
        clone.commit().expect("commit");
        assert_eq!(world::get(clone, "/read/file"), "before");
        assert_eq!(world::get(clone, "/shared"), "shm/shared-before");
        let count: u32 = world::get(clone, "/count").parse().expect("number");
        assert_eq!(count, first + 3);
    }
    world::get(&clones[0], "/shm/mine");
    world::get(&clones[0], "/write/file/mine");
    assert_eq!(world::get(&clones[1], "/read/file"), "before");
    assert_eq!(world::get(&source, "/read/file"), "after");
    assert!(world::get(&clones[1], "/shared").starts_with("shm/shared-before"));
    let uuids: std::collections::BTreeSet<_> =
        clones.iter().chain([&source]).map(|client| client.status().expect("status").uuid).collect();
    assert_eq!(uuids.len(), 3);
    for client in clones.iter().chain([&source]) {
        let exit = client.stop(Duration::from_secs(10)).expect("stop");
        assert_eq!((exit.status, exit.cause), (rewarm_container::ExitStatus::Code(7), Cause::Stopped));
        let log = std::fs::read_to_string(client.paths().stdout()).expect("log");
        assert!(log.ends_with("stopping\n"), "a restored server writes to the new log: {log}");
    }
    for client in clones.iter().chain([&source]) {
        world.only_logs_are_left(client.name().as_str());
    }
}

#[test]
fn sockets_pipes_ghosts_and_inner_connections_come_back() {
    let Some(world) = world_of_dumps() else { return };
    let source = world.run("knotted", &world::knotted());
    let answer = world::get(&source, "/");
    assert_eq!(answer, "unixheldpipeghost");
    let saved = snapshot(&source, world.dir());
    assert_eq!(world::get(&source, "/"), answer);
    source.kill("test").expect("kill");
    world.state.remove(source.name()).expect("rm");
    let clone = restore(&world, "knotted", &saved);
    clone.commit().expect("commit");
    assert_eq!(world::get(&clone, "/"), answer);
    clone.kill("test").expect("kill");
}

#[test]
fn a_dump_whose_receiver_vanishes_or_whose_time_is_up_leaves_the_server_serving() {
    let Some(world) = world_of_dumps() else { return };
    let client = world.run("serving", &world::server());
    let config = format!("{CONFIG}page-server\nps-socket {}\n", DumpRequest::SOCKET);
    // Gone before the first page.
    let (ours, theirs) = UnixStream::pair().expect("pair");
    ours.shutdown(Shutdown::Both).expect("shutdown");
    let error = client.dump(dump_request(&config), &theirs).expect_err("nobody receives");
    assert!(matches!(error, Error::Shim { .. }), "{error:?}");
    assert_eq!(world::get(&client, "/still"), "still");
    // Alive, but it never reads.
    let (_ours, theirs) = UnixStream::pair().expect("pair");
    let request = DumpRequest { timeout_ms: 700, ..dump_request(&config) };
    let error = client.dump(request, &theirs).expect_err("too late");
    assert!(error.to_string().contains("dump"), "{error}");
    assert_eq!(world::get(&client, "/still"), "still");
    // And a good one afterwards.
    snapshot(&client, world.dir());
    assert_eq!(world::get(&client, "/still"), "still");
    client.kill("test").expect("kill");
}

#[test]
fn a_dump_is_given_up_when_the_command_that_asked_is_gone() {
    let Some(world) = world_of_dumps() else { return };
    let client = world.run("leased", &world::server());
    let mut dumping = std::process::Command::new(program())
        .args([
            "dump".as_ref(),
            world.dir().as_os_str(),
            "leased".as_ref(),
            criu().expect("criu").as_os_str(),
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("command");
    // Traced: CRIU has stopped the server and waits for a receiver that does not read. (The freezer tells it only for a
    // moment: CRIU thaws the cgroup as soon as it holds the tasks by ptrace.)
    let pid = client.status().expect("status").pid.expect("pid");
    wait_for("the dump", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        (!status.contains("TracerPid:\t0\n")).then_some(())
    });
    assert!(matches!(client.freeze(), Err(Error::Shim { .. })), "a dump excludes others");
    dumping.kill().expect("kill");
    dumping.wait().expect("reap");
    // Who comes right after it waits for what the shim does, and is not refused for it.
    client.freeze().expect("the dump's end is waited for");
    client.thaw().expect("thaw");
    assert_eq!(world::get(&client, "/still"), "still");
    assert_eq!(client.status().expect("status").status, Status::Ready);
    client.kill("test").expect("kill");
    world.only_logs_are_left("leased");
}

#[test]
fn a_restore_that_fails_leaves_its_log_until_the_client_lets_go_and_then_nothing() {
    let Some(world) = world_of_dumps() else { return };
    let source = world.run("source", &world::server());
    let saved = snapshot(&source, world.dir());
    source.kill("test").expect("kill");
    world.state.remove(source.name()).expect("rm");
    std::fs::remove_file(saved.images.join("core-1.img")).expect("break it");
    let (client, error) = *restore_with(&world, "broken", &saved, restore_request()).expect_err("broken");
    let Error::Shim { source: remote, .. } = &error else { panic!("{error:?}") };
    assert!(remote.chain().concat().contains("runc restore"), "{remote:?}");
    let log = std::fs::read_to_string(client.inside().work().join("restore.log")).expect("kept");
    assert!(log.contains("Error"));
    drop(client);
    wait_for("the end of the directory", || world.entry("broken").is_none().then_some(()));
    world.nothing_is_left();
}

fn resident(behaviour: &str) -> RestoreRequest {
    let resident = ResidentRequest {
        name: "pager".into(),
        program: None,
        args: vec!["resident".into(), behaviour.into()],
        fds: 1,
        ready_timeout_ms: 5000,
    };
    RestoreRequest { residents: vec![resident], ..restore_request() }
}

#[test]
fn a_replica_dies_with_its_resident_unless_that_was_done() {
    let Some(world) = world_of_dumps() else { return };
    let source = world.run("source", &world::server());
    let saved = snapshot(&source, world.dir());
    source.kill("test").expect("kill");
    let done = restore_with(&world, "done", &saved, resident("done")).unwrap_or_else(|e| panic!("{:?}", e.1));
    done.commit().expect("commit");
    assert_eq!(world::get(&done, "/x"), "x");
    assert_eq!(done.status().expect("status").status, Status::Ready);
    done.kill("test").expect("kill");
    for (behaviour, reason) in
        [("dies-after-restored", "ended before it was done"), ("fails", "a chunk is damaged")]
    {
        let client = restore_with(&world, behaviour, &saved, resident(behaviour))
            .unwrap_or_else(|e| panic!("{:?}", e.1));
        // The resident may be quicker than the commit.
        let committed = client.commit().is_ok();
        let exit = client.wait().expect("wait");
        let Cause::Resident(text) = &exit.cause else { panic!("{exit:?}") };
        assert!(text.contains(reason), "{text}");
        drop(client);
        if committed {
            let entry = world.entry(behaviour).expect("kept");
            assert_eq!(entry.status, Status::Crashed);
            world.only_logs_are_left(behaviour);
        }
    }
    for behaviour in ["never-ready", "dies-before-restored"] {
        match restore_with(&world, behaviour, &saved, resident(behaviour)) {
            Err(failed) => assert!(matches!(failed.1, Error::Shim { .. }), "{:?}", failed.1),
            // runc may be quicker than the death is seen.
            Ok(client) => {
                let exit = client.wait().expect("wait");
                assert!(matches!(exit.cause, Cause::Resident(_)), "{exit:?}");
            }
        }
    }
}

/// A restore that was killed left the root file system bound below runc's own state, and the removal walked into it.
#[test]
fn a_restore_killed_at_any_moment_leaves_nothing_and_touches_no_volume() {
    let Some(world) = world_of_dumps() else { return };
    let volume = world.dir().join("volume");
    std::fs::create_dir_all(volume.join("deep")).expect("dirs");
    std::fs::write(volume.join("deep/file"), b"kept").expect("file");
    let mount = format!("{}:/opt/volume", volume.display()).parse().expect("mount");
    let spec = Spec { mounts: vec![mount], ..world::server() };
    let source = world.run("source", &spec);
    let saved = snapshot(&source, world.dir());
    source.kill("test").expect("kill");
    world.state.remove(source.name()).expect("rm");
    for delay_ms in [3, 12, 25, 40, 60, 90] {
        let client = world.prepare("killed", &spec, restored());
        world.remember(&client);
        fill(&client, &saved);
        std::thread::scope(|scope| {
            let restoring = scope.spawn(|| client.restore(restore_request(), &[]));
            std::thread::sleep(Duration::from_millis(delay_ms));
            let other = Client::connect(&world.state, client.name()).expect("connect");
            other.kill("test").expect("kill");
            // Too late for the kill, or cut off by it: what counts is what is left.
            let _ = restoring.join().expect("no panic");
        });
        drop(client);
        wait_for("the end of the directory", || world.entry("killed").is_none().then_some(()));
        world.nothing_is_left();
        assert_eq!(std::fs::read(volume.join("deep/file")).expect("read"), b"kept");
    }
}

#[test]
fn a_stop_kills_a_frozen_server_only_when_asked_to() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let client = world.run("stopping", &world::server());
    world.remember(&client);
    client.freeze().expect("freeze");
    assert_eq!(client.status().expect("status").status, Status::Frozen);
    let exit = client.kill("stopped by its snapshot").expect("kill");
    assert_eq!(exit.cause, Cause::Killed("stopped by its snapshot".into()));
    world.only_logs_are_left("stopping");
}

#[test]
fn a_private_network_has_loopback_only_and_none_cannot_be_dialled() {
    if !needs(&["root", "runc"]) {
        return;
    }
    let world = World::new();
    let spec = Spec { net: rewarm_container::Net::None, ..world::server() };
    let client = world.prepare("mute", &spec, Origin::Cold);
    client.start(Duration::from_secs(20)).expect("start");
    let error = client.dial(8000, Duration::from_millis(300)).expect_err("nothing is up");
    assert!(matches!(error, Error::Shim { .. }), "{error:?}");
}
