//! What a container needs to use GPUs: device files, the driver's libraries, some environment.
//!
//! The machine's CDI file says it, where there is one; else it is found: `/dev/nvidia*`, what `/proc/driver/nvidia` tells of
//! each GPU, and the driver's libraries as the loader's cache lists them. The hooks of a CDI file are not run: they make links to libraries under
//! their short names, which are bound here under both names.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::topology::{Uuid, UuidError};

/// Where CDI files lie when nothing else is said.
pub const CDI_FOLDERS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// The kind of device that is looked for in them.
const CDI_KIND: &str = "nvidia.com/gpu";
/// Longest CDI file in bytes: machines have sixteen GPUs, and files of some ten KiB.
const CDI_BYTES_MAX: u64 = 4 << 20;
/// Device files that belong to all GPUs; what is not there is not needed.
const SHARED: [&str; 4] = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"];
/// Libraries that belong to the driver: their versions must be that of its kernel module.
const LIBRARIES: [&str; 6] = [
    "libcuda.so.1",
    "libnvidia-ml.so.1",
    "libnvidia-ptxjitcompiler.so.1",
    "libnvidia-nvvm.so.4",
    "libnvidia-gpucomp.so",
    "libcudadebugger.so.1",
];

/// Which GPUs a container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Wanted {
    /// All of the machine.
    All,
    /// These.
    These(Vec<One>),
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum One {
    /// By its number on the machine, as `nvidia-smi` counts.
    Number(u32),
    /// By its identity.
    Uuid(Uuid),
}

impl std::fmt::Display for One {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Uuid(uuid) => uuid.fmt(f),
        }
    }
}

impl FromStr for Wanted {
    type Err = UuidError;

    /// `all`, or numbers and identities with commas between them.
    fn from_str(text: &str) -> Result<Self, UuidError> {
        let one = |text: &str| match text.parse() {
            Ok(number) => Ok(One::Number(number)),
            Err(_) => text.parse().map(One::Uuid),
        };
        if text == "all" {
            return Ok(Self::All);
        }
        text.split(',').map(one).collect::<Result<_, _>>().map(Self::These)
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::These(list) => {
                let list: Vec<String> = list.iter().map(ToString::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

impl TryFrom<String> for Wanted {
    type Error = UuidError;

    fn try_from(text: String) -> Result<Self, UuidError> {
        text.parse()
    }
}

impl From<Wanted> for String {
    fn from(wanted: Wanted) -> Self {
        wanted.to_string()
    }
}

/// What goes into the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provided {
    /// Device files, at the same path inside.
    pub devices: Vec<PathBuf>,
    /// Files of the driver: path on the machine and path inside. They cannot be written there.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Environment as `K=V`.
    pub env: Vec<String>,
}

/// Why there are no GPUs to be had.
#[derive(Debug, thiserror::Error)]
pub enum ProvideError {
    /// A CDI file cannot be used.
    #[error("the CDI file {} {reason}", path.display())]
    Cdi {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The GPU is not on this machine.
    #[error("there is no GPU {wanted}: {place} has {here}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// Where it was looked for.
        place: String,
        /// What there is.
        here: String,
    },
    /// There is none at all.
    #[error("this machine has no GPU: there is no CDI file in {folders}, and nothing in {}", gpus.display())]
    NoGpu {
        /// Where CDI files were looked for.
        folders: String,
        /// Where the driver lists its GPUs.
        gpus: PathBuf,
    },
}

/// Where things are looked for; other places in tests.
#[derive(Debug, Clone)]
pub struct Places {
    /// Folders of CDI files, the first that has one counts.
    pub cdi: Vec<PathBuf>,
    /// `/dev`.
    pub dev: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// What `ldconfig -p` prints.
    pub libraries: String,
}

impl Places {
    /// This machine's, with CDI files in these folders.
    #[must_use]
    pub fn here(cdi: Vec<PathBuf>) -> Self {
        let listed = ["/sbin/ldconfig", "/usr/sbin/ldconfig"]
            .iter()
            .find_map(|program| std::process::Command::new(program).arg("-p").output().ok());
        let libraries =
            listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        Self { cdi, dev: "/dev".into(), proc: "/proc".into(), libraries }
    }

    /// What a container with these GPUs gets.
    ///
    /// # Errors
    /// [`ProvideError`].
    pub fn provide(&self, wanted: &Wanted) -> Result<Provided, ProvideError> {
        match self.cdi_file()? {
            Some((path, file)) => file.provide(&path, wanted),
            None => self.find(wanted),
        }
    }

    /// The first file that describes GPUs.
    fn cdi_file(&self) -> Result<Option<(PathBuf, CdiFile)>, ProvideError> {
        for folder in &self.cdi {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            paths.sort();
            let known = |path: &&PathBuf| {
                path.extension()
                    .is_some_and(|kind| ["json", "yaml", "yml"].iter().any(|known| kind == *known))
            };
            for path in paths.iter().filter(known) {
                let file = CdiFile::read(path)?;
                if file.kind == CDI_KIND {
                    return Ok(Some((path.clone(), file)));
                }
            }
        }
        Ok(None)
    }

    fn find(&self, wanted: &Wanted) -> Result<Provided, ProvideError> {
        let gpus = self.proc.join("driver/nvidia/gpus");
        let all = self.gpus(&gpus);
        if all.is_empty() {
            let folders: Vec<String> = self.cdi.iter().map(|folder| folder.display().to_string()).collect();
            return Err(ProvideError::NoGpu { folders: folders.join(" and "), gpus });
        }
        let mut devices: BTreeSet<PathBuf> = SHARED.iter().map(|name| self.dev.join(name)).collect();
        devices.retain(|path| path.exists());
        let unknown = |one: &One| ProvideError::Unknown {
            wanted: one.to_string(),
            place: gpus.display().to_string(),
            here: all.iter().map(|(minor, uuid)| format!("{minor} ({uuid})")).collect::<Vec<_>>().join(", "),
        };
        let minors: Vec<u32> = match wanted {
            Wanted::All => all.iter().map(|(minor, _)| *minor).collect(),
            Wanted::These(list) => list
                .iter()
                .map(|one| {
                    let is = |(minor, uuid): &&(u32, String)| match one {
                        One::Number(number) => minor == number,
                        One::Uuid(wanted) => *uuid == wanted.to_string(),
                    };
                    all.iter().find(is).map(|(minor, _)| *minor).ok_or_else(|| unknown(one))
                })
                .collect::<Result<_, _>>()?,
        };
        devices.extend(minors.iter().map(|minor| self.dev.join(format!("nvidia{minor}"))));
        let files = LIBRARIES.iter().filter_map(|name| self.library(name)).map(|path| (path.clone(), path));
        Ok(Provided { devices: devices.into_iter().collect(), files: files.collect(), env: Vec::new() })
    }

    /// Number and identity of each GPU that the driver lists, by number.
    fn gpus(&self, folder: &Path) -> Vec<(u32, String)> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let one = |entry: fs::DirEntry| {
            let text = fs::read_to_string(entry.path().join("information")).ok()?;
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            Some((field("Device Minor:")?.parse().ok()?, field("GPU UUID:")?.to_owned()))
        };
        let mut all: Vec<(u32, String)> = entries.filter_map(one).collect();
        all.sort();
        all
    }

    /// Where the loader finds a library of 64 bits.
    fn library(&self, name: &str) -> Option<PathBuf> {
        let mut lines = self.libraries.lines().map(str::trim);
        let line = lines.find(|line| line.starts_with(&format!("{name} (")) && line.contains("x86-64"))?;
        Some(PathBuf::from(line.split("=> ").nth(1)?.trim()))
    }
}

/// The part of a CDI file that counts here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CdiFile {
    kind: String,
    #[serde(default)]
    devices: Vec<CdiDevice>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CdiDevice {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Edits {
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    device_nodes: Vec<Node>,
    #[serde(default)]
    mounts: Vec<FileMount>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: PathBuf,
    host_path: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileMount {
    host_path: PathBuf,
    container_path: PathBuf,
}

impl CdiFile {
    fn read(path: &Path) -> Result<Self, ProvideError> {
        let refuse = |reason: String| ProvideError::Cdi { path: path.to_owned(), reason };
        let bytes = fs::metadata(path).map_err(|error| refuse(format!("cannot be read: {error}")))?.len();
        if bytes > CDI_BYTES_MAX {
            return Err(refuse(format!("has {bytes} bytes, at most {CDI_BYTES_MAX} are read")));
        }
        let text = fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        // JSON is YAML.
        serde_yaml_ng::from_str(&text).map_err(|error| refuse(format!("is not understood: {error}")))
    }

    fn provide(&self, path: &Path, wanted: &Wanted) -> Result<Provided, ProvideError> {
        let names: Vec<String> = match wanted {
            Wanted::All => vec!["all".to_owned()],
            Wanted::These(list) => list.iter().map(ToString::to_string).collect(),
        };
        let mut edits = vec![&self.container_edits];
        for name in &names {
            let device = self.devices.iter().find(|device| device.name == *name);
            let unknown = || ProvideError::Unknown {
                wanted: name.clone(),
                place: path.display().to_string(),
                here: self.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", "),
            };
            match (device, wanted) {
                (Some(device), _) => edits.push(&device.container_edits),
                // A file need not have a device that stands for all.
                (None, Wanted::All) if !self.devices.is_empty() => {
                    edits.extend(self.devices.iter().map(|device| &device.container_edits));
                }
                (None, _) => return Err(unknown()),
            }
        }
        let mut provided = Provided::default();
        for edit in edits {
            for node in &edit.device_nodes {
                if let Some(host) = node.host_path.as_ref().filter(|host| **host != node.path) {
                    let reason =
                        format!("gives {} another path inside: {}", host.display(), node.path.display());
                    return Err(ProvideError::Cdi { path: path.to_owned(), reason });
                }
                provided.devices.push(node.path.clone());
            }
            for mount in &edit.mounts {
                provided.files.push((mount.host_path.clone(), mount.container_path.clone()));
                provided.files.extend(short_name(mount));
            }
            provided.env.extend(edit.env.iter().cloned());
        }
        provided.devices.sort();
        provided.devices.dedup();
        provided.files.sort();
        provided.files.dedup();
        Ok(provided)
    }
}

/// The name by which the loader looks for `libcuda.so.580.95.05`: that of one of [`LIBRARIES`].
fn short_name(mount: &FileMount) -> Option<(PathBuf, PathBuf)> {
    let name = mount.container_path.file_name()?.to_str()?;
    let stem = &name[..name.find(".so.")?];
    let short = LIBRARIES.iter().find(|short| {
        **short != name && short.strip_prefix(stem).is_some_and(|rest| rest.starts_with(".so"))
    })?;
    Some((mount.host_path.clone(), mount.container_path.with_file_name(short)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const UUID: &str = "GPU-00000000-0000-0000-0000-0000000000d0";

    fn places(folder: &TempDir) -> Places {
        let at = |name: &str| folder.path().join(name);
        let libraries = "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1\n\
                         \tlibcuda.so.1 (libc6) => /usr/lib/i386-linux-gnu/libcuda.so.1\n";
        Places { cdi: vec![at("cdi")], dev: at("dev"), proc: at("proc"), libraries: libraries.to_owned() }
    }

    fn write(folder: &TempDir, name: &str, text: &str) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("below the folder")).expect("a folder");
        fs::write(path, text).expect("write");
    }

    fn gpu(folder: &TempDir, minor: u32, uuid: &str) {
        let text = format!("Model: \t\t H100\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n");
        write(folder, &format!("proc/driver/nvidia/gpus/0000:0{minor}:00.0/information"), &text);
        write(folder, &format!("dev/nvidia{minor}"), "");
    }

    #[test]
    fn a_cdi_file_says_what_a_container_gets() {
        let folder = tempfile::tempdir().expect("a folder");
        let yaml = format!(
            "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n\
             - name: \"0\"\n  containerEdits: {{deviceNodes: [{{path: /dev/nvidia0}}]}}\n\
             - name: {UUID}\n  containerEdits: {{deviceNodes: [{{path: /dev/nvidia0, hostPath: /dev/nvidia0}}]}}\n\
             - name: all\n  containerEdits: {{deviceNodes: [{{path: /dev/nvidia0}}, {{path: /dev/nvidia1}}]}}\n\
             containerEdits:\n  env: [A=B]\n  deviceNodes: [{{path: /dev/nvidiactl}}]\n  hooks: [{{hookName: x, path: /y}}]\n  \
             mounts: [{{hostPath: /h/libcuda.so.580.95.05, containerPath: /c/libcuda.so.580.95.05, options: [ro]}}]\n"
        );
        write(&folder, "cdi/a-other.json", r#"{"cdiVersion":"0.5.0","kind":"other.com/nic","devices":[]}"#);
        write(&folder, "cdi/nvidia.yaml", &yaml);
        let places = places(&folder);
        let provide = |text: &str| places.provide(&text.parse().expect("GPUs"));
        let provided = provide("all").expect("all");
        assert_eq!(provided.devices, ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"].map(PathBuf::from));
        let file = |name: &str| (PathBuf::from("/h/libcuda.so.580.95.05"), PathBuf::from(name));
        assert_eq!(provided.files, [file("/c/libcuda.so.1"), file("/c/libcuda.so.580.95.05")]);
        assert_eq!(provided.env, ["A=B"]);
        for one in ["0", UUID] {
            assert_eq!(
                provide(one).expect("one").devices,
                ["/dev/nvidia0", "/dev/nvidiactl"].map(PathBuf::from)
            );
        }
        let error = provide("7").expect_err("unknown").to_string();
        assert!(error.contains("there is no GPU 7") && error.contains("has 0, GPU-"), "{error}");
    }

    #[test]
    fn a_cdi_file_that_is_not_understood_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        write(&folder, "cdi/nvidia.json", "{\"kind\": [}");
        let error = places(&folder).provide(&Wanted::All).expect_err("nonsense").to_string();
        assert!(error.contains("nvidia.json is not understood"), "{error}");
    }

    #[test]
    fn without_a_cdi_file_devices_and_libraries_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = places(&folder).provide(&Wanted::All).expect_err("none").to_string();
        assert!(error.starts_with("this machine has no GPU: there is no CDI file in "), "{error}");
        gpu(&folder, 0, UUID);
        gpu(&folder, 1, "GPU-00000000-0000-0000-0000-0000000000d1");
        write(&folder, "dev/nvidiactl", "");
        let places = places(&folder);
        let dev = |name: &str| folder.path().join("dev").join(name);
        let provided = places.provide(&"all".parse().expect("GPUs")).expect("found");
        assert_eq!(provided.devices, [dev("nvidia0"), dev("nvidia1"), dev("nvidiactl")]);
        let library = PathBuf::from("/usr/lib/x86_64-linux-gnu/libcuda.so.1");
        assert_eq!(provided.files, [(library.clone(), library)]);
        for one in ["0", UUID] {
            let provided = places.provide(&one.parse().expect("GPUs")).expect("found");
            assert_eq!(provided.devices, [dev("nvidia0"), dev("nvidiactl")]);
        }
        let error = places.provide(&"5".parse().expect("GPUs")).expect_err("unknown").to_string();
        assert!(error.contains("has 0 (GPU-"), "{error}");
    }

    #[test]
    fn gpus_are_written_as_they_are_read() {
        for text in ["all", "0", "1,2", UUID] {
            assert_eq!(text.parse::<Wanted>().expect("GPUs").to_string(), text);
        }
        assert!("".parse::<Wanted>().is_err() && "x".parse::<Wanted>().is_err());
    }
}
