//! Who made a snapshot: Ed25519 signatures over a manifest, and the demand for them.
//!
//! A signature covers the exact bytes of a manifest's first line, which names the boot object by its digest, which names
//! everything else: whoever trusts the key trusts every byte. It says who made the snapshot and not under which tag it
//! lies: a tag can be turned back to an older snapshot that the same key signed. Whoever must exclude that restores by
//! digest.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, KeypairBytes};
use ed25519_dalek::{Signer, VerifyingKey};

use crate::format::manifest::{Seal, Signature};

/// The only algorithm of version 1.
const ALGORITHM: &str = "ed25519";

/// Signs manifests. Shown by its public part only.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

/// Checks what its secret part signed. Written as `ed25519:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

/// Why a text or a file is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySyntax {
    /// Not of the form of a public key.
    #[error("expected ed25519: and 64 lower-case hexadecimal digits, found {0:?}")]
    Public(String),
    /// The right form, but no point of the curve.
    #[error("{0} is no key of Ed25519")]
    Point(String),
    /// Not a secret key in PKCS 8.
    #[error("expected an Ed25519 key in PKCS 8, which begins with -----BEGIN PRIVATE KEY-----: {0}")]
    Secret(String),
}

/// Why a manifest is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mistrust {
    /// Nobody signed it.
    #[error("it has no signature, expected one by {}", list(expected))]
    Missing {
        /// The keys that are trusted.
        expected: Vec<PublicKey>,
    },
    /// Others signed it.
    #[error("it is signed by {}, expected {}", found.join(", "), list(expected))]
    Unknown {
        /// The keys as its seal names them.
        found: Vec<String>,
        /// The keys that are trusted.
        expected: Vec<PublicKey>,
    },
    /// The signature is one of another manifest, or the manifest was changed.
    #[error("the signature by {key} does not fit: it was made for another manifest, or this one was changed")]
    Wrong {
        /// The key whose signature does not fit.
        key: PublicKey,
    },
}

fn list(keys: &[PublicKey]) -> String {
    keys.iter().map(PublicKey::to_string).collect::<Vec<_>>().join(" or ")
}

/// The keys of which one must have signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    keys: Vec<PublicKey>,
}

impl SigningKey {
    /// Makes a key from the kernel's random bytes.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn generate() -> std::io::Result<Self> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(std::io::Error::other)?;
        Ok(Self(ed25519_dalek::SigningKey::from_bytes(&secret)))
    }

    /// Its public part.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// The key in PKCS 8, as PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        // Without the public part, which version 1 of PKCS 8 has no place for: `openssl pkey` reads this form only.
        let pair = KeypairBytes { secret_key: self.0.to_bytes(), public_key: None };
        pair.to_pkcs8_pem(LineEnding::LF).expect("48 bytes of DER can be written").to_string()
    }

    /// Reads what [`SigningKey::to_pem`] or `openssl genpkey -algorithm ed25519` wrote.
    ///
    /// # Errors
    /// [`KeySyntax::Secret`] if it is something else.
    pub fn from_pem(text: &str) -> Result<Self, KeySyntax> {
        ed25519_dalek::SigningKey::from_pkcs8_pem(text)
            .map(Self)
            .map_err(|error| KeySyntax::Secret(error.to_string()))
    }

    /// Signs the first line of a manifest.
    pub(crate) fn sign(&self, line: &[u8]) -> Signature {
        let value = self.0.sign(line).to_bytes();
        Signature { algorithm: ALGORITHM.to_owned(), key: self.public().hex(), value: hex(&value) }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public())
    }
}

impl PublicKey {
    /// The 64 hexadecimal digits alone, as they stand in a seal.
    #[must_use]
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// Whether its secret part made this signature. In the strict form: one signature has one spelling, and a key of small
    /// order signs nothing.
    fn made(&self, signature: &[u8; 64], line: &[u8]) -> bool {
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        VerifyingKey::from_bytes(&self.0).is_ok_and(|key| key.verify_strict(line, &signature).is_ok())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ALGORITHM}:{}", self.hex())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeySyntax;

    fn from_str(text: &str) -> Result<Self, KeySyntax> {
        let digits = text.strip_prefix(ALGORITHM).and_then(|rest| rest.strip_prefix(':'));
        let bytes = digits.and_then(bytes).ok_or_else(|| KeySyntax::Public(text.to_owned()))?;
        VerifyingKey::from_bytes(&bytes).map(|_| Self(bytes)).map_err(|_| KeySyntax::Point(text.to_owned()))
    }
}

impl Trust {
    /// Trusts whoever holds one of these keys; nobody if there is none.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = PublicKey>) -> Self {
        Self { keys: keys.into_iter().collect() }
    }

    /// The keys.
    #[must_use]
    pub fn keys(&self) -> &[PublicKey] {
        &self.keys
    }

    /// Trusts only whom both trust.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self::new(self.keys.iter().filter(|key| other.keys.contains(key)).copied())
    }

    /// Whose signature makes this manifest object, as it lies in a store, trusted. Its digest is not looked at.
    ///
    /// # Errors
    /// Why it is not.
    pub fn check(&self, manifest: &[u8]) -> Result<PublicKey, Mistrust> {
        let mut lines = manifest.splitn(2, |&byte| byte == b'\n');
        let (line, seal) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        // A seal that cannot be read holds no signature; the reader of the manifest says what is wrong with it.
        self.check_seal(line, &serde_json::from_slice(seal).unwrap_or_default())
    }

    pub(crate) fn check_seal(&self, line: &[u8], seal: &Seal) -> Result<PublicKey, Mistrust> {
        let mut wrong = None;
        for signature in seal.signatures.iter().filter(|signature| signature.algorithm == ALGORITHM) {
            let Some(key) = self.keys.iter().find(|key| key.hex() == signature.key) else { continue };
            match bytes(&signature.value) {
                Some(value) if key.made(&value, line) => return Ok(*key),
                _ => wrong = Some(*key),
            }
        }
        let expected = self.keys.clone();
        Err(match wrong {
            Some(key) => Mistrust::Wrong { key },
            None if seal.signatures.is_empty() => Mistrust::Missing { expected },
            None => {
                let named = |one: &Signature| format!("{}:{}", one.algorithm, one.key);
                Mistrust::Unknown { found: seal.signatures.iter().map(named).collect(), expected }
            }
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower-case hexadecimal digits as bytes, if there are as many as asked for.
fn bytes<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if digits.len() != 2 * N || !digits.bytes().all(plain) {
        return None;
    }
    let mut out = [0; N];
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(line: &[u8], keys: &[&SigningKey]) -> Vec<u8> {
        let seal = Seal { signatures: keys.iter().map(|key| key.sign(line)).collect() };
        [line, b"\n", &serde_json::to_vec(&seal).unwrap(), b"\n"].concat()
    }

    #[test]
    fn a_key_reads_back_from_its_file_and_its_text() {
        let key = SigningKey::generate().unwrap();
        let again = SigningKey::from_pem(&key.to_pem()).unwrap();
        assert_eq!(again.public(), key.public());
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        assert!(!format!("{key:?}").contains(&hex(&key.0.to_bytes())), "a secret is shown");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let text = SigningKey::generate().unwrap().public().to_string();
        for bad in ["", "ed25519:", &text[8..], &text[..70], &text.to_uppercase()] {
            assert_eq!(bad.parse::<PublicKey>(), Err(KeySyntax::Public(bad.to_owned())));
        }
        // No point of the curve has this coordinate.
        let point = format!("ed25519:02{}", "00".repeat(31));
        assert_eq!(point.parse::<PublicKey>(), Err(KeySyntax::Point(point)));
        assert!(matches!(SigningKey::from_pem("nothing"), Err(KeySyntax::Secret(_))));
    }

    /// RFC 8032, section 7.1, test 2: other programs can check what this one signs.
    #[test]
    fn signatures_are_those_of_the_standard() {
        let secret = bytes("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap();
        let key = SigningKey(ed25519_dalek::SigningKey::from_bytes(&secret));
        assert_eq!(key.public().hex(), "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
        let expected = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                        085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";
        assert_eq!(key.sign(&[0x72]).value, expected);
    }

    #[test]
    fn one_trusted_signature_is_enough_and_nothing_less_is() {
        let [ours, other, theirs] = [(); 3].map(|()| SigningKey::generate().unwrap());
        let trust = Trust::new([other.public(), ours.public()]);
        assert_eq!(trust.check(&signed(b"{}", &[&theirs, &ours])), Ok(ours.public()));
        assert!(matches!(trust.check(&signed(b"{}", &[])), Err(Mistrust::Missing { .. })));
        assert!(matches!(trust.check(b""), Err(Mistrust::Missing { .. })));
        assert!(matches!(trust.check(&signed(b"{}", &[&theirs])), Err(Mistrust::Unknown { .. })));
        let nobody = Trust::new([]);
        assert!(matches!(nobody.check(&signed(b"{}", &[&ours])), Err(Mistrust::Unknown { .. })));
        let mut changed = signed(b"{}", &[&ours]);
        changed[0] = b'[';
        assert_eq!(trust.check(&changed), Err(Mistrust::Wrong { key: ours.public() }));
        let text = String::from_utf8(signed(b"{}", &[&ours])).unwrap();
        let algorithm = text.replace("\"ed25519\"", "\"none\"");
        assert!(matches!(trust.check(algorithm.as_bytes()), Err(Mistrust::Unknown { .. })));
    }
}
