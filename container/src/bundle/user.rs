//! Who a server runs as: names are looked up in the root file system's own files.

use std::path::{Path, PathBuf};

use crate::error::Refusal;
use crate::spec::User;

/// Longest file that is read for it.
const FILE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

pub(super) fn resolve(user: Option<&User>, rootfs: &Path) -> Result<Resolved, Refusal> {
    let passwd_file = rootfs.join("etc/passwd");
    let group_file = rootfs.join("etc/group");
    let passwd = read(&passwd_file);
    let wanted = user.map_or("0", |user| user.user.as_str());
    // name:password:uid:gid:comment:home:shell
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 7 && (fields[0] == wanted || (wanted.parse::<u32>().is_ok() && fields[2] == wanted))
    });
    let uid = match (&line, wanted.parse()) {
        (Some(fields), _) => number(fields[2], "user", wanted, &passwd_file)?,
        (None, Ok(uid)) => uid,
        (None, Err(_)) => return Err(unknown("user", wanted, &passwd_file)),
    };
    let gid = match (user.and_then(|user| user.group.as_deref()), &line) {
        (Some(group), _) => group_number(group, &group_file)?,
        (None, Some(fields)) => number(fields[3], "group", fields[3], &passwd_file)?,
        (None, None) => 0,
    };
    let name = line.as_ref().map(|fields| fields[0]);
    let groups = match (name, user.and_then(|user| user.group.as_ref())) {
        (Some(name), None) => memberships(name, gid, &group_file),
        _ => Vec::new(),
    };
    let home = line.as_ref().map(|fields| fields[5]).filter(|home| home.starts_with('/')).unwrap_or("/");
    Ok(Resolved { uid, gid, groups, home: home.into() })
}

fn group_number(group: &str, file: &Path) -> Result<u32, Refusal> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let text = read(file);
    let line = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = line.into_iter().find(|fields| fields.len() >= 3 && fields[0] == group);
    found.map_or_else(|| Err(unknown("group", group, file)), |fields| number(fields[2], "group", group, file))
}

/// Other groups that list the user as a member.
fn memberships(name: &str, own: u32, file: &Path) -> Vec<u32> {
    let text = read(file);
    let lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines
        .filter(|fields| fields.len() >= 4 && fields[3].split(',').any(|member| member == name))
        .filter_map(|fields| fields[2].parse().ok())
        .filter(|gid| *gid != own)
        .collect()
}

fn number(text: &str, what: &'static str, name: &str, file: &Path) -> Result<u32, Refusal> {
    text.parse().map_err(|_| unknown(what, name, file))
}

fn unknown(what: &'static str, name: &str, file: &Path) -> Refusal {
    Refusal::UnknownUser { what, name: name.into(), file: PathBuf::from(file) }
}

/// A missing file knows nobody: numbers still work.
fn read(file: &Path) -> String {
    use std::io::Read;
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(file) {
        let _ = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("etc")).expect("etc");
        let passwd = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/www:/bin/false\n";
        std::fs::write(dir.path().join("etc/passwd"), passwd).expect("passwd");
        std::fs::write(dir.path().join("etc/group"), "www:x:33:\nvideo:x:44:www,root\n").expect("group");
        dir
    }

    fn of(text: Option<&str>, root: &Path) -> Result<Resolved, Refusal> {
        resolve(text.map(|text| text.parse().expect("user")).as_ref(), root)
    }

    #[test]
    fn names_and_numbers_are_resolved_as_the_replica_sees_them() {
        let dir = root();
        let found = of(Some("www"), dir.path()).expect("known");
        assert_eq!(found, Resolved { uid: 33, gid: 33, groups: vec![44], home: "/var/www".into() });
        assert_eq!(of(Some("1000"), dir.path()).expect("number").gid, 0);
        assert_eq!(of(Some("www:video"), dir.path()).expect("group").gid, 44);
        assert_eq!(of(None, dir.path()).expect("root").home, "/root");
        assert!(matches!(of(Some("nobody"), dir.path()), Err(Refusal::UnknownUser { what: "user", .. })));
        assert!(matches!(of(Some("0:none"), dir.path()), Err(Refusal::UnknownUser { what: "group", .. })));
    }
}
