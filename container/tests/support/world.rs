//! A state directory of its own, servers to put into it, and a look at what is left afterwards.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::print_stdout,
    reason = "each test binary uses a part of it and says what it skips"
)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rewarm_container::shim::{Client, Prepare};
use rewarm_container::{Entry, Name, Origin, Spec, State};

/// The program that stands for `rewarm`.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_container-test-program"))
}

/// A server that answers the path it was asked for, counts, writes files, and returns 7 on SIGTERM.
const SERVER: &str = r#"
import http.server, signal, sys, threading, os, mmap
count = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        text = self.path[1:]
        if text == "count":
            text = str(count)
        elif text.startswith("write/"):
            _, name, value = text.split("/", 2)
            open("/var/tmp/" + name, "w").write(value)
        elif text.startswith("read/"):
            text = open("/var/tmp/" + text.split("/", 1)[1]).read()
        elif text.startswith("shm/"):
            shared[:len(text)] = text.encode()
        elif text == "shared":
            text = bytes(shared[:32]).rstrip(b"\0").decode()
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
def stop(*args):
    print("stopping", flush=True)
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
fd = os.open("/dev/shm/shared", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
shared = mmap.mmap(fd, 1 << 20)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
print("serving", flush=True)
server.serve_forever()
"#;

/// A server whose answer comes by way of a bound Unix socket, a named pipe, a deleted file in `/dev/shm` and a loopback
/// connection that is open all the time.
const KNOTTED: &str = r#"
import http.server, socket, threading, os, mmap
os.mkfifo("/var/tmp/pipe")
pipe = os.open("/var/tmp/pipe", os.O_RDWR)
fd = os.open("/dev/shm/ghost", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4096)
ghost = mmap.mmap(fd, 4096)
os.unlink("/dev/shm/ghost")
ghost[:5] = b"ghost"
def serve(listener):
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=echo, args=(peer,), daemon=True).start()
def echo(peer):
    while True:
        data = peer.recv(100)
        if not data:
            return
        peer.sendall(data)
unix = socket.socket(socket.AF_UNIX)
unix.bind("/var/tmp/socket")
unix.listen()
inner = socket.create_server(("127.0.0.1", 9000))
for listener in (unix, inner):
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
held = socket.create_connection(("127.0.0.1", 9000))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fresh = socket.socket(socket.AF_UNIX)
        fresh.connect("/var/tmp/socket")
        fresh.sendall(b"unix")
        held.sendall(b"held")
        os.write(pipe, b"pipe")
        body = fresh.recv(100) + held.recv(100) + os.read(pipe, 100) + ghost[:5]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"#;

/// That server's specification.
pub fn knotted() -> Spec {
    Spec { command: ["/usr/bin/python3", "-c", KNOTTED].map(Into::into).to_vec(), ..server() }
}

/// The server's specification.
pub fn server() -> Spec {
    let command = ["/usr/bin/python3", "-c", SERVER].map(Into::into).to_vec();
    Spec { command, ports: vec![8000], ..Spec::default() }
}

pub fn name(text: &str) -> Name {
    text.parse().expect("a good name")
}

/// Whether everything is there that a test needs. A missing need fails where the environment says that it must be met.
pub fn needs(wanted: &[&str]) -> bool {
    let promised = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
    for need in wanted {
        let met = match *need {
            "root" => nix::unistd::geteuid().is_root(),
            "runc" => std::process::Command::new("runc").arg("--version").output().is_ok(),
            "criu" => criu().is_some(),
            other => panic!("unknown need {other}"),
        };
        if !met {
            println!("skipped: needs {need}");
            assert!(!promised.split(',').any(|promise| promise == *need), "{need} was promised");
            return false;
        }
    }
    true
}

/// The project's own CRIU.
pub fn criu() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
    let cache = std::env::var_os("REWARM_CACHE").map_or_else(|| cache.join("rewarm"), PathBuf::from);
    Some(cache.join("criu/sbin/criu")).filter(|path| path.exists())
}

/// Waits until `ready` gives a value.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asks the server in a replica.
pub fn get(client: &Client, path: &str) -> String {
    try_get(client, path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub fn try_get(client: &Client, path: &str) -> Result<String, String> {
    let mut stream = client.dial(8000, Duration::from_secs(2)).map_err(|error| format!("{error:?}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(|error| error.to_string())?;
    ask(&mut stream, path).map_err(|error| error.to_string())
}

pub fn ask(stream: &mut std::net::TcpStream, path: &str) -> std::io::Result<String> {
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or(text))
}

/// A state directory, and what the machine looked like before.
pub struct World {
    dir: tempfile::TempDir,
    pub state: State,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "test").expect("state");
        Self { dir, state }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A shim with everything laid out.
    pub fn prepare(&self, replica: &str, spec: &Spec, origin: Origin) -> Client {
        let claim = self.state.create(&name(replica)).expect("a free name");
        let client = Client::spawn(claim, program()).expect("shim");
        client
            .prepare(Prepare { spec: spec.clone(), origin, generation: 0, devices: false })
            .unwrap_or_else(|e| panic!("{e:?}"));
        client
    }

    /// A server that answers.
    pub fn run(&self, replica: &str, spec: &Spec) -> Client {
        let client = self.prepare(replica, spec, Origin::Cold);
        client.start(Duration::from_secs(20)).unwrap_or_else(|error| panic!("{error:?}"));
        wait_for("an answer", || try_get(&client, "/ready").ok());
        client.commit().expect("commit");
        client
    }

    pub fn entry(&self, replica: &str) -> Option<Entry> {
        self.state.entry(&name(replica)).expect("entry")
    }

    /// A stopped replica has kept these and nothing else.
    pub fn only_logs_are_left(&self, replica: &str) {
        let paths = self.state.paths(&name(replica));
        let names = std::fs::read_dir(paths.dir()).expect("kept").flatten();
        let names: BTreeSet<String> = names.map(|item| item.file_name().to_string_lossy().into()).collect();
        let expected = ["exit.json", "lock", "logs", "replica.json", "shim.log"].map(String::from);
        assert_eq!(names, BTreeSet::from(expected));
        self.no_trace();
    }

    /// Neither a replica nor a trace of one.
    pub fn nothing_is_left(&self) {
        assert_eq!(self.state.list().expect("list"), []);
        self.no_trace();
    }

    /// No process, mount, cgroup, network namespace or runc state that belongs to this state directory.
    pub fn no_trace(&self) {
        let shown = self.dir().display().to_string();
        wait_for("the end of all processes", || self.processes().is_empty().then_some(()));
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        assert!(!mounts.contains(&shown), "a mount is left");
        let runc = std::fs::read_dir(self.state.runc()).expect("runc").flatten().count();
        assert_eq!(runc, 0, "runc's state is left");
        assert_eq!(self.cgroups(), BTreeSet::new(), "a cgroup is left");
    }

    /// Shims, and all processes in the cgroups of this state's replicas.
    pub fn processes(&self) -> Vec<u32> {
        let shown = self.dir().display().to_string();
        let all = std::fs::read_dir("/proc").expect("proc").flatten();
        let pids = all.filter_map(|item| item.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| *pid != std::process::id())
            .filter(|pid| {
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&shown)
            })
            .collect()
    }

    /// Cgroups whose processes or names belong to replicas of this test: each test uses names of its own.
    fn cgroups(&self) -> BTreeSet<String> {
        let mine = std::fs::read_to_string(self.dir().join("cgroups")).unwrap_or_default();
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten();
        let all = hierarchies.filter_map(|item| std::fs::read_dir(item.path()).ok()).flatten().flatten();
        all.map(|item| item.file_name().to_string_lossy().into_owned())
            .filter(|name| mine.lines().any(|line| line == name))
            .collect()
    }

    /// Remembers the cgroup of a replica, for [`World::no_trace`].
    pub fn remember(&self, client: &Client) {
        let record = client.status().expect("status");
        let path = self.dir().join("cgroups");
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).expect("open");
        writeln!(file, "{}", record.cgroup).expect("write");
    }
}

impl Drop for World {
    /// Whatever a failed test left running ends with it.
    fn drop(&mut self) {
        for entry in self.state.list().unwrap_or_default() {
            if let Ok(client) = Client::connect(&self.state, &entry.name) {
                let _ = client.kill("the test is over");
            }
        }
        let _ = self.state.sweep();
    }
}
