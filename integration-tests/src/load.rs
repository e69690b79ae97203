//! Clients that keep asking a server while something is done to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::http::{self, Connection};

/// Between two requests of one client.
const PAUSE: Duration = Duration::from_millis(5);

/// Two clients at work: one keeps its connection, the other makes one for each request.
#[derive(Debug)]
pub struct Load {
    end: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Seen>>,
}

/// What clients saw.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Answers that were as expected.
    pub answers: usize,
    /// Answers with other content than is expected.
    pub wrong: Vec<String>,
    /// What else came back.
    pub failures: Vec<String>,
    /// The longest that a request took.
    pub longest: Duration,
}

impl Load {
    /// Begins to ask for `path`, whose answer must be 200 each time.
    ///
    /// # Panics
    ///
    /// When nobody listens at `port`.
    #[must_use]
    pub fn start(port: u16, path: &'static str) -> Self {
        let end = Arc::<AtomicBool>::default();
        let mut connection = Connection::open(port).expect("a connection to the server");
        let clients = vec![
            client(end.clone(), None, move || connection.get(path)),
            client(end.clone(), None, move || http::get(port, path)),
        ];
        Self { end, clients }
    }

    /// Begins to post `body` to `path`, whose answer must be 200 and the same each time: what it is now.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    #[must_use]
    pub fn posting(port: u16, path: &'static str, body: &'static str) -> Self {
        let end = Arc::<AtomicBool>::default();
        let ask = move || http::request(port, "POST", path, Some(body));
        let first = ask().expect("an answer");
        assert_eq!(first.status, 200, "{path}: {}", first.text());
        let clients = (0..2).map(|_| client(end.clone(), Some(first.text()), ask)).collect();
        Self { end, clients }
    }

    /// Ends asking, and tells what was seen.
    ///
    /// # Panics
    ///
    /// When a client panicked.
    #[must_use]
    pub fn stop(self) -> Seen {
        self.end.store(true, Ordering::Relaxed);
        self.clients.into_iter().fold(Seen::default(), |mut all, client| {
            let seen = client.join().expect("a client does not panic");
            all.answers += seen.answers;
            all.wrong.extend(seen.wrong);
            all.failures.extend(seen.failures);
            all.longest = all.longest.max(seen.longest);
            all
        })
    }
}

fn client(
    end: Arc<AtomicBool>,
    expected: Option<String>,
    mut ask: impl FnMut() -> std::io::Result<http::Response> + Send + 'static,
) -> JoinHandle<Seen> {
    std::thread::spawn(move || {
        let mut seen = Seen::default();
        while !end.load(Ordering::Relaxed) {
            let began = Instant::now();
            match ask() {
                Ok(response) if response.status == 200 => match &expected {
                    Some(expected) if *expected != response.text() => seen.wrong.push(response.text()),
                    _ => seen.answers += 1,
                },
                Ok(response) => seen.failures.push(format!("{}: {}", response.status, response.text())),
                Err(error) => seen.failures.push(error.to_string()),
            }
            seen.longest = seen.longest.max(began.elapsed());
            std::thread::sleep(PAUSE);
        }
        seen
    })
}
