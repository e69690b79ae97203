//! A single-node Garage: a real S3 server with a bucket and a key of its own, ended on drop.

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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
        let garage = Self { child, port, bucket: bucket.to_owned() };
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

/// A port that nobody listens on at the moment.
///
/// # Panics
///
/// When the machine has none left.
#[must_use]
pub fn free_port() -> u16 {
    let port = |listener: TcpListener| -> io::Result<u16> { Ok(listener.local_addr()?.port()) };
    TcpListener::bind(("127.0.0.1", 0)).and_then(port).expect("a free port")
}
