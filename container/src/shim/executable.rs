//! Whether the kernel can run a file at all: what runc does not tell apart from a program that ends with 1.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// Where programs without a path are looked for, as runc does where the environment names no folders.
const FOLDERS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Formats that somebody has registered beside the kernel's own.
const REGISTERED: &str = "/proc/sys/fs/binfmt_misc";
/// The number of 32-bit x86 in ELF, which 64-bit kernels run as well.
const EM_386: [u8; 2] = [3, 0];
/// Class and machine in the head of an ELF file.
const HEAD_BYTES: usize = 20;

/// Whether `program`, as it is seen below `root`, is a file in no format that this kernel runs. False where that cannot be
/// told: formats may have been registered.
pub(super) fn is_foreign(root: &Path, workdir: Option<&Path>, env: &[String], program: &str) -> bool {
    if has_registered_formats() {
        return false;
    }
    let Ok(root) = File::open(root) else { return false };
    let folders = env.iter().rev().find_map(|one| one.strip_prefix("PATH=")).unwrap_or(FOLDERS);
    let candidates: Vec<_> = if program.contains('/') {
        vec![workdir.unwrap_or(Path::new("/")).join(program)]
    } else {
        folders.split(':').map(|folder| Path::new(folder).join(program)).collect()
    };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let found = candidates.iter().find_map(|path| openat2(&root, path, how).ok());
    found.is_some_and(|file| has_foreign_head(File::from(file)).unwrap_or(false))
}

fn has_registered_formats() -> bool {
    let own = |name: &str| name == "register" || name == "status";
    match std::fs::read_dir(REGISTERED) {
        Ok(entries) => entries.flatten().any(|entry| !own(&entry.file_name().to_string_lossy())),
        Err(_) => false,
    }
}

fn has_foreign_head(mut file: File) -> std::io::Result<bool> {
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let mut head = [0; HEAD_BYTES];
    match file.read_exact(&mut head) {
        // Too short for a program, but not for a script.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(!head.starts_with(b"#!")),
        read => read?,
    }
    if head.starts_with(b"#!") {
        return Ok(false);
    }
    let mut own = [0; HEAD_BYTES];
    File::open("/proc/self/exe")?.read_exact(&mut own)?;
    let machine = |head: &[u8; HEAD_BYTES]| [head[18], head[19]];
    let runs = machine(&head) == machine(&own) || (cfg!(target_arch = "x86_64") && machine(&head) == EM_386);
    Ok(!(head.starts_with(b"\x7fELF") && runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_scripts_and_garbage_are_told_apart() {
        if has_registered_formats() {
            // Nothing can be said of any file, and nothing is.
            assert!(!is_foreign(Path::new("/"), None, &[], "/etc/passwd"));
            return;
        }
        let root = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(root.path().join("bin")).expect("a folder");
        let put = |name: &str, bytes: &[u8]| std::fs::write(root.path().join(name), bytes).expect("a file");
        put("bin/script", b"#!/bin/sh\n");
        put("bin/short", b"x");
        put("bin/text", b"no program, but long enough for one");
        let own = std::fs::read("/proc/self/exe").expect("this program");
        put("bin/program", &own[..4096]);
        let mut other = own[..4096].to_vec();
        other[18..20].copy_from_slice(&[0xfe, 0xfe]);
        put("bin/other", &other);
        std::os::unix::fs::symlink("/bin/text", root.path().join("bin/link")).expect("a link");
        let foreign = |program: &str| {
            is_foreign(root.path(), Some(Path::new("/bin")), &["PATH=/none:/bin".into()], program)
        };
        for program in ["/bin/short", "text", "./text", "/bin/link", "other"] {
            assert!(foreign(program), "{program}");
        }
        for program in ["/bin/script", "program", "/bin/absent", "/bin"] {
            assert!(!foreign(program), "{program}");
        }
    }
}
