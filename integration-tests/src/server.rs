//! The servers that the tests snapshot: how each is started, when it is ready, and what it is asked.
//!
//! The programs lie in `servers/` and are mounted read-only into the replica at [`FIXTURES`]. Each listens on the port
//! of its description, answers `GET /healthz` once it is ready, and on `GET /check` looks at everything it holds
//! (memory, pipes, timers, files) and says with 200 or 500 whether all of it is as it made it; `seen` in the answer holds
//! what grows or moves.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::needs::{self, Need};

/// Where the programs of `servers/` lie inside a replica.
pub const FIXTURES: &str = "/srv/fixtures";
/// The port that every server here listens on. Replicas have a network of their own each.
pub const PORT: u16 = 8000;

/// A server: how it is started and what it is asked.
#[derive(Debug, Clone)]
pub struct Server {
    /// Short name, the first part of its replicas' names.
    pub name: &'static str,
    /// Its command line inside the replica.
    pub command: Vec<String>,
    /// Where it listens.
    pub port: u16,
    /// The value of `--ready`.
    pub ready: String,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// The values of `--mount`.
    pub mounts: Vec<String>,
    /// What it needs besides [`needs::REPLICA`].
    pub needs: Vec<Need>,
    /// What it is asked, with the answers that must not change.
    pub questions: Vec<Question>,
    /// The probe file that it comes with, and the number of requests in it.
    pub probe: Option<(PathBuf, usize)>,
}

/// One request whose answer must be the same before and after.
#[derive(Debug, Clone)]
pub struct Question {
    /// HTTP method.
    pub method: &'static str,
    /// Path and query.
    pub path: String,
    /// JSON body.
    pub body: Option<String>,
    /// JSON pointers to what may differ (times, counters).
    pub except: Vec<&'static str>,
}

impl Question {
    /// `GET path`; the whole answer must be the same.
    #[must_use]
    pub fn get(path: &str) -> Self {
        Self { method: "GET", path: path.to_owned(), body: None, except: Vec::new() }
    }

    /// `POST path` with a JSON body; the whole answer must be the same.
    #[must_use]
    pub fn post(path: &str, body: &Value) -> Self {
        Self { method: "POST", path: path.to_owned(), body: Some(body.to_string()), except: Vec::new() }
    }

    /// Leaves out what lies at these JSON pointers.
    #[must_use]
    pub fn except(mut self, pointers: &[&'static str]) -> Self {
        self.except = pointers.to_vec();
        self
    }
}

impl Server {
    /// A server with the health check and the questions that all fixtures have.
    fn fixture(name: &'static str, command: &[&str]) -> Self {
        Self {
            name,
            command: command.iter().map(|&word| word.to_owned()).collect(),
            port: PORT,
            ready: format!("http://127.0.0.1:{PORT}/healthz"),
            env: Vec::new(),
            mounts: vec![format!("{}:{FIXTURES}:ro", fixtures().display())],
            needs: Vec::new(),
            questions: vec![Question::get("/check").except(&["/seen"])],
            probe: None,
        }
    }

    /// A fixture written in Python: the machine's own interpreter, without the modules of its user.
    fn python(name: &'static str, file: &str, flags: &[&str]) -> Self {
        let path = format!("{FIXTURES}/{file}");
        let port = PORT.to_string();
        let mut command = vec!["/usr/bin/python3", "-B", &path, "--port", &port];
        command.extend(flags);
        Self::fixture(name, &command)
    }

    /// The smallest server: its program is on its command line, so it needs no file but the interpreter.
    #[must_use]
    pub fn plain() -> Self {
        let mut server =
            Self::fixture("plain", &["/usr/bin/python3", "-c", include_str!("plain.py"), "8000"]);
        server.mounts.clear();
        server
    }

    /// A tree of processes with pipes, Unix sockets, shared memory, 256 MiB in `/dev/shm`, threads, sessions, timers and
    /// a file that is being written.
    #[must_use]
    pub fn tree() -> Self {
        Self::python("tree", "tree.py", &[])
    }

    /// An event loop and threads with timers on the monotonic clock.
    #[must_use]
    pub fn clock() -> Self {
        Self::python("clock", "clock.py", &[]).asking(Question::get("/sleep?ms=100").except(&["/took_ms"]))
    }

    /// Plays the HTTP interface of an inference engine, as its documentation has it: `vllm`, `sglang` or `llamacpp`.
    #[must_use]
    pub fn engine(name: &'static str) -> Self {
        let mut server = Self::python(name, "engine.py", &["--engine", name]);
        server.questions = vec![Question::get("/check")];
        server
    }

    /// A server with an open loopback connection to its own helper process.
    #[must_use]
    pub fn helper() -> Self {
        Self::python("helper", "helper.py", &[])
    }

    /// Memory of every kind that CRIU and the pager treat in different ways.
    #[must_use]
    pub fn memory() -> Self {
        Self::changing(64)
    }

    /// The same with private memory of `mib` MiB.
    #[must_use]
    pub fn changing(mib: u32) -> Self {
        let mib = mib.to_string();
        let flags = ["--mib", &mib, "--fork", "--churn", "mprotect,mremap,madvise,mmap,heap"];
        Self::python("memory", "memory.py", &flags).asking(Question::get("/digest"))
    }

    /// Memory that is awkward in every way: a reservation of 16 GiB, nearly as many mappings as the kernel allows (65,530),
    /// one that grows downwards, locked pages, an orphan, and what is done with memory while it is filled; with `mib` MiB that
    /// are filled before all of that.
    #[must_use]
    pub fn edges(mib: u32) -> Self {
        Self::python("edges", "edges.py", &["--mappings", "65000", "--mib", &mib.to_string()])
    }

    /// Private memory of `mib` MiB that does not compress, by a digest of all of it.
    #[must_use]
    pub fn memory_of(mib: u32) -> Self {
        Self::python("memory", "memory.py", &["--mib", &mib.to_string()]).asking(Question::get("/digest"))
    }

    /// Shared memory of `mib` MiB in which every third page is zero, by a digest of all of it.
    #[must_use]
    pub fn shared_with_gaps(mib: u32) -> Self {
        let flags = ["--mib", &mib.to_string(), "--shared", "--content", "gaps"];
        Self::python("memory", "memory.py", &flags).asking(Question::get("/digest"))
    }

    /// Shared memory of `mib` MiB that does not compress, by a digest of all of it; with what else `flags` say.
    #[must_use]
    pub fn shared_memory(mib: u32, flags: &[&str]) -> Self {
        let mib = mib.to_string();
        let all = [&["--mib", &mib, "--shared"], flags].concat();
        Self::python("memory", "memory.py", &all).asking(Question::get("/digest"))
    }

    /// Shared memory of `mib` MiB of one kind (`memfd`, `system_v`) that a server and a child of it map, by a digest of all of it.
    #[must_use]
    pub fn shared_by(kind: &str, mib: u32) -> Self {
        let flags = ["--mib", &mib.to_string(), "--shared-by", kind, "--fork"];
        Self::python("memory", "memory.py", &flags).asking(Question::get("/digest"))
    }

    /// A server and a child with handlers of the signals that come of being stopped and continued, and `mib` MiB of shared memory.
    #[must_use]
    pub fn signals(mib: u32) -> Self {
        let flags = ["--shared-mib", &mib.to_string()];
        Self::python("signals", "signals.py", &flags).asking(Question::get("/signals"))
    }

    /// A server with memory of `mib` MiB that becomes another program when it is asked to, and so does a child of it.
    #[must_use]
    pub fn becoming(mib: u32) -> Self {
        Self::python("become", "become.py", &["--mib", &mib.to_string()])
    }

    /// A server with an environment that looks like secrets.
    #[must_use]
    pub fn secretive() -> Self {
        let mut server = Self::python("secretive", "secretive.py", &[]);
        for (name, value) in [("HF_TOKEN", "hf_c0ffee5ec2e7"), ("DATABASE_PASSWORD", "correct horse")] {
            server.env.push((name.to_owned(), value.to_owned()));
        }
        server
    }

    /// A server with a connection to `address`, and one inside for comparison.
    #[must_use]
    pub fn outside(address: SocketAddr, port: u16) -> Self {
        let mut server = Self::python("outside", "outside.py", &["--connect", &address.to_string()]);
        server.listen_on(port);
        server.questions = vec![Question::get("/check").except(&["/seen"])];
        server
    }

    /// A server that holds a deleted file of `mib` MiB open.
    #[must_use]
    pub fn ghost(mib: u32, sparse: bool) -> Self {
        let mib = mib.to_string();
        let flags: &[&str] = if sparse { &["--mib", &mib, "--sparse"] } else { &["--mib", &mib] };
        Self::python("ghost", "ghost.py", flags)
    }

    /// A server with children that have ended and that nobody has waited for.
    #[must_use]
    pub fn unreaped() -> Self {
        Self::python("unreaped", "unreaped.py", &[])
    }

    /// A server that wants an io_uring and a userfaultfd, neither of which is to be had.
    #[must_use]
    pub fn uring() -> Self {
        Self::python("uring", "uring.py", &["--expect", "ENOSYS"])
    }

    /// A server behind a gateway, with every kind of answer that a proxy can do wrong.
    #[must_use]
    pub fn pool() -> Self {
        Self::python("pool", "pool.py", &[])
    }

    /// As [`Server::pool`]; its clones answer, then refuse for some seconds, then answer, and so on.
    #[must_use]
    pub fn flapping() -> Self {
        Self::python("flapping", "pool.py", &["--flaps"])
    }

    /// As [`Server::pool`]; every other time that it is asked whether it is ready it says no.
    #[must_use]
    pub fn unsure() -> Self {
        Self::python("unsure", "pool.py", &["--unsure"])
    }

    /// A server with a random generator that a hook renews, and that ends when it is asked to.
    #[must_use]
    pub fn renewing() -> Self {
        Self::python("clone", "clone.py", &[])
    }

    /// Another port than 8000, for replicas in the network of the host.
    ///
    /// # Panics
    ///
    /// When the server is none that takes `--port`.
    pub fn listen_on(&mut self, port: u16) {
        let at = self.command.iter().position(|word| word == "--port").expect("fixtures take --port");
        self.command[at + 1] = port.to_string();
        self.port = port;
        self.ready = format!("http://127.0.0.1:{port}/healthz");
    }

    /// A server with device memory, reached through this library.
    #[must_use]
    pub fn cuda(library: &str) -> Self {
        let prompt = json!({ "prompt": "A snapshot is" });
        let keep = examples().join("kv_cache").display().to_string();
        let server =
            Self::python("cuda", "cuda.py", &["--library", library, "--keep", &keep, "--kv-mib", "8"]);
        server.asking(Question::post("/generate", &prompt))
    }

    /// Node.js.
    #[must_use]
    pub fn node() -> Self {
        let node = needs::in_path("node").unwrap_or_default();
        let script = format!("{FIXTURES}/node.js");
        Self::fixture("node", &[&node.to_string_lossy(), &script, "--port", "8000"])
            .needing(Need::Node)
            .asking(Question::get("/hash?text=snapshot"))
    }

    /// nginx with two workers.
    #[must_use]
    pub fn nginx() -> Self {
        let script = format!("{FIXTURES}/nginx.sh");
        Self::fixture("nginx", &["/bin/sh", &script, "--port", "8000"])
            .needing(Need::Nginx)
            .asking(Question::get("/numbers"))
    }

    /// The embedding server of `examples/`.
    #[must_use]
    pub fn embedding() -> Self {
        let python = needs::venv_python();
        let program = examples().join("embedding/server.py");
        let mut server = Self::fixture("embedding", &[&python.to_string_lossy(), &program.to_string_lossy()]);
        server.mounts.clear();
        server.questions.clear();
        server.probe = Some((examples().join("embedding/probe.toml"), 12));
        let texts = json!({ "texts": ["hello", "The quick brown fox jumps over the lazy dog.", ""] });
        server.needing(Need::Torch).asking(Question::post("/embed", &texts))
    }

    /// The transformer of `examples/` with the weights in `weights`.
    #[must_use]
    pub fn transformer(weights: &Path) -> Self {
        let python = needs::venv_python();
        let program = examples().join("transformer/server.py");
        let (python, program) = (python.to_string_lossy(), program.to_string_lossy());
        let mut server =
            Self::fixture("transformer", &[&python, &program, "--weights", &weights.to_string_lossy()]);
        server.mounts.clear();
        server.questions.clear();
        server.probe = Some((examples().join("transformer/probe.toml"), 4));
        server
            .needing(Need::Torch)
            .asking(Question::post("/generate", &json!({ "prompt": "A snapshot is", "max_tokens": 4 })))
            .asking(Question::get("/state_digest"))
    }

    /// Adds what must be on the machine.
    #[must_use]
    pub fn needing(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }

    /// Adds a question.
    #[must_use]
    pub fn asking(mut self, question: Question) -> Self {
        self.questions.push(question);
        self
    }

    /// Everything that a test with this server needs.
    #[must_use]
    pub fn all_needs(&self) -> Vec<Need> {
        needs::REPLICA.iter().chain(&self.needs).copied().collect()
    }
}

/// The folder of the fixture programs.
#[must_use]
pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("servers")
}

/// The folder of the examples that users copy.
#[must_use]
pub fn examples() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// A small library of the host under another name, as a server that brings its own would have mapped it.
///
/// # Panics
///
/// When it cannot be written.
#[must_use]
pub fn own_library(folder: &Path, name: &str) -> PathBuf {
    let folders = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64"];
    let source = folders
        .iter()
        .map(|folder| Path::new(folder).join("libuuid.so.1"))
        .find(|path| path.exists())
        .expect("libuuid is part of the base system");
    let copy = folder.join(name);
    std::fs::copy(source, &copy).expect("our own folder");
    copy
}
