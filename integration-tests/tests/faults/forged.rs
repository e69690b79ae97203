//! Snapshots by somebody who may write the store and knows the format: every digest is right, and what is said is not.
//!
//! Each is refused with its object named before memory is taken for what it claims: the commands run with a limit.

use std::fs;

use rewarm_integration_tests::World;
use rewarm_integration_tests::checks::{no_residue, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_store::Digest;
use rewarm_store::parsers::{self, LeafChunk};
use serde_json::{Value, json};

use super::filling::snapshot_of;
use crate::world_for;

/// Data of any process of a restore, its command and the fetcher included. What is claimed is more, what is needed is less.
const DATA_MAX: u64 = 1 << 30;
/// Ids of codecs in a leaf.
const RAW: u8 = 0;
const ZSTD: u8 = 2;

/// A snapshot, and what is made of it.
struct Scene {
    world: World,
    server: Server,
    manifest: Value,
    boot: Vec<u8>,
}

impl Scene {
    fn new() -> Option<(Self, rewarm_integration_tests::checks::Answers)> {
        let server = Server::plain();
        let world = world_for(&server)?;
        let before = snapshot_of(&world, &server);
        let folder = world.store_folder();
        let only = |name: &str| {
            let mut rows = fs::read_dir(folder.join(name)).expect("a folder").flatten();
            let row = rows.next().expect("an object").path();
            assert!(rows.next().is_none(), "more than one object in {name}");
            fs::read(row).expect("our own folder")
        };
        let text = String::from_utf8(only("manifests")).expect("text");
        let manifest = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
        let boot = only("boots");
        Some((Self { world, server, manifest, boot }, before))
    }

    fn raw_bytes(&self) -> u64 {
        self.manifest["boot"]["raw_bytes"].as_u64().expect("a length")
    }

    fn put(&self, kind: &str, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        fs::write(self.world.store_folder().join(kind).join(digest.hex()), bytes).expect("our own folder");
        digest.to_string()
    }

    /// Stores a manifest, and gives its digest.
    fn manifest(&self, manifest: &Value) -> String {
        self.put("manifests", format!("{manifest}\n{{\"signatures\":[]}}\n").as_bytes())
    }

    /// Stores a boot object and a manifest that names it, and gives the manifest's digest.
    fn boot(&self, bytes: &[u8], raw_bytes: u64) -> String {
        let digest = self.put("boots", bytes);
        let mut manifest = self.manifest.clone();
        manifest["boot"] = json!({ "digest": digest, "bytes": bytes.len(), "raw_bytes": raw_bytes });
        self.manifest(&manifest)
    }

    /// Stores a snapshot of which one chunk was forged.
    fn chunk(&self, forge: impl FnOnce(&str, &mut LeafChunk)) -> String {
        let (bytes, raw_bytes) = parsers::forged_chunk(&self.boot, self.raw_bytes(), forge);
        self.boot(&bytes, raw_bytes)
    }

    /// The restore of a snapshot, in every mode, is refused with these texts and leaves nothing, and `verify` refuses it too.
    fn refused(&self, digest: &str, texts: &[&str]) {
        self.refused_otherwise(digest, texts, texts);
    }

    /// The same where `verify`, which knows nothing of processes, says something else.
    fn refused_otherwise(&self, digest: &str, texts: &[&str], verified: &[&str]) {
        for mode in ["lazy", "eager"] {
            let traces = self.world.traces();
            let call = self.world.restore_call("plain", digest, self.server.port, &["--mode", mode]);
            let output = call.under("prlimit", &[&format!("--data={DATA_MAX}:")]).fails(5);
            output.says(texts);
            no_residue(&self.world, &traces);
        }
        let reference = self.world.reference("plain", digest);
        let output = self.world.rewarm().args(["verify", &reference]).fails(5);
        output.says(verified);
    }

    fn finish(self, before: &rewarm_integration_tests::checks::Answers) {
        // It was the forger's snapshots that were refused, and not every one.
        let clones = self.world.restore("plain", "v1", self.server.port, &[]);
        server_answers_as_before(&clones[0], &self.server, before);
        self.world.finish();
    }
}

/// A bomb: 64 MiB of zeros in some thousand bytes.
fn bomb() -> Vec<u8> {
    let bomb = parsers::encoded(ZSTD, &vec![0; 64 << 20]).expect("zeros become shorter");
    assert!(bomb.len() < 16 << 10, "{} bytes", bomb.len());
    bomb
}

#[test]
fn a_chunk_outside_of_its_pack_is_refused() {
    let Some((scene, before)) = Scene::new() else { return };
    let beyond = scene.chunk(|_, chunk| chunk.offset = u32::MAX - chunk.stored);
    scene.refused(&beyond, &["leaf in the boot object", "end of a chunk in its pack"]);
    let longer = scene.chunk(|_, chunk| chunk.stored = 60 << 20);
    scene.refused(&longer, &["leaf in the boot object", "end of a chunk in its pack"]);
    let nowhere = scene.chunk(|_, chunk| chunk.pack = 1_000_000);
    scene.refused(&nowhere, &["leaf in the boot object", "pack of a chunk", "1000000"]);
    let long = scene.chunk(|_, chunk| chunk.pages = (1 << 20) - 1);
    let contradiction = ["contradicts itself", "task 1"];
    scene.refused_otherwise(&long, &contradiction, &["leaf in the boot object", "pages of a chunk"]);
    scene.finish(&before);
}

/// Within its pack, but not where the chunk lies: its content is not what its id says.
#[test]
fn a_chunk_at_another_place_of_its_pack_is_refused() {
    let Some((scene, before)) = Scene::new() else { return };
    let mut object = String::new();
    let elsewhere = scene.chunk(|pack, chunk| {
        pack.clone_into(&mut object);
        chunk.offset = 17;
        chunk.stored = chunk.pages * 4096;
        chunk.codec = RAW;
    });
    scene.refused(&elsewhere, &[&object, "damaged"]);
    scene.finish(&before);
}

#[test]
fn a_decompression_bomb_is_refused() {
    let Some((scene, before)) = Scene::new() else { return };
    let bomb = bomb();
    // In a pack: the chunk's place holds a bomb.
    let mut place = (String::new(), 0);
    let packed = scene.chunk(|pack, chunk| {
        place = (pack.to_owned(), chunk.offset as usize);
        chunk.codec = ZSTD;
        chunk.stored = u32::try_from(bomb.len()).expect("short");
    });
    let path = scene.world.store_folder().join(&place.0);
    let intact = fs::read(&path).expect("our own folder");
    let mut bytes = intact.clone();
    bytes[place.1..place.1 + bomb.len()].copy_from_slice(&bomb);
    fs::write(&path, bytes).expect("our own folder");
    scene.refused(&packed, &[&place.0, "damaged"]);
    fs::write(&path, intact).expect("our own folder");
    // As the boot object: the header stays, and so does the announced length.
    let bytes = [&scene.boot[..parsers::BOOT_HEADER_BYTES], &bomb].concat();
    let boot = scene.boot(&bytes, scene.raw_bytes());
    scene.refused(&boot, &["boots/", "damaged"]);
    scene.finish(&before);
}

#[test]
fn numbers_that_no_snapshot_has_are_refused_before_memory_is_taken() {
    let Some((scene, before)) = Scene::new() else { return };
    let boot = scene.boot.clone();
    for announced in [300 << 20, 1 << 50, u64::MAX] {
        scene.refused(&scene.boot(&boot, announced), &["boots/", "bytes of a boot object"]);
    }
    // As much content as the format allows, and more.
    let (bytes, raw_bytes) = parsers::forged_length(&boot, scene.raw_bytes(), 1 << 45);
    let contradiction = ["contradicts itself", "task 1"];
    scene.refused_otherwise(&scene.boot(&bytes, raw_bytes), &contradiction, &["leaf in the boot object"]);
    let (bytes, raw_bytes) = parsers::forged_length(&boot, scene.raw_bytes(), 1 << 50);
    scene.refused(&scene.boot(&bytes, raw_bytes), &["boots/", "bytes of content"]);
    // Regions, each a few bytes of text.
    let mut many = scene.manifest.clone();
    let region = many["regions"][0].clone();
    many["regions"] = vec![region; usize::try_from(parsers::REGIONS_LIMIT).expect("a count") + 1].into();
    scene.refused(&scene.manifest(&many), &["manifests/", "regions"]);
    // An object of 64 GiB that takes no room on the disk, under the name of a manifest.
    let digest = Digest::of(b"nothing has this digest");
    let path = scene.world.store_folder().join("manifests").join(digest.hex());
    fs::File::create(path).and_then(|file| file.set_len(64 << 30)).expect("our own folder");
    scene.refused(&digest.to_string(), &["manifests/", "bytes of the object"]);
    scene.finish(&before);
}
