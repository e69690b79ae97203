//! The checkers that run after every system or fault test.
//!
//! They are the two promises of the design as functions: a replica gives the same answers as before, and a failure
//! leaves nothing behind and everything readable.

use std::collections::BTreeSet;
use std::time::Instant;

use rewarm_report::{Class, Classify};
use rewarm_store::{Listed, Reference, Store, Target};
use serde_json::Value;

use crate::replica::Replica;
use crate::residue::Trace;
use crate::server::{Question, Server};
use crate::world::{CLEAN_UP_MAX, World};

/// Requests at once while a store is verified.
const REQUESTS: usize = 4;

/// What a server answered to its questions.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers(Vec<(String, u16, Value)>);

/// Asks `server`'s questions at `replica`.
///
/// # Panics
///
/// When one gets no answer or one that is not 200.
#[must_use]
pub fn answers(replica: &Replica<'_>, server: &Server) -> Answers {
    assert!(!server.questions.is_empty(), "{} has no questions, so nothing would be compared", server.name);
    Answers(server.questions.iter().map(|question| answer(replica, question)).collect())
}

fn answer(replica: &Replica<'_>, question: &Question) -> (String, u16, Value) {
    let asked = format!("{} {}", question.method, question.path);
    let response = replica
        .ask(question.method, &question.path, question.body.as_deref())
        .unwrap_or_else(|error| panic!("{}: {asked}: {error}", replica.name()));
    assert_eq!(response.status, 200, "{}: {asked}: {}", replica.name(), response.text());
    let mut body = serde_json::from_slice(&response.body).unwrap_or_else(|_| Value::String(response.text()));
    for pointer in &question.except {
        if let Some(value) = body.pointer_mut(pointer) {
            *value = Value::Null;
        }
    }
    (asked, response.status, body)
}

/// Asserts that `replica` holds everything as its server made it (`GET /check`) and gives the same answers as `before`.
///
/// # Panics
///
/// When it does not.
pub fn server_answers_as_before(replica: &Replica<'_>, server: &Server, before: &Answers) {
    let after = answers(replica, server);
    assert_eq!(&after, before, "{}: answers differ", replica.name());
}

/// Asserts that nothing of the world exists that is not in `before`. What a killed command's shim has to clean up may
/// take a while. What lies directly in the state folder (boot id, lock) is made by the first command and stays.
///
/// # Panics
///
/// When something else is there for longer.
pub fn no_residue(world: &World, before: &BTreeSet<Trace>) {
    let state = world.state();
    let own = |trace: &Trace| matches!(trace, Trace::File(path) if path.parent() == Some(&state));
    let began = Instant::now();
    loop {
        let now = world.traces();
        let new: Vec<String> =
            now.difference(before).filter(|trace| !own(trace)).map(Trace::to_string).collect();
        if new.is_empty() {
            return;
        }
        assert!(began.elapsed() < CLEAN_UP_MAX, "left behind:\n  {}", new.join("\n  "));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Asserts that a world whose replicas are all removed has left nothing but the state folder's own files.
///
/// # Panics
///
/// When something else is there.
pub fn nothing_left(world: &World) {
    no_residue(world, &BTreeSet::new());
}

/// The snapshots that a reader of the store sees, as `rewarm ls` tells them.
///
/// # Panics
///
/// When the store cannot be read.
#[must_use]
pub fn visible(world: &World) -> Value {
    world.rewarm_json().args(["ls", world.store()]).ok().json()
}

/// Asserts that no upload has been left half done in a folder, which keeps them as files with a `#` in their name: that is how
/// `object_store` stages what it writes. A bucket does not show them.
///
/// # Panics
///
/// When one is there.
pub fn no_half_uploads(world: &World) {
    if !world.store().starts_with('/') {
        return;
    }
    let mut waiting = vec![world.store_folder()];
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            assert!(!path.to_string_lossy().contains('#'), "half an upload: {}", path.display());
            if path.is_dir() {
                waiting.push(path);
            }
        }
    }
}

/// Asserts that the store shows a snapshot, and that each one can be read as a whole: every byte of it is fetched and compared
/// with its digest.
///
/// # Panics
///
/// When one cannot, or there is none.
pub fn store_verifies(world: &World) {
    assert!(verified(world) > 0, "{} has no snapshots, so nothing was verified", world.store());
}

/// Reads every snapshot that the store shows, and gives their number. A store that was never written to may not be there.
///
/// # Panics
///
/// When one of them is not whole.
pub(crate) fn verified(world: &World) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    // The library reads this process's environment, which all tests share; so the world's variables become options.
    let options: Vec<String> =
        world.straight_env().iter().map(|(name, value)| format!("{}={value}", name.to_lowercase())).collect();
    let query = if options.is_empty() { String::new() } else { format!("?{}", options.join("&")) };
    runtime.block_on(async {
        let url = format!("{}{query}", world.store()).parse().expect("a store");
        let store = Store::open(&url).await.expect("open the store");
        let listed = match store.list().await {
            Err(error) if error.class() == Class::NotFound => return 0,
            listed => listed.unwrap_or_else(|error| panic!("list {}: {error:?}", world.store())),
        };
        let number = listed.len();
        for Listed { name, tag, .. } in listed {
            let target = Target::Tag(tag);
            let reference = Reference { store: url.clone(), name: name.parse().expect("a name"), target };
            for snapshot in
                store.resolve_all(&reference).await.unwrap_or_else(|error| panic!("{reference}: {error:?}"))
            {
                let boot = snapshot.boot().await.unwrap_or_else(|error| panic!("{reference}: {error:?}"));
                let verified = boot
                    .verify(REQUESTS)
                    .await
                    .and_then(rewarm_store::Verified::whole)
                    .unwrap_or_else(|error| panic!("{reference}: {error:?}"));
                assert!(
                    verified.bytes > 0 && !boot.skeleton().is_empty(),
                    "{reference}: empty, {verified:?}"
                );
            }
        }
        number
    })
}
