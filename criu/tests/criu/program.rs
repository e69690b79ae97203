//! The program itself: its cache of kernel features, what its images say, and what admission makes of them.

use std::fs;

use rewarm_criu::admission::{self, Allowed, Capabilities, Violation};
use rewarm_criu::image::core::SeccompMode;
use rewarm_criu::image::files;
use rewarm_criu::kdat::{self, Outcome};

use crate::needs;
use crate::world::World;

#[test]
fn the_feature_cache_is_made_once_and_used() {
    let Some(criu) = needs::criu() else { return };
    let first = kdat::ensure(&criu).expect("a cache");
    let second = kdat::ensure(&criu).expect("a cache");
    match first {
        Outcome::ByCriu => assert_eq!(second, Outcome::ByCriu),
        Outcome::Kept | Outcome::Made => assert_eq!(second, Outcome::Kept),
    }
    let mut world = World::start(criu);
    world.dump();
    let log = fs::read_to_string(world.work().join("dump.log")).expect("a log");
    assert!(first == Outcome::ByCriu || log.contains("Loaded kdat cache from /run/criu.kdat"), "not loaded");
}

#[test]
fn the_files_that_must_be_there_are_listed() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().display();
    world.run(&format!("log = open('{path}/log', 'wb', 0); log.write(b'x' * 4097)"));
    world.run(&format!(
        "import os; gone = open('{path}/gone', 'w+b', 0); gone.write(b'y' * 5000); os.unlink('{path}/gone')"
    ));
    world.dump();
    let images = world.images();
    let listed = admission::host_files(&images).expect("files");
    let log = listed.iter().find(|file| file.path.ends_with("/log")).expect("the log");
    assert_eq!((log.bytes, log.mapped, log.writable, log.build_id.as_deref()), (4097, false, true, None));
    assert!(!listed.iter().any(|file| file.path.contains("/gone")), "{listed:#?}");
    let python = listed.iter().find(|file| file.path.contains("/python3")).expect("the program");
    let program = fs::read(&python.path).expect("the program");
    assert_eq!(python.bytes, program.len() as u64);
    assert!(python.mapped && !python.writable);
    let libc = listed.iter().find(|file| file.path.contains("/libc.so")).expect("the C library");
    for file in [python, libc] {
        let build_id = file.build_id.as_ref().expect("a build id");
        let bytes: Vec<u8> = (0..build_id.len())
            .step_by(2)
            .filter_map(|at| u8::from_str_radix(&build_id[at..at + 2], 16).ok())
            .collect();
        let content = fs::read(&file.path).expect("a file");
        assert!(bytes.len() >= 8 && content.windows(bytes.len()).any(|window| window == bytes), "{build_id}");
    }
    let ghosts = files::ghosts(&images).expect("ghosts");
    assert_eq!(ghosts.len(), 1, "{ghosts:?}");
    world.restore();
    assert_eq!(world.run("gone.seek(0), len(gone.read())"), "(0, 5000)");
}

/// What a process of the test itself has: everything.
fn everything() -> Allowed {
    let all = u64::MAX;
    Allowed {
        identity: admission::Identity::default(),
        capabilities: Capabilities {
            inheritable: all,
            permitted: all,
            effective: all,
            bounding: all,
            ambient: all,
        },
        no_new_privs: false,
        seccomp: SeccompMode::Disabled,
        denied_syscalls: Vec::new(),
        mounts: Vec::new(),
        own_namespaces: Vec::new(),
        oom_score_adj_min: -1000,
        devices: vec!["/dev/null".to_owned()],
    }
}

#[test]
fn images_are_refused_where_they_want_more_than_is_granted() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.dump();
    let images = world.images();
    let found = admission::check(&images, &everything()).expect("readable");
    assert_eq!(found, [], "granted everything");

    let mut allowed = everything();
    allowed.capabilities.effective = 0;
    allowed.no_new_privs = true;
    allowed.seccomp = SeccompMode::Filter;
    allowed.oom_score_adj_min = 1000;
    allowed.devices.clear();
    allowed.own_namespaces = vec![admission::Namespace::Net, admission::Namespace::Mount];
    let found = admission::check(&images, &allowed).expect("readable");
    let tid = world.pid();
    for expected in [
        Violation::NewPrivileges { tid },
        Violation::Seccomp { tid },
        Violation::HostNamespace { pid: tid, kind: "network" },
        Violation::HostNamespace { pid: tid, kind: "mount" },
        Violation::Device { path: "/dev/null".to_owned() },
    ] {
        assert!(found.contains(&expected), "{expected} is not in {found:#?}");
    }
    assert!(
        found.iter().any(|violation| matches!(violation, Violation::Capabilities { set: "effective", .. }))
    );
    assert!(found.iter().any(|violation| matches!(violation, Violation::OomScore { .. })));

    fs::write(images.join("reg-files.img"), b"").expect("a file of CRIU's first versions");
    let found = admission::check(&images, &everything()).expect("readable");
    assert_eq!(found, [Violation::UnknownImage { name: "reg-files.img".to_owned() }]);
}

#[test]
fn filters_of_system_calls_are_run_and_not_only_counted() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    // ENOSYS for io_uring_setup (425), everything else allowed.
    world.run(
        "import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = b''.join(struct.pack('HBBI', *line) for line in [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x50026), (6, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(code)
program = struct.pack('HxxxxxxQ', 4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program) == 0",
    );
    world.dump();
    let images = world.images();
    let mut allowed = everything();
    allowed.no_new_privs = true;
    allowed.seccomp = SeccompMode::Filter;
    allowed.denied_syscalls = vec![425];
    assert_eq!(admission::check(&images, &allowed).expect("readable"), []);
    allowed.denied_syscalls = vec![425, 426];
    let found = admission::check(&images, &allowed).expect("readable");
    assert_eq!(found, [Violation::Syscall { tid: world.pid(), syscall: 426 }]);
    world.restore();
    assert_eq!(world.run("libc.syscall(425, 1, None), ctypes.get_errno()"), "(-1, 38)");
}

#[test]
fn a_filter_for_all_threads_counts_for_each_of_them() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    // runc installs its filter so: seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC).
    world.run(
        "import ctypes, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
stop = threading.Event()
threading.Thread(target=stop.wait, daemon=True).start()
code = b''.join(struct.pack('HBBI', *line) for line in [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x50026), (6, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(code)
program = struct.pack('HxxxxxxQ', 4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.syscall(317, 1, 1, program) == 0",
    );
    world.dump();
    let mut allowed = everything();
    allowed.seccomp = SeccompMode::Filter;
    allowed.denied_syscalls = vec![425];
    assert_eq!(admission::check(&world.images(), &allowed).expect("readable"), []);
    world.restore();
    let modes = world.run(
        "[open(f'/proc/self/task/{tid}/status').read().split('Seccomp:')[1].split()[0] for tid in __import__('os').listdir('/proc/self/task')]",
    );
    assert_eq!(modes, "['2', '2']");
}
