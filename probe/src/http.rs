//! One HTTP/1.1 request over a socket that the caller opened, with a deadline and a bounded answer.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue};
use hyper::{HeaderMap, Method, StatusCode};
use hyper_util::rt::TokioIo;

use crate::dial::Dial;
use crate::error::RequestError;
use crate::limits::ANSWER_BYTES_MAX;

/// What is sent.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) port: u16,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) headers: &'a [(String, String)],
    pub(crate) body: Bytes,
    pub(crate) timeout: Duration,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Sends one request on a connection of its own and reads the whole answer.
pub(crate) async fn call(dial: &dyn Dial, call: &Call<'_>) -> Result<Reply, RequestError> {
    let (port, timeout) = (call.port, call.timeout);
    match tokio::time::timeout(timeout, exchange(dial, call)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(RequestError::TimedOut { port, timeout }),
    }
}

async fn exchange(dial: &dyn Dial, call: &Call<'_>) -> Result<Reply, RequestError> {
    let port = call.port;
    let request = build(call).map_err(RequestError::Build)?;
    let stream = dial.dial(port).await.map_err(|source| RequestError::Connect { port, source })?;
    // The last bytes of a small request must not wait for an acknowledgement; that it fails does not matter.
    let _ = stream.set_nodelay(true);
    let http = |source| RequestError::Http { port, source };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    // The connection is polled beside the answer and dropped with it: no task outlives this function, so no socket of
    // ours is still open inside the replica when CRIU looks at its connections.
    let answer = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let (head, body) = response.into_parts();
        let body =
            Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| read_error(port, error))?;
        Ok(Reply { status: head.status, headers: head.headers, body: body.to_bytes() })
    };
    tokio::pin!(connection, answer);
    let mut connected = true;
    loop {
        tokio::select! {
            biased;
            reply = &mut answer => return reply,
            // An error of the connection also reaches the answer, with the same cause.
            _ = &mut connection, if connected => connected = false,
        }
    }
}

fn read_error(port: u16, error: Box<dyn std::error::Error + Send + Sync>) -> RequestError {
    match error.downcast::<hyper::Error>() {
        Ok(source) => RequestError::Http { port, source: *source },
        Err(error) => {
            debug_assert!(error.is::<LengthLimitError>(), "Limited adds this error only: {error}");
            RequestError::TooLong { limit: ANSWER_BYTES_MAX }
        }
    }
}

fn build(call: &Call<'_>) -> Result<hyper::Request<Full<Bytes>>, hyper::http::Error> {
    let method: Method = call.method.parse()?;
    let mut request =
        hyper::Request::builder().method(&method).uri(call.path).body(Full::new(call.body.clone()))?;
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::try_from(format!("localhost:{}", call.port))?);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if call.body.is_empty() && (method == Method::POST || method == Method::PUT) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    for (name, value) in call.headers {
        headers.insert(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    Ok(request)
}
