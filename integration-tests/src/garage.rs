//! A single-node Garage: a real S3 server with a bucket and a key of its own, ended on drop.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::http;
use crate::needs;

const START_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
// Garage checks the form of its keys (`GK` and 24 hexadecimal digits; 64 digits), not their strength.
const ACCESS_KEY: &str = "GK0123456789abcdef01234567";
const SECRET_KEY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const RPC_SECRET: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
const REGION: &str = "garage";

/// A running server.
#[derive(Debug)]
pub struct Garage {
    child: Child,
    port: u16,
    bucket: String,
    config: PathBuf,
}

impl Garage {
    /// Starts a server that keeps its data in `folder` and has the bucket `bucket`.
    ///
    /// # Panics
    ///
    /// When it does not answer within half a minute.
    #[must_use]
    pub fn start(folder: &Path, bucket: &str) -> Self {
        fs::create_dir_all(folder).expect("a folder for the server");
        let (port, rpc_port) = (free_port(), free_port());
        let config = format!(
            "metadata_dir = {:?}\ndata_dir = {:?}\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
             rpc_bind_addr = \"127.0.0.1:{rpc_port}\"\nrpc_public_addr = \"127.0.0.1:{rpc_port}\"\n\
             rpc_secret = \"{RPC_SECRET}\"\n\n[s3_api]\ns3_region = \"{REGION}\"\napi_bind_addr = \"127.0.0.1:{port}\"\n",
            folder.join("meta"),
            folder.join("data"),
        );
        fs::write(folder.join("garage.toml"), config).expect("a file in our own folder");
        let log = File::create(folder.join("garage.log")).expect("a file in our own folder");
        let child = Command::new(needs::cache().join("garage/bin/garage"))
            .args(["server", "--single-node", "--default-bucket"])
            // By variable, not by flag: the folder's name on the command line would make the server look like something
            // that a test left behind.
            .env("GARAGE_CONFIG_FILE", folder.join("garage.toml"))
            .env("GARAGE_DEFAULT_ACCESS_KEY", ACCESS_KEY)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET_KEY)
            .env("GARAGE_DEFAULT_BUCKET", bucket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start Garage");
        let config = folder.join("garage.toml");
        let garage = Self { child, port, bucket: bucket.to_owned(), config };
        let began = Instant::now();
        while !garage.answers() {
            let log = fs::read_to_string(folder.join("garage.log")).unwrap_or_default();
            assert!(began.elapsed() < START_MAX, "Garage does not answer within {START_MAX:?}:\n{log}");
            std::thread::sleep(POLL);
        }
        garage
    }

    /// The bucket as a store.
    #[must_use]
    pub fn url(&self) -> String {
        format!("s3://{}", self.bucket)
    }

    /// The variables with which a client finds the server and is let in.
    #[must_use]
    pub fn env(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", REGION),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// What it says of the bucket: objects, unfinished uploads.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    #[must_use]
    pub fn info(&self) -> String {
        self.administer(&["bucket", "info", &self.bucket])
    }

    /// The variables of a client that may read the bucket and not write it.
    ///
    /// # Panics
    ///
    /// When Garage does not make such a key.
    #[must_use]
    pub fn read_only_env(&self) -> Vec<(String, String)> {
        let made = self.administer(&["key", "create", "reader"]);
        let value = |name: &str| {
            let line = made.lines().find_map(|line| line.trim().strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in\n{made}")).trim().to_owned()
        };
        let (id, secret) = (value("Key ID:"), value("Secret key:"));
        self.administer(&["bucket", "allow", "--read", &self.bucket, "--key", &id]);
        [("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec()
    }

    /// Whether the key of [`Garage::env`] may read the bucket: credentials that expire, and come back.
    ///
    /// # Panics
    ///
    /// When Garage does not do it.
    pub fn let_read(&self, may: bool) {
        let verb = if may { "allow" } else { "deny" };
        self.administer(&["bucket", verb, "--read", &self.bucket, "--key", ACCESS_KEY]);
    }

    fn administer(&self, arguments: &[&str]) -> String {
        let output = Command::new(needs::cache().join("garage/bin/garage"))
            .args(arguments)
            .env("GARAGE_CONFIG_FILE", &self.config)
            .output()
            .expect("start Garage's command line");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "garage {arguments:?}:\n{out}{err}");
        out.into_owned()
    }

    /// The bucket is made after the port opens; 403 (no signature) means that the server is up with its layout.
    fn answers(&self) -> bool {
        let path = format!("/{}/", self.bucket);
        matches!(http::get(self.port, &path), Ok(response) if response.status == 403)
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody listens on, and that the kernel gives to nobody who asks for any port: between this call and its use
/// another test must not get it.
///
/// # Panics
///
/// When all of them are taken.
#[must_use]
pub fn free_port() -> u16 {
    // Below the kernel's own range, which begins at 32768.
    const FIRST: u32 = 20_000;
    const COUNT: u32 = 12_000;
    static ASKED: AtomicU32 = AtomicU32::new(0);
    // Processes that run at the same time begin far from each other.
    let start = std::process::id().wrapping_mul(7919) % COUNT;
    for _ in 0..COUNT {
        let port = FIRST + (start + ASKED.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(port).expect("the range ends below 65536");
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port from {FIRST} on");
}
