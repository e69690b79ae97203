//! `rewarm ls`

use futures::StreamExt;
use rewarm_report::{Class, Classify};
use rewarm_store::{Digest, Listed, Reference, Store, Target, Usage};
use serde::Serialize;

use crate::args::{Global, Ls};
use crate::failure::Cause;
use crate::render::{Output, bytes, table, warn};

/// Manifests that are read at once; each is one small request.
const REQUESTS: usize = 16;

#[derive(Serialize)]
struct List {
    store: String,
    snapshots: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    tag: String,
    digest: Digest,
    created: String,
    variants: usize,
    content_bytes: u64,
    stored_bytes: u64,
    /// What removing this tag and gc would give back; absent where a damaged snapshot hides what it shares.
    unique_bytes: Option<u64>,
    command: Vec<String>,
}

pub(crate) async fn run(args: &Ls, global: &Global) -> Result<u8, Cause> {
    let store = Store::open(&args.store).await?;
    let listed = store.list().await?;
    // A store with a damaged snapshot is listed all the same: this is where one looks for it.
    let usage = match store.usage(&listed).await {
        Ok(usage) => usage.into_iter().map(Some).collect(),
        Err(error) if error.class() == Class::Integrity => {
            warn(&format!("what is unique to a snapshot is not known: {error}; `rewarm verify` says more"));
            vec![None; listed.len()]
        }
        Err(error) => return Err(error.into()),
    };
    let rows = futures::stream::iter(listed.into_iter().zip(usage))
        .map(|(listed, usage)| row(args, &store, listed, usage))
        .buffered(REQUESTS);
    let snapshots = rows.collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<Row>, Cause>>()?;
    let list = List { store: args.store.to_string(), snapshots };
    Output::new(global).answer(&list, text)?;
    Ok(0)
}

async fn row(args: &Ls, store: &Store, listed: Listed, usage: Option<Usage>) -> Result<Row, Cause> {
    let newest =
        listed.index.variants.first().expect("an index without variants is refused when it is read").manifest;
    let target = Target::Digest(newest);
    let snapshot =
        store.resolve(&Reference { store: args.store.clone(), name: listed.name.parse()?, target }).await?;
    let manifest = snapshot.manifest();
    Ok(Row {
        name: listed.name,
        tag: listed.tag,
        digest: newest,
        created: manifest.created.clone(),
        variants: listed.index.variants.len(),
        content_bytes: manifest.totals.content_bytes,
        stored_bytes: manifest.totals.stored_bytes,
        unique_bytes: usage.map(|usage| usage.unique_bytes),
        command: manifest.facts.command.clone(),
    })
}

fn text(list: &List) -> String {
    let rows = list.snapshots.iter().map(|row| {
        let digest = row.digest.to_string();
        vec![
            row.name.clone(),
            row.tag.clone(),
            short(&digest).to_owned(),
            row.created.clone(),
            bytes(row.content_bytes),
            bytes(row.stored_bytes),
            row.unique_bytes.map_or_else(|| "unknown".to_owned(), bytes),
        ]
    });
    table(&["NAME", "TAG", "DIGEST", "CREATED", "MEMORY", "STORED", "UNIQUE"], rows)
}

/// Enough of a digest to tell it from others by eye.
fn short(digest: &str) -> &str {
    const CHARS: usize = "blake3:".len() + 12;
    digest.get(..CHARS).unwrap_or(digest)
}
