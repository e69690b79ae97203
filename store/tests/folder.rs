//! What only a folder can do: be full, be read-only, lose the end of a file.

#![expect(clippy::print_stderr, reason = "a skipped test says so")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rewarm_report::{Class, Classify};
use rewarm_store::{
    Collect, Damage, Digest, Error, Facts, Name, Reference, RegionKind, SessionOptions, Sink, Store, Target,
};

#[path = "contract/content.rs"]
mod content;

const MIB: usize = 1 << 20;

async fn write(folder: &Path, mib: usize) -> rewarm_store::Result<Digest> {
    let store = Store::open(&folder.to_str().unwrap().parse()?).await?;
    let session = store.begin(SessionOptions::default()).await?;
    let mut region = session.region(RegionKind::Task { pid: 1 }).await?;
    for n in 0..mib as u64 {
        let make = if n % 2 == 0 { content::random } else { content::compressible };
        region.push(make(MIB, n)).await?;
    }
    region.finish(Vec::new()).await?;
    let name: Name = "web".parse()?;
    Ok(session.publish(&name, "v1", Facts::default()).await?.digest)
}

async fn read(folder: &Path) -> rewarm_store::Result<()> {
    struct Nowhere;
    impl Sink for Nowhere {
        fn put(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Ok(())
        }
    }
    let url: rewarm_store::StoreUrl = folder.to_str().unwrap().parse()?;
    let reference = Reference { store: url, name: "web".parse()?, target: Target::Tag("v1".into()) };
    let store = Store::open(&reference.store).await?;
    let boot = store.resolve(&reference).await?.boot().await?;
    boot.fetch(0, Arc::new(Nowhere), 4).await?;
    boot.verify(4).await?.whole().map(drop)
}

fn only_pack(folder: &Path) -> PathBuf {
    let mut packs = std::fs::read_dir(folder.join("packs")).unwrap();
    packs.next().expect("one pack").unwrap().path()
}

/// A crash in the middle of an upload leaves a file that no listing shows.
#[tokio::test(flavor = "multi_thread")]
async fn gc_removes_half_written_files_that_are_old() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 2).await.unwrap();
    let [old, young] = ["old#1", "young#2"].map(|name| folder.path().join("packs").join(name));
    for (path, age) in [(&old, 3600), (&young, 0)] {
        let file = std::fs::File::create(path).unwrap();
        file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
    }
    let store = Store::open(&folder.path().to_str().unwrap().parse().unwrap()).await.unwrap();
    let grace = std::time::Duration::ZERO;
    let dry = store.collect(Collect { grace, dry_run: true }).await.unwrap();
    assert!(old.exists() && dry.alive.objects > 3, "{dry:?}");
    store.collect(Collect { grace, dry_run: false }).await.unwrap();
    assert!(!old.exists() && young.exists());
    read(folder.path()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_files_are_found() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 3).await.unwrap();
    read(folder.path()).await.unwrap();
    let pack = only_pack(folder.path());
    let bytes = std::fs::read(&pack).unwrap();
    let damage = async |expected: fn(&Damage) -> bool| match read(folder.path()).await {
        Err(Error::Damaged { source, object, .. }) => {
            assert!(object.starts_with("packs/"), "{object}");
            assert!(expected(&source), "{source:?}");
        }
        other => panic!("{other:?}"),
    };
    std::fs::write(&pack, &bytes[..MIB]).unwrap();
    damage(|damage| matches!(damage, Damage::Length { found: 0x10_0000, .. })).await;
    let mut flipped = bytes.clone();
    flipped[2 * MIB] ^= 1;
    std::fs::write(&pack, &flipped).unwrap();
    damage(|damage| matches!(damage, Damage::Chunk { .. })).await;
    std::fs::remove_file(&pack).unwrap();
    damage(|damage| matches!(damage, Damage::Missing)).await;
    std::fs::write(&pack, &bytes).unwrap();
    read(folder.path()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_not_there_is_not_found_and_a_file_is_no_store() {
    let folder = tempfile::tempdir().unwrap();
    let error = read(&folder.path().join("none")).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound);
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    for error in [read(&file).await.unwrap_err(), write(&file, 1).await.unwrap_err()] {
        assert_eq!(error.class(), Class::Failed, "{error:?}");
    }
}

/// A file system of its own, gone when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "rewarm-test"])
            .arg(folder.path())
            .stderr(std::process::Stdio::null())
            .status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        eprintln!("skipped: needs root, to mount a tmpfs");
        let needs = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
        assert!(!needs.split(',').any(|need| need == "root"), "a tmpfs can be mounted by root");
        None
    }

    fn remount(&self, options: &str) {
        let mount =
            Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(self.0.path()).status();
        assert!(mount.unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a write that failed may still hold its file for a moment.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_leaves_no_pack() {
    let Some(tmpfs) = Tmpfs::mount("size=48m") else { return };
    let error = write(tmpfs.0.path(), 120).await.unwrap_err();
    assert_eq!(error.class(), Class::Failed);
    let text = error.to_string();
    assert!(text.starts_with("no space left in "), "{text}");
    // What is left is removed in the background.
    for _ in 0..100 {
        let packs = std::fs::read_dir(tmpfs.0.path().join("packs")).map_or(0, Iterator::count);
        if packs == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("packs are left 5 s after the session ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_folder_is_said_and_can_be_read() {
    let Some(tmpfs) = Tmpfs::mount("size=48m") else { return };
    write(tmpfs.0.path(), 2).await.unwrap();
    tmpfs.remount("ro");
    read(tmpfs.0.path()).await.unwrap();
    let error = write(tmpfs.0.path(), 2).await.unwrap_err();
    assert_eq!(error.class(), Class::Failed);
    assert!(error.to_string().contains(" does not allow to write "), "{error}");
    let error = write(&tmpfs.0.path().join("new"), 2).await.unwrap_err();
    assert!(error.to_string().contains(" does not allow to make "), "{error}");
}
