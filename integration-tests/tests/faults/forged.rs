//! Snapshots by somebody who may write the store and knows the format: every digest is right, and what is said is not.
//!
//! Each is refused with its object named before memory is taken for what it claims: the commands run with a limit.

use std::collections::BTreeMap;
use std::fs;

use rewarm_integration_tests::World;
use rewarm_integration_tests::checks::{no_residue, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_store::Digest;
use rewarm_store::parsers::{self, LeafChunk};
use serde_json::{Value, json};

use super::filling::snapshot_with;
use crate::world_for;

mod image;

use image::Message;

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
        Self::with(&[])
    }

    /// With further flags of `rewarm run`.
    fn with(flags: &[&str]) -> Option<(Self, rewarm_integration_tests::checks::Answers)> {
        let server = Server::plain();
        let world = world_for(&server)?;
        let before = snapshot_with(&world, &server, flags);
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

    /// Stores a snapshot of which CRIU's images were forged.
    fn images(&self, forge: impl FnOnce(&mut BTreeMap<String, Vec<u8>>)) -> String {
        let (bytes, raw_bytes) = parsers::forged_files(&self.boot, self.raw_bytes(), forge);
        self.boot(&bytes, raw_bytes)
    }

    /// The restore of a snapshot, in every mode, is refused with these texts and leaves nothing, and `verify` refuses it too.
    fn refused(&self, digest: &str, texts: &[&str]) {
        self.refused_otherwise(digest, texts, texts);
    }

    /// The same where `verify` says something else.
    fn refused_otherwise(&self, digest: &str, texts: &[&str], verified: &[&str]) {
        self.restore_fails(digest, 5, texts);
        let reference = self.world.reference("plain", digest);
        let output = self.world.rewarm().args(["verify", &reference]).fails(5);
        output.says(verified);
    }

    /// The restore of a snapshot, in every mode, ends with this code and these texts and leaves nothing.
    fn restore_fails(&self, digest: &str, code: i32, texts: &[&str]) {
        for mode in ["lazy", "eager"] {
            let traces = self.world.traces();
            let call = self.world.restore_call("plain", digest, self.server.port, &["--mode", mode]);
            let output = call.under("prlimit", &[&format!("--data={DATA_MAX}:")]).fails(code);
            output.says(texts);
            no_residue(&self.world, &traces);
        }
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

/// Fields of CRIU's messages: what belongs to the task and to the thread in its core image, and in the latter its credentials.
const TASK: u32 = 3;
const THREAD: u32 = 5;
const CREDENTIALS: u32 = 10;

/// A mount of a disk of the host, as CRIU would make it.
fn host_mount() -> Vec<u8> {
    const AUTO: u64 = 16;
    let [kind, id, device, parent, flags, root, mountpoint, source, options, name] =
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 14];
    let numbers = [(kind, AUTO), (id, 9999), (device, 0x801), (parent, 1), (flags, 0)];
    let numbers =
        numbers.into_iter().fold(Message::default(), |all, (number, value)| all.numbers(number, &[value]));
    let texts = [(root, "/"), (mountpoint, "./host"), (source, "/dev/sda1"), (options, ""), (name, "ext4")];
    texts.into_iter().fold(numbers, |all, (number, text)| all.text(number, text)).bytes()
}

/// CRIU gives tasks what the images say. Whoever may write the store must not become root by it.
#[test]
fn images_that_ask_for_more_rights_than_the_bundle_gives_are_refused() {
    let Some((scene, before)) = Scene::new() else { return };
    let core = |change: fn(Message) -> Message| {
        scene.images(|files| image::change(files.get_mut("core-1.img").expect("the first task"), change))
    };
    let capabilities = core(|core| {
        let all = [u64::from(u32::MAX), 0x1ff];
        let sets = [9, 10, 11, 12, 19];
        let credentials =
            |credentials: Message| sets.iter().fold(credentials, |all_of, set| all_of.numbers(*set, &all));
        core.inside(THREAD, |thread| thread.inside(CREDENTIALS, credentials))
    });
    let unfiltered = core(|core| core.inside(THREAD, |thread| thread.numbers(11, &[0]).numbers(12, &[])));
    let privileged =
        core(|core| core.inside(THREAD, |thread| thread.inside(CREDENTIALS, |all| all.numbers(18, &[0]))));
    // The out-of-memory killer passes it over: -999 as a number of 64 bits.
    let spared = core(|core| core.inside(TASK, |task| task.numbers(14, &[(-999_i64).cast_unsigned()])));
    let mount = scene.images(|files| {
        let (_, mounts) =
            files.iter_mut().find(|(name, _)| name.starts_with("mountpoints-")).expect("mounts");
        image::append(mounts, &host_mount());
    });
    let stray = scene.images(|files| drop(files.insert("iptables-9.img".to_owned(), b"*nat".to_vec())));
    for (digest, text) in [
        (&capabilities, "CAP_SYS_ADMIN, "),
        (&unfiltered, "thread 1 has no filter of system calls"),
        (&privileged, "thread 1 has not given up new privileges"),
        (&spared, "thread 1 has oom_score_adj -999"),
        (&mount, "mount of ext4 (/dev/sda1) at /host is not in the replica's configuration"),
        (&stray, "image directory has iptables-9.img"),
    ] {
        scene.restore_fails(digest, 3, &["the images ask for more than the bundle allows", text]);
    }
    scene.finish(&before);
}

/// A server that was started as somebody without rights has no way to get any, so images that give it some were forged.
#[test]
fn images_that_make_another_user_of_the_server_are_refused() {
    let Some((scene, before)) = Scene::with(&["--user", "65534:65534", "--workdir", "/tmp"]) else { return };
    let credentials = |change: fn(Message) -> Message| {
        scene.images(|files| {
            let core = files.get_mut("core-1.img").expect("the first task");
            image::change(core, |core| core.inside(THREAD, |thread| thread.inside(CREDENTIALS, change)));
        })
    };
    // CRIU's numbers: the effective user and group, the saved user, effective capabilities, supplementary groups.
    let root = credentials(|all| all.numbers(3, &[0]));
    let later = credentials(|all| all.numbers(5, &[0]));
    let group = credentials(|all| all.numbers(4, &[0]));
    let member = credentials(|all| all.numbers(14, &[65534, 6]));
    let able = credentials(|all| all.numbers(10, &[1 << 7]));
    let stays = "the replica is user 65534 and cannot become another";
    let joins = "the replica is in 65534 and cannot join another";
    for (digest, texts) in [
        (&root, ["thread 1 is user 0", stays]),
        (&later, ["thread 1 is user 0", stays]),
        (&group, ["thread 1 is in group 0", joins]),
        (&member, ["thread 1 is in group 6", joins]),
        (&able, ["thread 1 has CAP_SETUID in its permitted set", "not granted"]),
    ] {
        scene.restore_fails(digest, 3, &texts);
    }
    scene.finish(&before);
}

/// More mappings and more runs of pages than any process has, in some megabytes that would become gigabytes.
#[test]
fn more_mappings_than_any_process_has_are_refused() {
    let Some((scene, before)) = Scene::new() else { return };
    // Two bytes each: an empty message in the field of mappings.
    let mappings = [14 << 3 | 2, 0].repeat((1 << 20) + 1);
    let many =
        scene.images(|files| image::set(files.get_mut("mm-1.img").expect("the first task"), &mappings));
    scene.restore_fails(&many, 5, &["number of mappings is 1048577"]);
    let claimed = scene.images(|files| {
        let image = files.get_mut("mm-1.img").expect("the first task");
        image[8..12].copy_from_slice(&2_000_000_000_u32.to_le_bytes());
    });
    scene.restore_fails(&claimed, 5, &["length of a record is 2000000000"]);
    // A gap, a length and a kind for each run: 10^9 of them would take three gigabytes, these claim to be 24 million gaps.
    let runs = |gaps: usize, pages: usize, kinds: usize| {
        let mut meta = Message::default().text(1, &"\u{1}".repeat(gaps)).text(2, &"\u{1}".repeat(pages));
        meta = meta.text(3, &"\0".repeat(kinds));
        let (bytes, raw_bytes) = parsers::forged_meta(&scene.boot, scene.raw_bytes(), meta.bytes());
        scene.boot(&bytes, raw_bytes)
    };
    let count = (1 << 20) + 1;
    scene.restore_fails(&runs(count, count, count), 5, &["layout has 1048577 runs"]);
    scene.restore_fails(&runs(24_000_000, 1, 1), 5, &["layout has 24000000 runs"]);
    scene.finish(&before);
}

/// `verify` says it before anybody restores.
#[test]
fn a_snapshot_that_lacks_what_a_restore_reads_is_not_whole() {
    let Some((scene, before)) = Scene::new() else { return };
    let without = |name: &str| scene.images(|files| drop(files.remove(name).expect("an image")));
    // Nothing but its head.
    let bare = scene.images(|files| files.get_mut("pstree.img").expect("the tree").truncate(8));
    let renamed = scene.images(|files| {
        let [pid, threads] = [1, 5];
        image::change(files.get_mut("pstree.img").expect("the tree"), |task| {
            task.numbers(pid, &[2]).numbers(threads, &[2])
        });
        for image in ["core", "mm"] {
            let of_one = files.remove(&format!("{image}-1.img")).expect("the first task");
            files.insert(format!("{image}-2.img"), of_one);
        }
    });
    for (digest, text) in [
        (without("mm-1.img"), "mm-1.img"),
        (without("core-1.img"), "core-1.img"),
        (without("files.img"), "files.img"),
        (without("inventory.img"), "inventory.img"),
        (bare, "pstree.img: has no task"),
        (renamed, "there are pages of process 1, which is not in the tree"),
    ] {
        let reference = scene.world.reference("plain", &digest);
        scene
            .world
            .rewarm()
            .args(["verify", &reference])
            .fails(5)
            .says(&["1 of what was read is damaged", text]);
    }
    scene.finish(&before);
}
