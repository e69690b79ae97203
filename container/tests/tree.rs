//! Trees on real file systems: what was scanned is what is applied, and nothing leads out.

#[path = "support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mknod};
use proptest::prelude::*;
use rewarm_container::tree::{self, Applier, Entry, Kind, Tree};
use rewarm_container::{Error, Refusal};
use world::needs;

/// All that must be the same: the scanned entries, without what the file system decides (the layout of holes), and the
/// content as a reader sees it.
fn shown(dir: &Path) -> BTreeMap<Vec<u8>, (Entry, Vec<u8>)> {
    let tree = tree::scan(dir).unwrap_or_else(|error| panic!("{error:?}"));
    let entries = tree.entries.into_iter().map(|mut entry| {
        entry.extents.clear();
        let content = match entry.kind() {
            Kind::File => std::fs::read(dir.join(std::ffi::OsStr::from_bytes(&entry.path))).expect("read"),
            _ => Vec::new(),
        };
        (entry.path.clone(), (entry, content))
    });
    entries.collect()
}

/// Scans, stores, reads and applies with chunks in an order of `seed`, from two threads.
fn round_trip(from: &Path, to: &Path, chunk_bytes: usize, seed: usize) -> Tree {
    let tree = Tree::decode(&tree::scan(from).expect("scan").encode()).expect("decode");
    let mut content = Vec::new();
    tree.read(from).read_to_end(&mut content).expect("read");
    assert_eq!(content.len() as u64, tree.stream_bytes());
    assert_eq!(content.len() % 4096, 0);
    let applier = Applier::begin(to, tree.clone()).unwrap_or_else(|error| panic!("{error:?}"));
    let mut chunks: Vec<(u64, &[u8])> = content
        .chunks(chunk_bytes)
        .enumerate()
        .map(|(index, chunk)| ((index * chunk_bytes) as u64, chunk))
        .collect();
    if !chunks.is_empty() {
        let by = seed % chunks.len();
        chunks.rotate_left(by);
    }
    let (first, second) = chunks.split_at(chunks.len() / 2);
    std::thread::scope(|scope| {
        for half in [first, second] {
            let applier = &applier;
            scope.spawn(move || {
                half.iter().rev().for_each(|(at, bytes)| applier.put(*at, bytes).expect("put"))
            });
        }
    });
    assert!(applier.put(tree.stream_bytes(), b"x").is_err(), "beyond the end");
    applier.finish().unwrap_or_else(|error| panic!("{error:?}"));
    tree
}

#[test]
fn every_kind_of_node_comes_back_as_it_was() {
    if !needs(&["root"]) {
        return;
    }
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    let at = |name: &str| from.path().join(name);
    std::fs::create_dir_all(at("dir/deep")).expect("dirs");
    std::fs::write(at("dir/file"), vec![7; 10_000]).expect("file");
    std::fs::hard_link(at("dir/file"), at("dir/deep/other-name")).expect("hard link");
    std::fs::write(at("empty"), b"").expect("file");
    std::fs::write(at("program"), b"#!/bin/sh\n").expect("file");
    std::os::unix::fs::chown(at("program"), Some(33), Some(44)).expect("chown");
    std::fs::set_permissions(at("program"), Permissions::from_mode(0o6755)).expect("mode");
    // A version 2 capability set that permits CAP_NET_BIND_SERVICE.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(at("empty"), "security.capability", &capability).expect("capability");
    xattr::set(at("dir/file"), "user.note", b"kept").expect("xattr");
    xattr::set(at("dir"), "trusted.overlay.opaque", b"y").expect("opaque");
    xattr::set(at("dir"), "trusted.overlay.origin", b"this host's").expect("origin");
    symlink("/etc/passwd", at("link")).expect("link");
    symlink("../../..", at("dir/up")).expect("link");
    mknod(&at("pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).expect("fifo");
    mknod(&at("gone"), SFlag::S_IFCHR, Mode::empty(), 0).expect("whiteout");
    drop(std::os::unix::net::UnixListener::bind(at("socket")).expect("socket"));
    let odd = std::ffi::OsString::from_vec(b"not utf-8 \xff\xfe".to_vec());
    std::fs::write(from.path().join(odd), b"odd").expect("file");
    let sparse = File::create(at("sparse")).expect("file");
    sparse.set_len(1 << 30).expect("length");
    sparse.write_all_at(b"middle", 500 << 20).expect("write");
    drop(sparse);
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::new(1_000_000, 123_456_789);
    File::open(at("dir")).expect("open").set_modified(old).expect("time");
    File::open(at("empty")).expect("open").set_modified(old).expect("time");

    let tree = round_trip(from.path(), to.path(), 8192, 3);
    assert!(tree.stream_bytes() < 1 << 20, "holes take no room");
    let mut expected = shown_small(from.path());
    assert_eq!(shown_small(to.path()), expected);
    let dir = &expected.remove(&b"dir"[..]).expect("dir").0;
    assert_eq!(dir.xattrs.len(), 1, "what ties a file to its host is left out");
    let sparse = to.path().join("sparse").metadata().expect("sparse");
    assert_eq!(sparse.len(), 1 << 30);
    assert!(sparse.blocks() * 512 < 1 << 20, "it is sparse again");
    let mut middle = [0; 6];
    File::open(to.path().join("sparse")).expect("open").read_exact_at(&mut middle, 500 << 20).expect("read");
    assert_eq!(&middle, b"middle");
    let ino = |name: &str| to.path().join(name).metadata().expect("metadata").ino();
    assert_eq!(ino("dir/file"), ino("dir/deep/other-name"));
}

/// Like [`shown`], without reading what is large.
fn shown_small(dir: &Path) -> BTreeMap<Vec<u8>, (Entry, Vec<u8>)> {
    let tree = tree::scan(dir).unwrap_or_else(|error| panic!("{error:?}"));
    let entries = tree.entries.into_iter().map(|mut entry| {
        entry.extents.clear();
        let path = dir.join(std::ffi::OsStr::from_bytes(&entry.path));
        let small = entry.kind() == Kind::File && entry.bytes < 1 << 20;
        let content = if small { std::fs::read(path).expect("read") } else { Vec::new() };
        (entry.path.clone(), (entry, content))
    });
    entries.collect()
}

#[test]
fn a_device_is_refused_with_its_path() {
    if !needs(&["root"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    std::fs::create_dir(dir.path().join("sub")).expect("dir");
    let device = nix::sys::stat::makedev(1, 3);
    mknod(&dir.path().join("sub/null"), SFlag::S_IFCHR, Mode::empty(), device).expect("device");
    match tree::scan(dir.path()) {
        Err(Error::Refused(Refusal::File { path, kind })) => {
            assert_eq!((path.as_str(), kind), ("sub/null", "character device"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_link_that_appears_in_between_is_not_followed() {
    if !needs(&["root"]) {
        return;
    }
    let (from, to, outside) = (
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
    );
    std::fs::create_dir(from.path().join("sub")).expect("dir");
    std::fs::write(from.path().join("sub/file"), vec![1; 4096]).expect("file");
    let tree = tree::scan(from.path()).expect("scan");
    let applier = Applier::begin(to.path(), tree).expect("begin");
    std::fs::rename(to.path().join("sub"), to.path().join("moved")).expect("rename");
    std::fs::write(outside.path().join("file"), b"untouched").expect("file");
    symlink(outside.path(), to.path().join("sub")).expect("link");
    applier.put(0, &[9; 4096]).expect_err("a link in the way");
    applier.finish().expect_err("a link in the way");
    assert_eq!(std::fs::read(outside.path().join("file")).expect("read"), b"untouched");
}

#[test]
fn a_directory_with_something_in_it_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::write(dir.path().join("file"), b"").expect("file");
    let tree =
        Tree { entries: vec![Entry { kind: Kind::Directory.into(), mode: 0o755, ..Entry::default() }] };
    assert!(matches!(Applier::begin(dir.path(), tree), Err(Error::Tree { .. })));
}

#[derive(Debug, Clone)]
enum Node {
    File(Vec<u8>),
    Sparse(u32, Vec<u8>),
    Directory(Vec<(u8, Node)>),
    Link(String),
    Fifo,
    Whiteout,
    Twin,
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..20_000).prop_map(Node::File),
        (0u32..1 << 20, proptest::collection::vec(any::<u8>(), 1..9000))
            .prop_map(|(at, b)| Node::Sparse(at, b)),
        "[a-z/.]{1,30}".prop_map(Node::Link),
        Just(Node::Fifo),
        Just(Node::Whiteout),
        Just(Node::Twin),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        proptest::collection::vec((any::<u8>(), inner), 0..6).prop_map(Node::Directory)
    })
}

fn build(dir: &Path, nodes: &[(u8, Node)], files: &mut Vec<std::path::PathBuf>) {
    for (index, (mode, node)) in nodes.iter().enumerate() {
        let path = dir.join(format!("n{index}"));
        match node {
            Node::File(content) => {
                std::fs::write(&path, content).expect("file");
                std::fs::set_permissions(&path, Permissions::from_mode(u32::from(*mode))).expect("mode");
                files.push(path);
            }
            Node::Sparse(at, content) => {
                let file = File::create(&path).expect("file");
                file.write_all_at(content, u64::from(*at)).expect("write");
                file.set_len(u64::from(*at) * 2 + content.len() as u64).expect("length");
                files.push(path);
            }
            Node::Directory(inner) => {
                std::fs::create_dir(&path).expect("dir");
                build(&path, inner, files);
            }
            Node::Link(target) => symlink(target, &path).expect("link"),
            Node::Fifo => {
                mknod(&path, SFlag::S_IFIFO, Mode::from_bits_truncate(u32::from(*mode)), 0).expect("fifo")
            }
            Node::Whiteout => mknod(&path, SFlag::S_IFCHR, Mode::empty(), 0).expect("whiteout"),
            Node::Twin => {
                if let Some(other) = files.get(usize::from(*mode) % files.len().max(1)) {
                    std::fs::hard_link(other, &path).expect("hard link");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_scanned_comes_back(
        nodes in proptest::collection::vec((any::<u8>(), node()), 0..8),
        pages in 1usize..5,
        seed in any::<usize>(),
    ) {
        if needs(&["root"]) {
            let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
            build(from.path(), &nodes, &mut Vec::new());
            round_trip(from.path(), to.path(), pages * 4096, seed);
            prop_assert_eq!(shown(to.path()), shown(from.path()));
        }
    }

    #[test]
    fn bytes_from_outside_are_refused_or_make_a_tree_that_checks(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(tree) = Tree::decode(&bytes) {
            prop_assert!(tree.check().is_ok());
        }
    }
}
