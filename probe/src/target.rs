//! Where inside a replica a URL points: the port counts, the host part does not.

use hyper::Uri;

/// A place that answers HTTP inside the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Port as written; absent means the replica's first declared port, then 80.
    pub(crate) port: Option<u16>,
    /// Path and query.
    pub(crate) path: String,
}

impl Target {
    /// Reads `http://HOST[:PORT][/PATH]`. `Uri` and not `url::Url`: the latter forgets a port 80 that was written out,
    /// and the difference decides here whether the replica's own port is used.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        if uri.scheme_str() != Some("http") {
            return None;
        }
        let authority = uri.authority()?;
        let port = match authority.port() {
            Some(port) => Some(port.as_u16()),
            // `Authority` says "no port" of `h:` and of `h:99999` alike; only a bare host has none.
            None if authority.as_str() != authority.host() => return None,
            None => None,
        };
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let path = if path.is_empty() { "/" } else { path };
        (port != Some(0)).then(|| Self { port, path: path.to_owned() })
    }

    /// The port to dial in a replica whose first declared port is `declared`.
    pub(crate) fn port(&self, declared: Option<u16>) -> u16 {
        self.port.or(declared).unwrap_or(80)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_port_wins_over_the_declared_one_even_if_it_is_80() {
        let target = Target::parse("http://anything:80/health?deep=1").expect("a URL");
        assert_eq!((target.port(Some(8000)), target.path.as_str()), (80, "/health?deep=1"));
        let target = Target::parse("http://localhost").expect("a URL");
        assert_eq!((target.port(Some(8000)), target.port(None), target.path.as_str()), (8000, 80, "/"));
    }

    #[test]
    fn what_is_not_plain_http_is_refused() {
        for text in
            ["https://localhost/", "http://", "localhost:80", "http://h:0/", "http://h:99999/", "http://h:/x"]
        {
            assert_eq!(Target::parse(text), None, "{text}");
        }
    }
}
