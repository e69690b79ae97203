//! A small HTTP/1.1 client: one request for each connection.
//!
//! The tests look at a server from outside; a client library would hide what they look for (a connection that is reset,
//! an answer that is cut short).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A server may be frozen for a dump while it is asked.
const TIMEOUT: Duration = Duration::from_secs(30);
/// No fixture answers with more.
const RESPONSE_BYTES_MAX: u64 = 64 << 20;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The number in the status line.
    pub status: u16,
    /// The body, decoded.
    pub body: Vec<u8>,
}

impl Response {
    /// The body as text, with replacement characters where it is none.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("status {}, not JSON ({error}): {}", self.status, self.text()))
    }
}

/// Asks `http://127.0.0.1:{port}{path}`.
///
/// # Errors
///
/// When the connection fails, or the answer is cut short or is not HTTP.
pub fn request(port: u16, method: &str, path: &str, body: Option<&str>) -> io::Result<Response> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    if let Some(body) = body {
        head += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    }
    head += "\r\n";
    head += body.unwrap_or_default();
    stream.write_all(head.as_bytes())?;
    let mut bytes = Vec::new();
    stream.take(RESPONSE_BYTES_MAX).read_to_end(&mut bytes)?;
    parse(&bytes)
}

/// [`request`] with `GET`.
///
/// # Errors
///
/// As [`request`].
pub fn get(port: u16, path: &str) -> io::Result<Response> {
    request(port, "GET", path, None)
}

fn parse(bytes: &[u8]) -> io::Result<Response> {
    let bad = |what: &str| {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{what} in an answer of {} bytes: {start:?}", bytes.len()),
        )
    };
    let end =
        bytes.windows(4).position(|four| four == b"\r\n\r\n").ok_or_else(|| bad("no end of the head"))?;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| bad("not text"))?;
    let status =
        head.split(' ').nth(1).and_then(|number| number.parse().ok()).ok_or_else(|| bad("no status"))?;
    let header = |wanted: &str| {
        head.lines().skip(1).find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_owned())
        })
    };
    let rest = &bytes[end + 4..];
    let body = if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        unchunk(rest).ok_or_else(|| bad("a chunk cut short"))?
    } else if let Some(length) = header("content-length") {
        let length: usize = length.parse().map_err(|_| bad("no length"))?;
        rest.get(..length).ok_or_else(|| bad("a body cut short"))?.to_vec()
    } else {
        rest.to_vec()
    };
    Ok(Response { status, body })
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..end]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_is_cut_short_is_an_error() {
        assert!(parse(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").is_err());
    }

    #[test]
    fn chunks_are_joined() {
        let answer =
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let response = parse(answer).unwrap();
        assert_eq!((response.status, response.text()), (201, "abcde".to_owned()));
    }
}
