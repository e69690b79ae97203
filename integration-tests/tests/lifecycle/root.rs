//! What a server writes to its root file system and to `/dev/shm` comes back in its clones as it was.

use serde_json::Value;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::mounts::{mount, unmount};
use rewarm_integration_tests::server::Server;

use crate::world_for;

/// Prints everything about every file below the folders of its arguments, as JSON.
const DESCRIBE: &str = r#"
import hashlib, json, os, stat, sys
found, inodes = {}, {}
for top in sys.argv[1:]:
    for folder, folders, files in os.walk(top):
        for name in sorted(folders + files) + ["."]:
            path = os.path.normpath(os.path.join(folder, name))
            info = os.lstat(path)
            entry = {"mode": oct(info.st_mode), "uid": info.st_uid, "gid": info.st_gid}
            entry["xattrs"] = {key: os.getxattr(path, key, follow_symlinks=False).hex()
                               for key in sorted(os.listxattr(path, follow_symlinks=False))}
            if stat.S_ISREG(info.st_mode):
                entry["size"], entry["mtime_ns"], entry["links"] = info.st_size, info.st_mtime_ns, info.st_nlink
                entry["digest"] = hashlib.sha256(open(path, "rb").read()).hexdigest()
                entry["sparse"] = info.st_blocks * 512 < info.st_size // 2
                entry["same_as"] = inodes.setdefault((info.st_dev, info.st_ino), path)
            elif stat.S_ISLNK(info.st_mode):
                entry["target"] = os.readlink(path)
            elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                entry["device"] = info.st_rdev
            found[path] = entry
print(json.dumps(found, sort_keys=True))
"#;

/// One of everything that an overlay or a tar file gets wrong.
const CHANGE: &str = r#"
set -e
cd "$1"
rm removed removed-folder/inner && rmdir removed-folder
rm -r replaced && mkdir replaced && echo new > replaced/new
echo appended >> appended
mv renamed-from renamed-to
echo linked > hard-1 && ln hard-1 hard-2 && mkdir sub && ln hard-1 sub/hard-3
ln -s hard-1 soft && ln -s /nowhere/at/all dangling
echo owned > owned && chown 1234:5678 owned && chmod 4750 owned
mkdir sticky && chmod 1777 sticky && chown 1:2 sticky
truncate -s 64M sparse && printf middle | dd of=sparse bs=1 seek=33554432 conv=notrunc status=none
mkfifo pipe && chmod 640 pipe
: > empty
printf 'a\nb' > 'name with spaces and Grüße'
touch -d '2001-02-03 04:05:06.789 UTC' owned
python3 -c 'import os; os.setxattr("owned", "user.note", b"one\0two"); os.setxattr("sub", "user.folder", b"three")'
head -c 3000000 /dev/zero | tr '\0' 'x' > big
mkdir -p /dev/shm/deep/er && head -c 5000001 /dev/urandom > /dev/shm/deep/er/noise && ln /dev/shm/deep/er/noise /dev/shm/alias
chown 33:33 /dev/shm/deep && chmod 2770 /dev/shm/deep
truncate -s 16M /dev/shm/sparse
"#;

#[test]
fn everything_about_a_changed_root_survives() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    // The world's folder lies on the host's root file system, so the replica sees it as the lower layer.
    let folder = world.files();
    for name in ["removed", "appended", "renamed-from", "removed-folder/inner", "replaced/old", "untouched"] {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("our own folder");
        std::fs::write(path, format!("{name}\n")).expect("our own folder");
    }
    let source = world.start("plain", &server);
    let folder = folder.to_string_lossy().into_owned();
    assert_eq!(source.sh(&format!("cat {folder}/untouched")), "untouched", "the default root is the host's");
    source.exec(&["sh", "-c", CHANGE, "sh", &folder]).ok();
    let describe = |replica: &rewarm_integration_tests::Replica<'_>| -> Value {
        replica.exec(&["python3", "-c", DESCRIBE, &folder, "/dev/shm"]).ok().json()
    };
    let before = describe(&source);
    let at = |name: &str| before[format!("{folder}/{name}")].clone();
    assert_eq!(at("removed"), Value::Null, "the change itself worked");
    assert_eq!(at("sparse")["sparse"], true, "the file system keeps holes");
    assert_eq!(at("hard-2")["links"], 3);

    world.snapshot(&source, "v1", &[]);
    for clone in world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"])
    {
        let after = describe(&clone);
        assert_eq!(difference(&before, &after), Vec::<String>::new(), "{}", clone.name());
    }
    // What a replica writes never reaches the host.
    assert!(world.files().join("removed").exists());
    assert!(!world.files().join("big").exists());
    world.finish();
}

/// The entries that are not the same, one a line: two whole descriptions side by side cannot be read.
fn difference(before: &Value, after: &Value) -> Vec<String> {
    let (before, after) = (before.as_object().expect("an object"), after.as_object().expect("an object"));
    let mut paths: Vec<&String> = before.keys().chain(after.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    let differs = paths.into_iter().filter(|path| before.get(*path) != after.get(*path));
    differs.map(|path| format!("{path}: {:?} became {:?}", before.get(path), after.get(path))).collect()
}

/// What is mounted below the host's root is not in the default root: only a mount brings it in, and then it must be there for a
/// clone, as far as the server has it mapped.
#[test]
fn a_file_system_below_the_root_comes_in_by_a_mount_only() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let below = world.files().join("below");
    std::fs::create_dir(&below).expect("our own folder");
    std::fs::write(below.join("under"), "under the mount").expect("our own folder");
    mount(&["-t", "tmpfs", "tmpfs"], &below);
    let file = below.join("data");
    std::fs::write(&file, [1; 8192]).expect("our own folder");
    let shown = below.to_string_lossy().into_owned();
    let without = world.start("without", &server);
    assert_eq!(without.sh(&format!("ls {shown}")), "under", "the file system is in the default root");
    without.remove();

    let mut mapping = server.clone();
    mapping.command[2] = format!(
        "import mmap\nwith open('{shown}/data', 'rb') as file:\n    \
         mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)\n{}",
        mapping.command[2]
    );
    let source = world.start_with("plain", &mapping, &["--mount", &format!("{shown}:{shown}:ro")]);
    assert_eq!(source.sh(&format!("ls {shown}")), "data");
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--stop"]);
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    // Of the same length and with other content: memory of the server that would be another.
    std::fs::write(&file, [2; 8192]).expect("our own folder");
    let traces = world.traces();
    let output = world.restore_call("plain", "v1", server.port, &[]).fails(3);
    output.says(&["stage admit", &format!("{shown}/data has other content than at the snapshot")]);
    no_residue(&world, &traces);
    // The same content is as good, whoever wrote it.
    std::fs::write(&file, [1; 8192]).expect("our own folder");
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    unmount(&below);
    world.finish();
}

/// A server with a root file system of its own, read-only mounts included.
#[test]
fn a_root_of_its_own() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let root = world.files().join("root");
    for folder in ["proc", "dev", "sys", "tmp", "run", "etc", "usr", "lib", "lib64", "bin", "srv"] {
        std::fs::create_dir_all(root.join(folder)).expect("our own folder");
    }
    std::fs::write(root.join("etc/marker"), "own root\n").expect("our own folder");
    // Programs and libraries of the host, read-only, as a user would bring in a model folder.
    server.mounts = ["usr", "lib", "lib64", "bin"].map(|name| format!("/{name}:/{name}:ro")).to_vec();
    let flags = ["--rootfs".to_owned(), root.to_string_lossy().into_owned()];
    let source = world.start_with("plain", &server, &[&flags[0], &flags[1]]);
    assert_eq!(source.sh("cat /etc/marker; echo changed > /etc/marker"), "own root");
    source.exec(&["sh", "-c", "touch /usr/not-allowed"]).fails(1);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let clones = world.restore("plain", "v1", server.port, &[]);
    assert_eq!(clones[0].sh("cat /etc/marker"), "changed");
    assert_eq!(std::fs::read_to_string(root.join("etc/marker")).expect("our own file"), "own root\n");
    world.finish();
}

/// Without CAP_SYS_RESOURCE too, of which CRIU needs a part to read the limits of somebody else's process.
#[test]
fn another_user_is_the_same_user_in_a_clone() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start_with("plain", &server, &["--user", "65534:65534", "--workdir", "/tmp"]);
    let who = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' /proc/1/status; readlink /proc/1/cwd";
    let before = source.sh(who);
    assert!(before.contains("65534\t65534\t65534\t65534"), "{before}");
    assert!(before.ends_with("/tmp"), "{before}");
    world.snapshot(&source, "v1", &[]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    assert_eq!(clones[0].sh(who), before);
    // It can be done again with the clone.
    world.snapshot(&clones[0], "v1", &["--stop"]);
    world.finish();
}
