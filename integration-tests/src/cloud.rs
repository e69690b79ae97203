//! Emulators of other clouds' object stores, ended on drop: azurite for Azure, gcp-storage-emulator for Google.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::garage::free_port;
use crate::needs;

const START_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// The account that azurite comes with; both are public constants of it.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Its own name: that of a world on the server's command line would make the server look like something left behind.
const BUCKET: &str = "rewarm-test";

/// A running server with an empty bucket.
#[derive(Debug)]
pub struct Cloud {
    child: Child,
    url: String,
    env: Vec<(String, String)>,
}

impl Cloud {
    /// Azurite with an empty container, its data in `folder`.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn azure(folder: &Path) -> Self {
        let port = free_port();
        let mut command = Command::new("node");
        command.arg(needs::cache().join("npm/node_modules/azurite/dist/src/blob/main.js"));
        command.args(["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", "."]);
        command.args(["--blobPort", &port.to_string()]);
        let env = [
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY.to_owned()),
            ("AZURE_ENDPOINT", format!("http://127.0.0.1:{port}/{ACCOUNT}")),
        ];
        let cloud = Self::start(command, folder, port, format!("az://{BUCKET}"), &env);
        let created = Command::new("node")
            .args(["-e", include_str!("../../store/tests/contract/azurite_create.js")])
            .args([&port.to_string(), ACCOUNT, ACCOUNT_KEY, BUCKET])
            .output()
            .expect("start Node.js");
        assert!(created.status.success(), "create a container: {}", String::from_utf8_lossy(&created.stderr));
        cloud
    }

    /// The emulator of Google Cloud Storage with an empty bucket; its log lies in `folder`.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn google(folder: &Path) -> Self {
        let port = free_port();
        let mut command = Command::new(needs::venv_python());
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../store/tests/contract/gcs_xml.py"));
        command.args([&port.to_string(), BUCKET]);
        let env = [
            ("GOOGLE_BASE_URL", format!("http://127.0.0.1:{port}")),
            ("GOOGLE_BEARER_TOKEN", "test".to_owned()),
        ];
        Self::start(command, folder, port, format!("gs://{BUCKET}"), &env)
    }

    fn start(mut command: Command, folder: &Path, port: u16, url: String, env: &[(&str, String)]) -> Self {
        fs::create_dir_all(folder).expect("a folder for the server");
        let log = File::create(folder.join("log")).expect("a file in our own folder");
        let out = log.try_clone().expect("a descriptor");
        command.current_dir(folder).stdin(Stdio::null()).stdout(out).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let cloud = Self { child, url, env };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            assert!(
                began.elapsed() < START_MAX,
                "{} does not answer within {START_MAX:?}:\n{log}",
                cloud.url
            );
            std::thread::sleep(POLL);
        }
        cloud
    }

    /// The bucket as a store.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The variables with which a client finds the server and is let in.
    #[must_use]
    pub fn env(&self) -> Vec<(String, String)> {
        self.env.clone()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
