//! Image files with bytes that CRIU never wrote: every reader and every patch ends with a result or an error.

use std::fs;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use rewarm_criu::admission::{self, Allowed, Capabilities};
use rewarm_criu::image::core::SeccompMode;
use rewarm_criu::image::{core, files, inventory, mm, mounts, namespaces, pagemap, pstree, seccomp};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_criu::{patch, stats};

/// Files of an image directory with the magic numbers that they start with.
const FILES: &[(&str, &[u32])] = &[
    ("inventory.img", &[0x5831_3116]),
    ("pstree.img", &[0x5456_4319, 0x5027_3030]),
    ("core-1.img", &[0x5456_4319, 0x5505_3847]),
    ("ids-1.img", &[0x5456_4319, 0x5443_2030]),
    ("mm-1.img", &[0x5456_4319, 0x5749_2820]),
    ("files.img", &[0x5456_4319, 0x5630_3138]),
    ("fdinfo-1.img", &[0x5456_4319, 0x5621_3732]),
    ("mountpoints-1.img", &[0x5456_4319, 0x5556_3928]),
    ("pagemap-1.img", &[0x5456_4319, 0x5608_4025]),
    ("ghost-file-1.img", &[0x5456_4319, 0x5258_3605]),
    ("remap-fpath.img", &[0x5456_4319, 0x5913_3954]),
    ("userns-1.img", &[0x5456_4319, 0x5547_4906]),
    ("timens-0.img", &[0x5456_4319, 0x4311_4433]),
    ("seccomp.img", &[0x5456_4319, 0x6441_3049]),
    ("stats-dump", &[0x5510_5940, 0x5709_3306]),
];

fn read_everything(directory: &Path) {
    let _ = inventory::read(directory);
    let _ = pstree::read(directory);
    let _ = core::read(directory, 1);
    let _ = core::ids(directory, 1);
    let _ = mm::read(directory, 1);
    let _ = files::read(directory);
    let _ = files::descriptors(directory);
    let _ = files::remapped(directory);
    let _ = files::ghosts(directory);
    let _ = mounts::read(directory);
    let _ = namespaces::clocks(directory);
    let _ = namespaces::users(directory);
    let _ = seccomp::read(directory);
    let _ = stats::dump(directory);
    let _ = pagemap::read(directory, Object::Task { pid: 1 });
    let _ = pagemap::make_lazy(directory, Object::Task { pid: 1 }, |_, _| Ok(()));
    let _ = admission::connections(directory);
    let _ = admission::listeners(directory);
    let _ = admission::host_files(directory);
    let allowed = Allowed {
        identity: admission::Identity { user: Some(1000), groups: Some(vec![1000]) },
        capabilities: Capabilities::default(),
        no_new_privs: true,
        seccomp: SeccompMode::Filter,
        denied_syscalls: vec![425],
        mounts: Vec::new(),
        own_namespaces: vec![admission::Namespace::Pid],
        oom_score_adj_min: 0,
        devices: Vec::new(),
    };
    if let Ok(violations) = admission::check(directory, &allowed) {
        violations.iter().for_each(|violation| assert!(!violation.to_string().is_empty()));
    }
    let _ = patch::rearm_timerfds(directory);
    let _ = patch::forward_alarms(directory, Duration::from_secs(1));
    let _ = patch::close_connections(directory, &[1, 2]);
    let _ = patch::advise_huge_pages(directory, 1, std::slice::from_ref(&(0..u64::MAX)));
    let _ = patch::block_child_stops(directory);
    let clocks = namespaces::Clocks { monotonic: Duration::ZERO, boottime: Duration::ZERO };
    let _ = patch::set_clocks(directory, clocks);
}

/// A message that is well-formed, with fields that the readers look for, nested three deep.
fn protobuf() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![(0_u64..40), any::<u64>(), Just(4096), Just(1 << 47), Just(u64::MAX),];
    let leaf = prop_oneof![
        (1_u8..21, number).prop_map(|(field, value)| {
            let mut bytes = vec![];
            varint(&mut bytes, u64::from(field) << 3);
            varint(&mut bytes, value);
            bytes
        }),
        (1_u8..21, proptest::collection::vec(any::<u8>(), 0..24))
            .prop_map(|(field, value)| nested(field, &value)),
    ];
    leaf.prop_recursive(3, 60, 8, |inner| {
        (1_u8..21, proptest::collection::vec(inner, 0..8))
            .prop_map(|(field, parts)| nested(field, &parts.concat()))
    })
}

fn nested(field: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(&mut bytes, u64::from(field) << 3 | 2);
    varint(&mut bytes, value.len() as u64);
    bytes.extend_from_slice(value);
    bytes
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn image(magic: &[u32], records: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes: Vec<u8> = magic.iter().flat_map(|magic| magic.to_le_bytes()).collect();
    for record in records {
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(record);
    }
    bytes
}

fn fill(directory: &Path, content: impl Fn(usize, &[u32]) -> Vec<u8>) {
    for (index, (name, magic)) in FILES.iter().enumerate() {
        fs::write(directory.join(name), content(index, magic)).expect("an image file");
    }
    fs::write(directory.join("pages-1.img"), [0; 8192]).expect("pages");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_bytes_behind_the_right_numbers(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let folder = tempfile::tempdir().expect("a folder");
        fill(folder.path(), |_, magic| [image(magic, &[]), bytes.clone()].concat());
        read_everything(folder.path());
    }

    #[test]
    fn any_messages(records in proptest::collection::vec(proptest::collection::vec(protobuf(), 0..8), 15)) {
        let folder = tempfile::tempdir().expect("a folder");
        // A tree with the task that the other files are of, so that they are looked at.
        let tree = image(FILES[1].1, &[vec![8, 1, 16, 0, 24, 1, 32, 1, 40, 1]]);
        fill(folder.path(), |index, magic| match index {
            1 => tree.clone(),
            _ => image(magic, &records[index]),
        });
        read_everything(folder.path());
    }

    #[test]
    fn a_pagemap_comes_back_as_it_was_written(
        gaps in proptest::collection::vec((0_u64..1000, 1_u64..1000, 1_u32..8), 0..50),
        pages_id in any::<u32>(),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut behind = 0;
        let mut entries = Vec::new();
        for (gap, pages, flags) in gaps {
            let vaddr = behind + gap * 4096;
            entries.push(pagemap::Entry { vaddr, pages, flags: Flags::from_bits(flags).expect("flags") });
            behind = vaddr + pages * 4096;
        }
        let written = pagemap::Pagemap { pages_id, entries };
        for object in [Object::Task { pid: 3 }, Object::Shmem { id: 77 }] {
            pagemap::write(folder.path(), object, &written).expect("written");
            prop_assert_eq!(&pagemap::read(folder.path(), object).expect("read"), &written);
        }
    }
}

#[test]
fn sizes_that_lie_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("files.img");
    let magic = image(FILES[5].1, &[]);
    let text = |bytes: &[u8]| {
        fs::write(&path, [&magic[..], bytes].concat()).expect("an image file");
        let error = files::read(folder.path()).expect_err("refused");
        std::error::Error::source(&error).expect("a source").to_string()
    };
    assert_eq!(text(&[1, 0]), "ends at byte 10, inside a record that needs byte 12");
    assert_eq!(text(&[9, 0, 0, 0, 1]), "ends at byte 13, inside a record that needs byte 21");
    assert_eq!(text(&[0xff; 4]), "length of a record is 4294967295, at most 8388608 is accepted");
    fs::write(&path, [0; 16]).expect("an image file");
    let error = files::read(folder.path()).expect_err("refused");
    let source = std::error::Error::source(&error).expect("a source");
    assert_eq!(source.to_string(), "starts with 0x00000000, expected 0x54564319");
}

#[test]
fn a_name_that_is_no_file_does_not_hang_the_reader() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("inventory.img");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    assert!(inventory::read(folder.path()).is_err());
    fs::remove_file(&path).expect("removed");
    std::os::unix::fs::symlink("/etc/passwd", &path).expect("a link");
    assert!(inventory::read(folder.path()).is_err());
}
