//! A small HTTP/1.1 client: one request for each connection, or many over a [`Connection`].
//!
//! The tests look at a server from outside; a client library would hide what they look for (a connection that is reset,
//! an answer that is cut short).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A server may be frozen for a dump while it is asked.
const TIMEOUT: Duration = Duration::from_secs(30);
/// No fixture answers with more.
const RESPONSE_BYTES_MAX: usize = 64 << 20;

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

/// Asks `http://127.0.0.1:{port}{path}` over a connection of its own.
///
/// # Errors
///
/// When the connection fails, or the answer is cut short or is not HTTP.
pub fn request(port: u16, method: &str, path: &str, body: Option<&str>) -> io::Result<Response> {
    exchange(&mut connect(port)?, "connection: close\r\n", method, path, body)
}

/// A connection that is used for one request after another.
#[derive(Debug)]
pub struct Connection(TcpStream);

impl Connection {
    /// Connects to a port of this machine.
    ///
    /// # Errors
    ///
    /// When nobody listens there.
    pub fn open(port: u16) -> io::Result<Self> {
        connect(port).map(Self)
    }

    /// Asks for `path` with `GET`.
    ///
    /// # Errors
    ///
    /// As [`request`]; a connection that was closed meanwhile is one.
    pub fn get(&mut self, path: &str) -> io::Result<Response> {
        exchange(&mut self.0, "connection: keep-alive\r\n", "GET", path, None)
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn exchange(
    stream: &mut TcpStream,
    headers: &str,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> io::Result<Response> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}");
    if let Some(body) = body {
        head += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    }
    head += "\r\n";
    head += body.unwrap_or_default();
    stream.write_all(head.as_bytes())?;
    // Not every server closes the connection, even when it is asked to: an answer that is whole is enough.
    let mut bytes = Vec::new();
    let mut buffer = [0; 64 << 10];
    loop {
        // A socket with a timeout is not read again by itself after a signal or a freeze.
        let count = match stream.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        bytes.extend_from_slice(&buffer[..count]);
        if count == 0 || bytes.len() > RESPONSE_BYTES_MAX {
            return parse(&bytes);
        }
        if let Ok(Some(response)) = whole(&bytes) {
            return Ok(response);
        }
    }
}

/// [`get`] with a header, such as `x-session: 1`.
///
/// # Errors
///
/// As [`request`].
pub fn get_with(port: u16, path: &str, header: &str) -> io::Result<Response> {
    exchange(&mut connect(port)?, &format!("connection: close\r\n{header}\r\n"), "GET", path, None)
}

/// [`request`] with `GET`.
///
/// # Errors
///
/// As [`request`].
pub fn get(port: u16, path: &str) -> io::Result<Response> {
    request(port, "GET", path, None)
}

/// An answer whose end is the end of the connection.
fn parse(bytes: &[u8]) -> io::Result<Response> {
    match whole(bytes)? {
        Some(response) => Ok(response),
        None => {
            let head = Head::of(bytes)?.ok_or_else(|| bad(bytes, "no end of the head"))?;
            let ends_with_connection = head.length.is_none() && !head.chunked;
            let body = bytes[head.bytes..].to_vec();
            ends_with_connection
                .then_some(Response { status: head.status, body })
                .ok_or_else(|| bad(bytes, "a body cut short"))
        }
    }
}

/// An answer that says itself where it ends, if it has come as a whole.
fn whole(bytes: &[u8]) -> io::Result<Option<Response>> {
    let Some(head) = Head::of(bytes)? else { return Ok(None) };
    let rest = &bytes[head.bytes..];
    let body = match head.length {
        _ if head.chunked => unchunk(rest),
        Some(length) => rest.get(..length).map(<[u8]>::to_vec),
        None => None,
    };
    Ok(body.map(|body| Response { status: head.status, body }))
}

struct Head {
    status: u16,
    /// Length of the head itself.
    bytes: usize,
    length: Option<usize>,
    chunked: bool,
}

impl Head {
    fn of(bytes: &[u8]) -> io::Result<Option<Self>> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
        let head = std::str::from_utf8(&bytes[..end]).map_err(|_| bad(bytes, "not text"))?;
        let status = head.split(' ').nth(1).and_then(|number| number.parse().ok());
        let header = |wanted: &str| {
            head.lines().skip(1).find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_owned())
            })
        };
        let length =
            header("content-length").map(|length| length.parse().map_err(|_| bad(bytes, "no length")));
        Ok(Some(Self {
            status: status.ok_or_else(|| bad(bytes, "no status"))?,
            bytes: end + 4,
            length: length.transpose()?,
            chunked: header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")),
        }))
    }
}

fn bad(bytes: &[u8], what: &str) -> io::Error {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} in an answer of {} bytes: {start:?}", bytes.len()),
    )
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
    fn without_a_length_the_end_of_the_connection_is_the_end() {
        let response = parse(b"HTTP/1.0 200 OK\r\n\r\nabc").unwrap();
        assert_eq!(response.text(), "abc");
        assert!(parse(b"HTTP/1.0 200 OK\r\n").is_err());
    }

    #[test]
    fn chunks_are_joined() {
        let answer =
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let response = parse(answer).unwrap();
        assert_eq!((response.status, response.text()), (201, "abcde".to_owned()));
    }
}
