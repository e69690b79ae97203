//! `rewarm cp`

use rewarm_store::{Copied, Digest, Store, Target};
use serde::Serialize;

use crate::args::{Cp, Global};
use crate::config::Config;
use crate::failure::Cause;
use crate::render::{Output, bytes, count};

#[derive(Serialize)]
struct Report {
    source: String,
    destination: String,
    variants: Vec<Variant>,
}

#[derive(Serialize)]
struct Variant {
    digest: Digest,
    #[serde(flatten)]
    copied: Copied,
}

pub(crate) async fn run(args: &Cp, global: &Global) -> Result<u8, Cause> {
    let Target::Tag(tag) = &args.destination.target else {
        let problem = "the destination names a digest, expected a tag: a copy keeps its digest".to_owned();
        return Err(Cause::Usage { problem });
    };
    let config = Config::load(global)?;
    let from = config.open(&args.source.store, None).await?;
    // What the destination's readers would refuse is not put there.
    let wanted = config.trust(&args.destination.store)?;
    let to = Store::open(&args.destination.store).await?;
    let mut variants = Vec::new();
    // The newest last, so that it is the newest there too.
    for snapshot in from.resolve_all(&args.source).await?.iter().rev() {
        if let Some(trust) = &wanted {
            snapshot.signed_by(trust).map_err(|source| Cause::NotForDestination {
                digest: snapshot.digest(),
                store: args.destination.store.to_string(),
                source,
            })?;
        }
        let copied = to.copy_from(snapshot, &args.destination.name, tag).await?;
        variants.push(Variant { digest: snapshot.digest(), copied });
    }
    let (source, destination) = (args.source.to_string(), args.destination.to_string());
    Output::new(global).answer(&Report { source, destination, variants }, text)?;
    Ok(0)
}

fn text(report: &Report) -> String {
    let line = |variant: &Variant| {
        let copied = &variant.copied;
        format!(
            "{}: {} copied ({}), {} there already\n",
            variant.digest,
            bytes(copied.bytes),
            count(copied.objects as usize, "object"),
            bytes(copied.present_bytes),
        )
    };
    report.variants.iter().map(line).collect()
}
