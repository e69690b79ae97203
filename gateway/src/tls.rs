//! TLS towards clients: certificate and key, and the choice between HTTP/2 and HTTP/1.1.

use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// What HTTP/2 is called while TLS is agreed on.
pub(crate) const H2: &[u8] = b"h2";

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It is not PEM, or has nothing of what it should have.
    #[error("the {what} is not understood: {reason}")]
    Pem {
        /// `certificate` or `key`.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// They do not fit each other, or the machine.
    #[error("certificate and key cannot be used")]
    Refused(#[from] rustls::Error),
}

/// Accepts connections with this certificate chain and key, both in PEM.
///
/// # Errors
/// One of them is malformed, or they do not belong together.
pub fn acceptor(certificate: &[u8], key: &[u8]) -> Result<TlsAcceptor, TlsError> {
    let bad =
        |what| move |error: rustls::pki_types::pem::Error| TlsError::Pem { what, reason: error.to_string() };
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().map_err(bad("certificate"))?;
    if chain.is_empty() {
        return Err(TlsError::Pem { what: "certificate", reason: "no certificate in it".to_owned() });
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(bad("key"))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let one = rcgen::generate_simple_self_signed(["a.example".to_owned()]).expect("a certificate");
        let other = rcgen::generate_simple_self_signed(["a.example".to_owned()]).expect("a certificate");
        let certificate = one.cert.pem();
        let key = |of: &rcgen::CertifiedKey<rcgen::KeyPair>| of.signing_key.serialize_pem();
        assert!(acceptor(certificate.as_bytes(), key(&one).as_bytes()).is_ok());
        let told = |certificate: &str, key: &str| match acceptor(certificate.as_bytes(), key.as_bytes()) {
            Ok(_) => panic!("it is refused"),
            Err(error) => error.to_string(),
        };
        assert_eq!(told(&certificate, &key(&other)), "certificate and key cannot be used");
        assert_eq!(told("", &key(&one)), "the certificate is not understood: no certificate in it");
        assert!(told(&certificate, "").starts_with("the key is not understood: "));
    }
}
