//! `rewarm verify`

use rewarm_report::Classify;
use rewarm_restore::mappings;
use rewarm_store::{Digest, PublicKey, Snapshot, Verified};
use serde::Serialize;

use crate::args::{Global, Verify};
use crate::config::Config;
use crate::failure::{Cause, Told};
use crate::render::{Output, bytes, count};

/// Packs that are read at the same time; each is in memory as a whole.
const PACKS_AT_ONCE: usize = 4;

#[derive(Serialize)]
struct Report {
    reference: String,
    variants: Vec<Variant>,
}

#[derive(Serialize)]
struct Variant {
    digest: Digest,
    /// Whose signature is trusted, where one is required.
    signer: Option<String>,
    whole: bool,
    content_bytes: u64,
    read_bytes: u64,
    chunks: u64,
    packs: u64,
    /// Every damage, object by object.
    damage: Vec<Told>,
}

pub(crate) async fn run(args: &Verify, global: &Global) -> Result<u8, Cause> {
    let keys = args.require_signature.as_deref();
    let store = Config::load(global)?.open(&args.reference.store, keys).await?;
    let mut report = Report { reference: args.reference.to_string(), variants: Vec::new() };
    let mut causes = Vec::new();
    for snapshot in store.resolve_all(&args.reference).await? {
        let (variant, damage) = verify(&snapshot).await?;
        report.variants.push(variant);
        causes.extend(damage);
    }
    Output::new(global).answer(&report, text)?;
    match causes.len() {
        0 => Ok(0),
        damaged => Err(Cause::Damaged { damaged, causes }),
    }
}

async fn verify(snapshot: &Snapshot) -> Result<(Variant, Vec<Cause>), Cause> {
    let mut damage = Vec::new();
    let mut verified = Verified::default();
    match snapshot.boot().await {
        Ok(boot) => {
            verified = boot.verify(PACKS_AT_ONCE).await?;
            damage.extend(std::mem::take(&mut verified.damage).into_iter().map(Cause::from));
            damage.extend(mappings::check_parts(&boot).err().map(|cause| Cause::Parts(Box::new(cause))));
        }
        // Without it nothing of the rest can be found.
        Err(error) if error.class() == rewarm_report::Class::Integrity => damage.push(error.into()),
        Err(error) => return Err(error.into()),
    }
    let variant = Variant {
        digest: snapshot.digest(),
        signer: snapshot.signer().as_ref().map(PublicKey::to_string),
        whole: damage.is_empty(),
        content_bytes: verified.bytes,
        read_bytes: verified.pack_bytes,
        chunks: verified.chunks,
        packs: verified.packs,
        damage: damage.iter().map(Cause::told).collect(),
    };
    Ok((variant, damage))
}

fn text(report: &Report) -> String {
    report.variants.iter().map(line).collect()
}

fn line(variant: &Variant) -> String {
    let state = if variant.whole {
        "is whole".to_owned()
    } else {
        format!("has {}", count(variant.damage.len(), "damage"))
    };
    let signer = match &variant.signer {
        Some(key) => format!(", signed by {key}"),
        None => String::new(),
    };
    format!(
        "{} {state}: {} of content in {}, {} read{signer}\n",
        variant.digest,
        bytes(variant.content_bytes),
        count(variant.packs as usize, "pack"),
        bytes(variant.read_bytes),
    )
}
