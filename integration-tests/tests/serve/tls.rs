//! `[serve] tls`: what clients and KEDA are shown, from the file to the wire, and when it is exchanged.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use rcgen::{CertifiedKey, KeyPair};
use rewarm_integration_tests::World;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{pool, pool_world};

/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const HOST: &str = "localhost";

type Certificate = CertifiedKey<KeyPair>;

fn certificate() -> Certificate {
    rcgen::generate_simple_self_signed([HOST.to_owned()]).expect("a certificate")
}

/// A connection of a client that trusts only this certificate, once the other side has shown it.
fn connect(
    port: u16,
    trusted: &Certificate,
    protocol: &str,
) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.cert.der().clone()).expect("a certificate");
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let name = ServerName::try_from(HOST).expect("a name");
    let mut tls = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    while tls.is_handshaking() {
        tls.complete_io(&mut stream)?;
    }
    assert_eq!(tls.alpn_protocol(), Some(protocol.as_bytes()));
    Ok(StreamOwned::new(tls, stream))
}

/// The head of the answer to a request, and its body.
fn get(port: u16, trusted: &Certificate) -> io::Result<String> {
    let mut stream = connect(port, trusted, "http/1.1")?;
    write!(stream, "GET /check HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether somebody answers in HTTP without TLS.
fn answers_in_the_clear(port: u16) -> bool {
    http::get(port, "/check").is_ok()
}

fn write_pem(world: &World, certificate: &Certificate, key: &Certificate) {
    for (name, pem) in [("cert.pem", certificate.cert.pem()), ("key.pem", key.signing_key.serialize_pem())] {
        std::fs::write(world.files().join(name), pem).expect("our own folder");
    }
}

#[test]
fn clients_and_keda_are_shown_the_certificate_of_the_file_and_the_next_one_after_a_reload() {
    let Some(world) = pool_world() else { return };
    let (port, keda) = (free_port(), free_port());
    let (first, second) = (certificate(), certificate());
    write_pem(&world, &first, &first);
    let files = ["cert", "key"].map(|name| world.files().join(format!("{name}.pem")));
    let [cert, key] = files.map(|path| path.display().to_string());
    let head = format!(
        "[serve]\nadmin = false\nkeda = '127.0.0.1:{keda}'\ntls = {{ cert = '{cert}', key = '{key}' }}\n"
    );
    let serving = world.serve(&(head + &pool(&world, "p", "v1", port, "min_replicas = 1\n")));
    serving.await_replicas(&["ready"]);
    let is_shown = |certificate: &Certificate| {
        get(port, certificate).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 OK"))
            && connect(keda, certificate, "h2").is_ok()
    };
    let is_refused = |certificate: &Certificate| {
        get(port, certificate).is_err() && connect(keda, certificate, "h2").is_err()
    };
    assert!(is_shown(&first) && is_refused(&second));
    assert!(!answers_in_the_clear(port) && !answers_in_the_clear(keda));

    // The addresses stay, and so does who has a connection.
    let mut kept = connect(port, &first, "http/1.1").expect("a connection");
    write_pem(&world, &second, &second);
    serving.running().signal(Signal::SIGHUP);
    world.await_state("the other certificate", PATIENCE, || is_shown(&second));
    assert!(is_refused(&first));
    assert!(!answers_in_the_clear(port) && !answers_in_the_clear(keda));
    write!(kept, "GET /check HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n").expect("it is open");
    let mut answer = String::new();
    kept.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");

    // A key that is not that of the certificate.
    write_pem(&world, &first, &second);
    serving.running().signal(Signal::SIGHUP);
    serving.running().await_stderr("certificate and key cannot be used");
    assert!(is_shown(&second) && is_refused(&first));
    serving.end();
    world.finish();
}
