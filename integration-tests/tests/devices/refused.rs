//! What `pause` and `snapshot` refuse by what they read of the machine and of a living server: a machine on which nothing can be
//! traced, a debugger, MPS, device files that would stay, a limit of memory.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use nix::sys::ptrace;
use nix::unistd::{Pid, gettid};
use rewarm_gpu_sim::{DEVICES_ENV, NODES_ENV};
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::{Output, Replica};

use super::{start, world_with};

/// Does `work` while a debugger, of which it is told the number, has the first thread of a process. The thread runs on.
fn traced(pid: i32, work: impl FnOnce(Pid)) {
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        scope.spawn(move || {
            ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty()).expect("nobody else has it");
            tell.send(gettid()).expect("it is waited for");
            // What it has is let go with the end of this thread.
            let _ = ended.recv();
        });
        work(told.recv().expect("it has the thread"));
        drop(end);
    });
}

/// What a pause and a snapshot of it say, both with exit 3.
fn refusals(source: &Replica<'_>) -> [Output; 2] {
    let world = source.world();
    let pause = world.rewarm().args(["pause", source.name()]).fails(3);
    [pause, world.snapshot_call(source, "v1", &[]).fails(3)]
}

#[test]
fn a_server_that_a_debugger_has_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let pid = source.entry().and_then(|entry| entry["pid"].as_i64()).expect("it is listed");
    let pid = i32::try_from(pid).expect("a process");
    // A lock would be seen.
    devices.control("lock die");
    traced(pid, |tracer| {
        for output in refusals(&source) {
            output.says(&[&format!(
                "thread {pid} of process {pid} is traced by process {tracer}; end that debugger first"
            )]);
        }
        assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
        server_answers_as_before(&source, &server, &before);
    });
    devices.control("");
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Makes the machine look like one that runs on gVisor and has Yama's strictest mode, to whoever is in the mount namespace of the shim.
const OTHER_MACHINE: &str = "mount -t tmpfs forged /proc/sys/kernel && mkdir /proc/sys/kernel/yama \
    && echo 3 > /proc/sys/kernel/yama/ptrace_scope && echo 'Linux version 4.4.0 #1 SMP' > /proc/sys/kernel/version \
    && mount --bind /proc/sys/kernel/version /proc/version";
/// Takes it back.
const THIS_MACHINE: &str = "umount /proc/version && umount /proc/sys/kernel";

/// Runs a script in the mount namespace of a replica's shim, which is a copy of the machine's own: nobody else sees its mounts.
fn beside_the_shim(source: &Replica<'_>, script: &str) {
    let shim = source.entry().expect("it is listed")["shim_pid"].clone();
    let mut command = Command::new("nsenter");
    command.arg(format!("--mount=/proc/{shim}/ns/mnt")).args(["sh", "-c", script]);
    let status = command.status().expect("a program of every machine");
    assert!(status.success(), "{status}");
}

#[test]
fn a_machine_on_which_nothing_can_be_traced_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    beside_the_shim(&source, OTHER_MACHINE);
    devices.control("lock die");
    for output in refusals(&source) {
        output.says(&["this machine runs on gVisor", "kernel.yama.ptrace_scope is 3"]);
    }
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    beside_the_shim(&source, THIS_MACHINE);
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// A process that is called as the one that serves MPS, as long as this lives.
struct Mps(Child);

impl Mps {
    fn start(folder: &std::path::Path) -> Self {
        let program = folder.join("nvidia-cuda-mps-control");
        std::fs::copy("/bin/sleep", &program).expect("a program of every machine");
        Self(Command::new(program).arg("100").spawn().expect("it starts"))
    }
}

impl Drop for Mps {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_client_of_mps_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    source.sh("mkdir /tmp/nvidia-mps && touch /tmp/nvidia-mps/control");
    // A pipe without a server.
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    let mps = Mps::start(&world.files());
    let pid = source.entry().expect("it is listed")["pid"].clone();
    devices.control("lock die");
    for output in refusals(&source) {
        output.says(&[&format!("process {pid} reaches an MPS server through /tmp/nvidia-mps")]);
    }
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    // A server without a pipe.
    source.sh("rm -r /tmp/nvidia-mps");
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    drop(mps);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn device_files_of_others_keep_a_server_from_snapshots_and_not_from_pauses() {
    /// Files in their place: it is the names that count.
    const HELD: &str = "mkdir -p /dev/infiniband && : > /dev/gdrdrv && : > /dev/infiniband/uverbs0 \
        && exec 8</dev/gdrdrv 9</dev/infiniband/uverbs0 && exec \"$0\" \"$@\"";
    let Some((world, devices)) = world_with(&[64]) else { return };
    let mut server = devices.server(16);
    server.command.splice(0..0, ["sh", "-c", HELD].map(str::to_owned));
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let pid = source.entry().expect("it is listed")["pid"].clone();
    devices.control("lock die");
    world.snapshot_call(&source, "v1", &[]).fails(3).says(&[
        &format!("process {pid} holds /dev/gdrdrv (gdrcopy), which the driver does not let go of"),
        &format!("process {pid} holds /dev/infiniband/uverbs0 (RDMA), which the driver does not let go of"),
    ]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Memory of simulated devices counts for the replica, so the limit has to have room for it once.
#[test]
fn a_limit_without_room_for_device_memory_is_refused_before_anything_is_locked() {
    const DEVICE_BYTES: u64 = (64 + 2) << 20;
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.server(64);
    let name = world.name("device");
    let call = devices.seen_by(world.run_call(&name, &server, &["--memory", "120MiB"]));
    let source = Replica::of_run(&world, name, server.port, &call.ok());
    let before = answers(&source, &server);
    devices.control("lock die");
    for output in refusals(&source) {
        let said = output.to_string();
        let needed = format!("{DEVICE_BYTES} bytes of device memory go into host memory, of which ");
        let rest = said.split_once(&needed).unwrap_or_else(|| panic!("no {needed:?} in {output}")).1;
        let (free, rest) = rest.split_once(' ').expect("a number");
        let free: u64 = free.parse().expect("a number");
        assert!(free < DEVICE_BYTES && rest.starts_with("are free within the replica's limit"), "{output}");
    }
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// What plain CRIU has against a server on this machine when it dumps it. The server holds `/dev/fuse` in the place of a
/// GPU's file, which CRIU knows as little. Its device memory is let pass, and what else may fail the dump is left out: it
/// is no container. It leads a session of its own, since CRIU dumps none whose leader is outside of its pid namespace, as
/// the one of these tests is where they were put into a namespace from outside.
fn what_criu_refuses(devices: &Devices, flags: &[&str]) -> Vec<String> {
    let images = tempfile::tempdir().expect("a folder");
    let mut server = Command::new(env!("CARGO_BIN_EXE_gpu-workload"));
    server.arg("--library").arg(devices.libraries().join("libcuda.so.1"));
    server.args(["--mib", "4", "--threads", "0"]).args(flags);
    server.env(DEVICES_ENV, devices.folder()).env(NODES_ENV, "/dev/fuse");
    server.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    rewarm_sys::process::new_session(&mut server);
    let mut server = server.spawn().expect("our own program");
    let mut line = String::new();
    let mut output = BufReader::new(server.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("its first line: its device memory is there");
    let mut dump = Command::new(rewarm_integration_tests::needs::criu().expect("it is needed"));
    dump.args(["dump", "--leave-running", "--tcp-close", "--network-lock=skip", "-v4"]);
    dump.args(["--ghost-limit", "1G"]);
    dump.args(["-o", "log", "-t", &server.id().to_string(), "-D"]).arg(images.path());
    dump.env("CRIU_LIBS_DIR", images.path()).output().expect("it starts");
    server.kill().expect("it was left running");
    server.wait().expect("it ends");
    let log = std::fs::read_to_string(images.path().join("log")).expect("a log");
    let errors: Vec<String> =
        log.lines().filter(|line| line.contains("Error (")).map(str::to_owned).collect();
    assert!(log.contains("Dumping opened files"), "it went on to the files: {errors:#?}");
    errors
}

/// That one goes through CRIU that was checkpointed before is claim 30 of docs/gpu.md.
#[test]
fn criu_refuses_a_server_that_is_on_its_devices() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (before, refused) = (what_criu_refuses(&devices, &["--late"]), what_criu_refuses(&devices, &[]));
    assert!(!before.iter().any(|line| line.contains("Can't dump file")), "{before:#?}");
    assert!(refused.iter().any(|line| line.contains("(chr 10:229)")), "{refused:#?}");
    world.finish();
}
