//! Who a server runs as: names are looked up in the root file system's own files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::error::Refusal;
use crate::spec::User;

/// Longest file that is read for it.
const FILE_BYTES_MAX: u64 = 16 << 20;
const PASSWD: &str = "etc/passwd";
const GROUP: &str = "etc/group";

/// A user as the kernel knows it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    /// User number.
    pub(crate) uid: u32,
    /// Its own group.
    pub(crate) gid: u32,
    /// Other groups of which it is a member.
    pub(crate) groups: Vec<u32>,
    /// Its home folder.
    pub(crate) home: String,
}

/// Looks a user up in the files of the root file system at `root`; without one it is root.
pub(crate) fn resolve(user: Option<&User>, root: &Path) -> Result<Resolved, Refusal> {
    let (passwd_file, group_file) = (root.join(PASSWD), root.join(GROUP));
    let passwd = read(root, PASSWD);
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
        (Some(group), _) => group_number(group, root, &group_file)?,
        (None, Some(fields)) => number(fields[3], "group", fields[3], &passwd_file)?,
        (None, None) => 0,
    };
    let name = line.as_ref().map(|fields| fields[0]);
    let groups = match (name, user.and_then(|user| user.group.as_ref())) {
        (Some(name), None) => memberships(name, gid, root),
        _ => Vec::new(),
    };
    let home = line.as_ref().map(|fields| fields[5]).filter(|home| home.starts_with('/')).unwrap_or("/");
    Ok(Resolved { uid, gid, groups, home: home.into() })
}

fn group_number(group: &str, root: &Path, file: &Path) -> Result<u32, Refusal> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let text = read(root, GROUP);
    let line = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = line.into_iter().find(|fields| fields.len() >= 3 && fields[0] == group);
    found.map_or_else(|| Err(unknown("group", group, file)), |fields| number(fields[2], "group", group, file))
}

/// Other groups that list the user as a member.
fn memberships(name: &str, own: u32, root: &Path) -> Vec<u32> {
    let text = read(root, GROUP);
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

/// A missing file knows nobody: numbers still work. Symbolic links are followed as the replica would, never out of its
/// root, and what is no file is not read: a pipe would keep the reader waiting.
fn read(root: &Path, file: &str) -> String {
    let open = || -> std::io::Result<File> {
        let root = File::open(root)?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(&root, file, how)?.into())
    };
    let mut bytes = Vec::new();
    if let Ok(file) = open()
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
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

    #[test]
    fn links_stay_inside_the_root_and_a_pipe_is_not_waited_for() {
        let dir = root();
        let etc = dir.path().join("etc");
        std::fs::rename(etc.join("passwd"), dir.path().join("users")).expect("our own folder");
        std::os::unix::fs::symlink("/users", etc.join("passwd")).expect("our own folder");
        assert_eq!(of(Some("www"), dir.path()).expect("by the link").uid, 33);
        std::fs::remove_file(etc.join("passwd")).expect("our own folder");
        nix::unistd::mkfifo(&etc.join("passwd"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert!(of(Some("www"), dir.path()).is_err());
    }
}
