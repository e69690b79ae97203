//! Real servers for the suite, each on loopback with its data in a folder of its own, gone when dropped.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rewarm_store::StoreUrl;

/// A server process and the address of an empty store in it.
pub(crate) struct Server {
    child: Child,
    folder: tempfile::TempDir,
    base: String,
    options: Vec<(String, String)>,
}

impl Server {
    /// The address of the store.
    pub(crate) fn url(&self) -> StoreUrl {
        self.url_with(&self.base, &[])
    }

    /// The address with another bucket.
    pub(crate) fn other_bucket(&self) -> StoreUrl {
        let (scheme, _) = self.base.split_once("://").unwrap();
        self.url_with(&format!("{scheme}://no-such-bucket"), &[])
    }

    /// The address with these options in place of its own.
    pub(crate) fn with_options(&self, changed: &[(&str, &str)]) -> StoreUrl {
        self.url_with(&self.base, changed)
    }

    fn url_with(&self, base: &str, changed: &[(&str, &str)]) -> StoreUrl {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        for (name, value) in &self.options {
            let other = changed.iter().find(|(changed, _)| changed == name);
            query.append_pair(name, other.map_or(value, |(_, value)| value));
        }
        format!("{base}?{}", query.finish()).parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("last lines of the server's log, newest first:\n{}", lines.join("\n"));
        }
    }
}

/// The project's cache of built things.
pub(crate) fn cache() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    variable("REWARM_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("rewarm")))
        .unwrap_or_else(|| variable("HOME").expect("HOME is set").join(".cache/rewarm"))
}

/// Says that a test is skipped; fails where the need must be met.
pub(crate) fn skip(need: &str, missing: &std::path::Path) {
    eprintln!("skipped: needs {need} at {}", missing.display());
    let needs = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
    assert!(
        !needs.split(',').any(|met| met == need),
        "{need} must be there and is not: {}",
        missing.display()
    );
}

/// Garage, one node.
pub(crate) fn garage() -> Option<Server> {
    let program = cache().join("garage/bin/garage");
    if !program.exists() {
        skip("garage", &program);
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let [rpc, s3] = free_ports();
    let data = folder.path().display();
    let config = format!(
        "metadata_dir = \"{data}/meta\"\ndata_dir = \"{data}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
         rpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{}\"\n\
         [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{s3}\"\n",
        "5a".repeat(32)
    );
    let config_path = folder.path().join("garage.toml");
    std::fs::write(&config_path, config).unwrap();
    let mut command = Command::new(&program);
    command.arg("-c").arg(&config_path).args(["server", "--single-node"]);
    let mut server = start(command, folder, s3, "s3://rewarm-test", &[]);
    let client = |arguments: &[&str]| {
        let output = Command::new(&program).arg("-c").arg(&config_path).args(arguments).output().unwrap();
        assert!(output.status.success(), "garage {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    wait("garage's first layout", || {
        Command::new(&program)
            .arg("-c")
            .arg(&config_path)
            .args(["bucket", "create", "rewarm-test"])
            .output()
            .is_ok_and(|output| output.status.success())
    });
    let made = client(&["key", "create", "test"]);
    let field = |name: &str| {
        let line =
            made.lines().find_map(|line| line.trim().strip_prefix(name)).expect("a key has this field");
        line.trim().to_owned()
    };
    let (id, secret) = (field("Key ID:"), field("Secret key:"));
    client(&["bucket", "allow", "--read", "--write", "rewarm-test", "--key", &id]);
    let options = [
        ("endpoint".to_owned(), format!("http://127.0.0.1:{s3}")),
        ("region".to_owned(), "garage".to_owned()),
        ("access_key_id".to_owned(), id),
        ("secret_access_key".to_owned(), secret),
    ];
    server.options = options.into();
    Some(server)
}

/// The account that azurite comes with; both are public constants of it.
const AZURITE_ACCOUNT: &str = "devstoreaccount1";
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Creates a container.
const AZURITE_CREATE: &str = include_str!("azurite_create.js");

/// Azurite, the emulator of Azure Blob Storage.
pub(crate) fn azurite() -> Option<Server> {
    let program = cache().join("npm/node_modules/azurite/dist/src/blob/main.js");
    if !program.exists() {
        skip("azurite", &program);
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let [port] = free_ports();
    let mut command = Command::new("node");
    command.arg(&program).args(["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location"]);
    command.arg(folder.path()).args(["--blobPort", &port.to_string()]);
    let options = [
        ("account_name".to_owned(), AZURITE_ACCOUNT.to_owned()),
        ("account_key".to_owned(), AZURITE_KEY.to_owned()),
        ("endpoint".to_owned(), format!("http://127.0.0.1:{port}/{AZURITE_ACCOUNT}")),
    ];
    let server = start(command, folder, port, "az://rewarm-test", &options);
    let output = Command::new("node")
        .args(["-e", AZURITE_CREATE, &port.to_string(), AZURITE_ACCOUNT, AZURITE_KEY, "rewarm-test"])
        .output()
        .unwrap();
    assert!(output.status.success(), "create a container: {output:?}");
    Some(server)
}

/// The emulator of Google Cloud Storage, with the XML interface that the library speaks added to it.
pub(crate) fn gcs() -> Option<Server> {
    let program = cache().join("venv/bin/python");
    if !cache().join("venv/bin/gcp-storage-emulator").exists() {
        skip("gcs", &cache().join("venv/bin/gcp-storage-emulator"));
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let [port] = free_ports();
    let mut command = Command::new(program);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/contract/gcs_xml.py"));
    command.args([&port.to_string(), "rewarm-test"]);
    let options = [
        ("base_url".to_owned(), format!("http://127.0.0.1:{port}")),
        ("bearer_token".to_owned(), "test".to_owned()),
    ];
    Some(start(command, folder, port, "gs://rewarm-test", &options))
}

fn start(
    mut command: Command,
    folder: tempfile::TempDir,
    port: u16,
    base: &str,
    options: &[(String, String)],
) -> Server {
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .current_dir(folder.path())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let server = Server { child, folder, base: base.to_owned(), options: options.to_vec() };
    wait("the server's port", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    server
}

fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(30), "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ports that nobody listens on. Held together, so that they differ.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap().port())
}
