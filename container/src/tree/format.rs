//! What is stored of a tree, and the checks that a stored tree must pass before anything is made of it.

use std::collections::HashMap;

use prost::Message;

use crate::error::Error;
use crate::tree::ALIGN;

/// Most entries of a tree. A root file system's delta has some hundreds as a rule; a million fit into 64 MiB.
pub(super) const ENTRIES_MAX: usize = 1 << 20;
/// Longest path in bytes (`PATH_MAX` without its end).
pub(super) const PATH_BYTES_MAX: usize = 4095;
/// Most bytes of a tree's description.
pub(super) const ENCODED_BYTES_MAX: usize = 256 << 20;

/// A directory's content, without the bytes of its files. Parents come before what is in them.
#[derive(Clone, PartialEq, Message)]
pub struct Tree {
    /// What is in it, the directory itself (with an empty path) first.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<Entry>,
}

/// One file, directory or other node.
#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    /// Path below the tree's root, without a leading slash.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// What it is.
    #[prost(enumeration = "Kind", tag = "2")]
    pub kind: i32,
    /// Permission bits, with set-user, set-group and sticky.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// Time of the last change of its content.
    #[prost(message, optional, tag = "6")]
    pub modified: Option<Time>,
    /// Extended attributes.
    #[prost(message, repeated, tag = "7")]
    pub xattrs: Vec<Xattr>,
    /// Length in bytes of a file, holes included.
    #[prost(uint64, tag = "8")]
    pub bytes: u64,
    /// Where a file has data; sorted, not overlapping.
    #[prost(message, repeated, tag = "9")]
    pub extents: Vec<Extent>,
    /// Target of a symbolic link, or path of the earlier entry that a hard link is another name of.
    #[prost(bytes = "vec", tag = "10")]
    pub target: Vec<u8>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Not a valid entry.
    Unknown = 0,
    /// A directory.
    Directory = 1,
    /// A file.
    File = 2,
    /// A symbolic link.
    Symlink = 3,
    /// Another name of an earlier entry.
    Hardlink = 4,
    /// A named pipe.
    Fifo = 5,
    /// A bound Unix socket.
    Socket = 6,
    /// A character device 0:0: the name is hidden in the layer below.
    Whiteout = 7,
}

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Time {
    /// Seconds.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds, below 10^9.
    #[prost(uint32, tag = "2")]
    pub nanoseconds: u32,
}

/// An extended attribute.
#[derive(Clone, PartialEq, Message)]
pub struct Xattr {
    /// Its name, prefix included.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Its value.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// A part of a file that has data.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Extent {
    /// Where it begins in the file, in bytes.
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    /// Its length in bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

impl Extent {
    /// Room that it takes in the content stream, in bytes.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.bytes.next_multiple_of(ALIGN)
    }
}

impl Tree {
    /// Length of the content stream in bytes; a multiple of [`ALIGN`].
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.entries.iter().flat_map(|entry| &entry.extents).map(Extent::stream_bytes).sum()
    }

    /// The tree as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Reads and checks a stored tree.
    ///
    /// # Errors
    /// [`Error::Tree`] for whatever [`scan`](crate::tree::scan) would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > ENCODED_BYTES_MAX {
            return Err(bad(b"", "the description is longer than 256 MiB"));
        }
        let tree: Self = Message::decode(bytes).map_err(|_| bad(b"", "the description is not protobuf"))?;
        tree.check()?;
        Ok(tree)
    }

    /// Checks everything that does not need a file system.
    ///
    /// # Errors
    /// [`Error::Tree`] with the path of the first entry that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        if self.entries.len() > ENTRIES_MAX {
            return Err(bad(b"", "more than a million entries"));
        }
        let mut seen: HashMap<&[u8], Kind> = HashMap::new();
        let mut stream_bytes = 0u64;
        for (index, entry) in self.entries.iter().enumerate() {
            let path = entry.path.as_slice();
            let kind = entry.kind();
            if index == 0 {
                if !path.is_empty() || kind != Kind::Directory {
                    return Err(bad(path, "the first entry is not the directory itself"));
                }
            } else {
                check_path(path)?;
                let parent = path.iter().rposition(|byte| *byte == b'/').map_or(&b""[..], |at| &path[..at]);
                if seen.get(parent) != Some(&Kind::Directory) {
                    return Err(bad(path, "its parent is not a directory listed before it"));
                }
            }
            if seen.insert(path, kind).is_some() {
                return Err(bad(path, "listed twice"));
            }
            check_entry(entry, &seen)?;
            for extent in &entry.extents {
                stream_bytes = stream_bytes
                    .checked_add(extent.stream_bytes())
                    .ok_or_else(|| bad(path, "the content is longer than 2^64 bytes"))?;
            }
        }
        Ok(())
    }
}

fn check_entry(entry: &Entry, seen: &HashMap<&[u8], Kind>) -> Result<(), Error> {
    let path = entry.path.as_slice();
    let kind = entry.kind();
    if entry.mode & !0o7777 != 0 {
        return Err(bad(path, "mode bits that do not exist"));
    }
    if entry.modified.is_some_and(|time| time.nanoseconds >= 1_000_000_000) {
        return Err(bad(path, "more than 10^9 nanoseconds"));
    }
    if kind != Kind::File && (entry.bytes != 0 || !entry.extents.is_empty()) {
        return Err(bad(path, "content, although it is no file"));
    }
    match kind {
        Kind::Unknown => return Err(bad(path, "a kind that does not exist")),
        Kind::Symlink => check_target(path, &entry.target)?,
        // Only names of this very tree, listed before: a link can lead nowhere else.
        Kind::Hardlink => match seen.get(entry.target.as_slice()) {
            Some(Kind::Directory | Kind::Hardlink) | None => {
                return Err(bad(path, "a hard link to something that is not listed before it"));
            }
            Some(_) if entry.target == entry.path => return Err(bad(path, "a hard link to itself")),
            Some(_) => {}
        },
        _ if !entry.target.is_empty() => return Err(bad(path, "a target, although it is no link")),
        _ => {}
    }
    let mut end = 0;
    for extent in &entry.extents {
        let next = extent.offset.checked_add(extent.bytes).filter(|next| *next <= entry.bytes);
        match next {
            Some(next) if extent.offset >= end && extent.bytes > 0 => end = next,
            _ => return Err(bad(path, "extents that overlap, are empty or lie beyond the end")),
        }
    }
    // `off_t` is signed.
    if i64::try_from(entry.bytes).is_err() {
        return Err(bad(path, "a length that no file can have"));
    }
    entry.xattrs.iter().try_for_each(|xattr| check_xattr(path, xattr))
}

fn check_target(path: &[u8], target: &[u8]) -> Result<(), Error> {
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
        return Err(bad(path, "a target that no symbolic link can have"));
    }
    Ok(())
}

fn check_path(path: &[u8]) -> Result<(), Error> {
    if path.len() > PATH_BYTES_MAX || path.contains(&0) {
        return Err(bad(path, "a path that no file can have"));
    }
    let good = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && part.len() <= 255;
    if path.split(|byte| *byte == b'/').all(good) {
        Ok(())
    } else {
        Err(bad(path, "a path that is not canonical"))
    }
}

/// What to do with an attribute that was found on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carry {
    Yes,
    LeaveOut,
    Refuse,
}

pub(super) fn carry(name: &[u8]) -> Carry {
    match name {
        b"trusted.overlay.opaque" | b"security.capability" => Carry::Yes,
        b"trusted.overlay.origin"
        | b"trusted.overlay.nlink"
        | b"trusted.overlay.impure"
        | b"trusted.overlay.uuid"
        | b"trusted.overlay.upper" => Carry::LeaveOut,
        _ if name.starts_with(b"trusted.overlay.") => Carry::Refuse,
        _ if name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_") => Carry::Yes,
        // Labels of security modules and private attributes of file systems belong to their machine.
        _ => Carry::LeaveOut,
    }
}

fn check_xattr(path: &[u8], xattr: &Xattr) -> Result<(), Error> {
    if carry(&xattr.name) != Carry::Yes || xattr.name.contains(&0) || xattr.name.len() > 255 {
        return Err(bad(path, "an extended attribute that is not carried"));
    }
    if xattr.value.len() > 65536 {
        return Err(bad(path, "an extended attribute longer than 64 KiB"));
    }
    Ok(())
}

pub(super) fn bad(path: &[u8], reason: &'static str) -> Error {
    let mut path = String::from_utf8_lossy(path).into_owned();
    if path.len() > 256 {
        path = path.chars().take(256).collect();
        path.push('…');
    }
    Error::Tree { path, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.into(), kind: kind.into(), ..Entry::default() }
    }

    fn reason(entries: Vec<Entry>) -> String {
        let mut all = vec![entry("", Kind::Directory)];
        all.extend(entries);
        match Tree::decode(&Tree { entries: all }.encode()) {
            Ok(_) => "good".into(),
            Err(error) => error.to_string(),
        }
    }

    /// The bytes stand in snapshots, and in their description.
    #[test]
    fn the_encoding_is_the_documented_one() {
        const LINES: [&str; 3] = [
            "0a 09 10 01 18 ed 03 32 02 08 01",
            "0a 2a 0a 03 6c 6f 67 10 02 18 a4 03 20 e8 07 28 e8 07 32 08 08 01 10 80 ca b5 ee 01 40 90 4e \
             4a 03 10 80 20 4a 06 08 80 40 10 90 0e",
            "0a 0b 0a 03 6f 6c 64 10 07 32 02 08 02",
        ];
        let document = include_str!("../../../docs/snapshot-format.md");
        let time = |seconds, nanoseconds| Some(Time { seconds, nanoseconds });
        let tree = Tree {
            entries: vec![
                Entry { mode: 0o755, modified: time(1, 0), ..entry("", Kind::Directory) },
                Entry {
                    mode: 0o644,
                    uid: 1000,
                    gid: 1000,
                    modified: time(1, 500_000_000),
                    bytes: 10_000,
                    extents: vec![Extent { offset: 0, bytes: 4096 }, Extent { offset: 8192, bytes: 1808 }],
                    ..entry("log", Kind::File)
                },
                Entry { modified: time(2, 0), ..entry("old", Kind::Whiteout) },
            ],
        };
        let bytes: Vec<String> = tree.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bytes.join(" "), LINES.join(" "));
        for line in LINES {
            assert!(document.contains(&format!("\n{line}\n")), "{line} is not documented");
        }
        assert_eq!(tree.stream_bytes(), 8192);
        assert_eq!(Tree::decode(&tree.encode()).expect("good"), tree);
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for path in ["..", "../x", "/etc", "a/../b", "a//b", "./a", "a/", "a\0b"] {
            assert_ne!(
                reason(vec![entry("a", Kind::Directory), entry(path, Kind::Fifo)]),
                "good",
                "{path:?}"
            );
        }
        assert_eq!(reason(vec![entry("a", Kind::Directory), entry("a/b", Kind::Fifo)]), "good");
    }

    #[test]
    fn nothing_lies_below_a_link_and_links_stay_inside() {
        let mut link = entry("l", Kind::Symlink);
        link.target = b"/etc".to_vec();
        assert_eq!(reason(vec![link.clone()]), "good");
        assert!(reason(vec![link, entry("l/passwd", Kind::Fifo)]).contains("parent"));
        let mut hard = entry("h", Kind::Hardlink);
        hard.target = b"etc/passwd".to_vec();
        assert!(reason(vec![hard]).contains("hard link"));
    }

    #[test]
    fn numbers_that_lie_are_refused() {
        let mut file = entry("f", Kind::File);
        file.bytes = 10;
        file.extents = vec![Extent { offset: 5, bytes: u64::MAX }];
        assert!(reason(vec![file.clone()]).contains("extents"));
        file.extents = vec![Extent { offset: 5, bytes: 5 }, Extent { offset: 6, bytes: 1 }];
        assert!(reason(vec![file.clone()]).contains("extents"));
        file.bytes = u64::MAX;
        file.extents.clear();
        assert!(reason(vec![file]).contains("length"));
    }

    #[test]
    fn attributes_that_point_elsewhere_are_refused() {
        let mut dir = entry("d", Kind::Directory);
        dir.xattrs = vec![Xattr { name: b"trusted.overlay.redirect".to_vec(), value: b"/etc".to_vec() }];
        assert!(reason(vec![dir]).contains("attribute"));
    }
}
