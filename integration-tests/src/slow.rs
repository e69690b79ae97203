//! A slow or broken way to a server: both directions can be throttled, requests refused, and what comes back stalled, cut
//! and changed, while it runs.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes that are passed on in one go.
const PIECE: usize = 16 << 10;
/// Bytes that the kernel takes in for a connection before they are passed on.
const RECEIVED_MAX: usize = 128 << 10;
const POLL: Duration = Duration::from_millis(10);
/// Shorter waits are saved up: a busy machine sleeps some milliseconds too long each time, and a rate would be a fraction of it.
const WAIT_MIN: Duration = Duration::from_millis(4);

/// What goes wrong. Nothing does at first.
#[derive(Debug, Default)]
struct Wrong {
    /// Bytes a second over all connections, there and back; 0 for as fast as it goes.
    rate: AtomicU64,
    /// Who holds it passes; the others wait behind. What was not waited for yet.
    line: Mutex<Duration>,
    stalled: AtomicBool,
    /// An answer of more bytes stays on its way; 0 for none.
    held_above: AtomicU64,
    /// A connection is cut when so many bytes have come back over it; 0 for never.
    cut_after: AtomicU64,
    /// One request out of so many is not answered: its connection is cut; 0 for never.
    fail_every: AtomicU64,
    /// Requests so far, and those that were not answered.
    requests: AtomicU64,
    failed: AtomicU64,
    /// Whether a bit is flipped in everything that comes back but the beginnings of answers.
    flips: AtomicBool,
    /// Bytes that have come back.
    passed: AtomicU64,
    ended: AtomicBool,
}

impl Wrong {
    /// Waits as long as so many bytes take.
    fn wait_for(&self, bytes: usize) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate > 0 {
            let mut owed = self.line.lock().unwrap_or_else(PoisonError::into_inner);
            *owed += Duration::from_secs_f64(bytes as f64 / rate as f64);
            if *owed >= WAIT_MIN {
                std::thread::sleep(std::mem::take(&mut *owed));
            }
        }
    }
}

impl Wrong {
    /// Whether an answer of so many bytes stays where it is for now.
    fn holds_long(&self, length: u64) -> bool {
        let limit = self.held_above.load(Ordering::Relaxed);
        limit > 0 && length > limit
    }

    /// Whether this is the beginning of a request that is not to be answered.
    fn refuses(&self, piece: &[u8]) -> bool {
        let begins = [&b"GET "[..], b"HEAD "].iter().any(|verb| piece.starts_with(verb));
        let every = self.fail_every.load(Ordering::Relaxed);
        let number = if begins { self.requests.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        let refuses = begins && every > 0 && number.is_multiple_of(every);
        self.failed.fetch_add(u64::from(refuses), Ordering::Relaxed);
        refuses
    }
}

/// A way to a port of this machine. Dropping it closes it.
#[derive(Debug)]
pub struct Slow {
    port: u16,
    wrong: Arc<Wrong>,
}

impl Slow {
    /// A way to `port`, as fast as it goes.
    ///
    /// # Panics
    ///
    /// When no port can be had.
    #[must_use]
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        // What was sent before a connection was closed is passed on all the same, and everything else waits behind it.
        nix::sys::socket::setsockopt(&listener, nix::sys::socket::sockopt::RcvBuf, &RECEIVED_MAX)
            .expect("our own socket");
        let own = listener.local_addr().expect("a port").port();
        let wrong = Arc::new(Wrong::default());
        let shared = wrong.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                let shared = shared.clone();
                std::thread::spawn(move || {
                    // A connection that breaks is what clients have to live with.
                    let _ = carry(&client, port, &shared);
                });
            }
        });
        Self { port: own, wrong }
    }

    /// The port of the near end.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes a second over all connections, there and back; 0 for as fast as it goes.
    pub fn throttle(&self, rate: u64) {
        self.wrong.rate.store(rate, Ordering::Relaxed);
    }

    /// Whether nothing comes back any more, over connections that stay open.
    pub fn stall(&self, stalled: bool) {
        self.wrong.stalled.store(stalled, Ordering::Relaxed);
    }

    /// Whether answers of more than so many bytes stay on their way, over connections that stay open, while others pass; 0 for none.
    pub fn hold_above(&self, bytes: u64) {
        self.wrong.held_above.store(bytes, Ordering::Relaxed);
    }

    /// Cuts each connection when so many bytes have come back over it; 0 for never.
    pub fn cut_after(&self, bytes: u64) {
        self.wrong.cut_after.store(bytes, Ordering::Relaxed);
    }

    /// Does not answer one request out of so many; 0 for answering all.
    pub fn fail_every(&self, requests: u64) {
        self.wrong.fail_every.store(requests, Ordering::Relaxed);
    }

    /// Requests that were not answered.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.wrong.failed.load(Ordering::Relaxed)
    }

    /// Whether content is changed on its way back.
    pub fn flip(&self, flips: bool) {
        self.wrong.flips.store(flips, Ordering::Relaxed);
    }

    /// Bytes that have come back.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.wrong.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.wrong.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for connections.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn carry(client: &TcpStream, port: u16, wrong: &Arc<Wrong>) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port))?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let shared = wrong.clone();
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            shared.wait_for(count);
            if shared.refuses(&piece[..count]) {
                let _ = from.shutdown(Shutdown::Both);
                break;
            }
            if to.write_all(&piece[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    let mut piece = vec![0; PIECE];
    let mut carried = 0;
    // Of the answer under way: its length, and what the server has still to send of it.
    let (mut length, mut left) = (0, 0_u64);
    // What was held back of it.
    let mut kept = io::Cursor::new(Vec::new());
    loop {
        let mut count = kept.read(&mut piece)?;
        if count == 0 {
            count = from.read(&mut piece)?;
            match content_length(&piece[..count]) {
                Some((head, body)) => (length, left) = (body, (head + body).saturating_sub(count as u64)),
                None => left = left.saturating_sub(count as u64),
            }
            if wrong.holds_long(length) {
                // Taken from the server all the same, which reads no more than some at a time and would keep others waiting.
                let mut all = piece[..count].to_vec();
                Read::by_ref(&mut from).take(left).read_to_end(&mut all)?;
                (kept, left) = (io::Cursor::new(all), 0);
                while wrong.holds_long(length) && !wrong.ended.load(Ordering::Relaxed) {
                    std::thread::sleep(POLL);
                }
                continue;
            }
        }
        while wrong.stalled.load(Ordering::Relaxed) && !wrong.ended.load(Ordering::Relaxed) {
            std::thread::sleep(POLL);
        }
        wrong.wait_for(count);
        if wrong.flips.load(Ordering::Relaxed) && count > 1 && !piece.starts_with(b"HTTP/") {
            piece[count / 2] ^= 1;
        }
        carried += count as u64;
        let limit = wrong.cut_after.load(Ordering::Relaxed);
        if count == 0 || (limit > 0 && carried > limit) || wrong.ended.load(Ordering::Relaxed) {
            let _ = to.shutdown(Shutdown::Both);
            return from.shutdown(Shutdown::Both);
        }
        to.write_all(&piece[..count])?;
        wrong.passed.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// The lengths of an answer's head and of its body, if this piece begins one.
fn content_length(piece: &[u8]) -> Option<(u64, u64)> {
    let text = piece.starts_with(b"HTTP/").then(|| String::from_utf8_lossy(piece))?;
    let head = piece.windows(4).position(|bytes| bytes == b"\r\n\r\n").map_or(piece.len(), |at| at + 4);
    let mut lines = text.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(':'));
    lines
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?
        .1
        .trim()
        .parse()
        .ok()
        .map(|body| (head as u64, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_through_and_connections_are_cut() {
        let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for client in server.incoming().flatten() {
                let _ = (&client).write_all(&[7; 100_000]);
            }
        });
        let slow = Slow::to(port);
        let fetch = || {
            let mut all = Vec::new();
            let _ = TcpStream::connect(("127.0.0.1", slow.port())).unwrap().read_to_end(&mut all);
            all.len()
        };
        assert_eq!(fetch(), 100_000);
        slow.cut_after(40_000);
        let cut = fetch();
        assert!(cut <= 60_000, "{cut} bytes");
        assert!(slow.passed() >= 100_000);
    }
}
