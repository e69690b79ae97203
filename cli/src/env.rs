//! Every environment variable that rewarm reads. `docs/reference/environment.md` is generated from this list.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use rewarm_report::{Pause, Stage};

/// One environment variable.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it does, as one sentence of the documentation.
    pub doc: &'static str,
}

impl Variable {
    /// The value, where it is set and not empty.
    fn get(&self) -> Option<OsString> {
        std::env::var_os(self.name).filter(|value| !value.is_empty())
    }
}

macro_rules! variables {
    ($($constant:ident $name:literal $doc:literal;)*) => {
        $(#[doc = $doc] pub const $constant: Variable = Variable { name: $name, doc: $doc };)*
        /// All of them, in the order of the documentation.
        pub const ALL: &[&Variable] = &[$(&$constant,)*];
    };
}

variables! {
    STATE "REWARM_STATE" "Folder of running replicas, as `--state`. Default: `/run/rewarm`.";
    CRIU "REWARM_CRIU" "The CRIU program, as `--criu`. Default: the one in the cache folder, else the one in `PATH`.";
    CACHE "REWARM_CACHE" "Folder of what was built or fetched once, `criu/sbin/criu` among it. Default: `rewarm` below `XDG_CACHE_HOME`.";
    CONFIG "REWARM_CONFIG" "The configuration file, as `--config`. Default: `/etc/rewarm/config.toml`, which need not be there.";
    KEYS "REWARM_KEYS" "Folder of signing keys. Default: `/etc/rewarm/keys`.";
    LIBCUDA "REWARM_LIBCUDA" "The CUDA driver's library; a replica's shim takes it from the command that started the replica. Default: `libcuda.so.1`, as the loader finds it.";
    LIBNVML "REWARM_LIBNVML" "The library that tells of the devices' memory and modes; taken as `REWARM_LIBCUDA` is. Default: `libnvidia-ml.so.1`, as the loader finds it.";
    GPU_PATIENCE "REWARM_GPU_PATIENCE" "How long a call of the CUDA driver may take before it is given up and the helper that made it killed; taken as `REWARM_LIBCUDA` is. Default: 10 seconds for a question, 1 minute for attaching, 30 seconds and 4 for each GiB for a step.";
    CDI "REWARM_CDI" "Folders of CDI files, separated by colons, which say what a container needs to use GPUs. Default: `/etc/cdi:/var/run/cdi`.";
    LOG "REWARM_LOG" "What is logged to stderr, in the syntax of `tracing` filters, such as `debug` or `rewarm_store=trace`. Default: `warn`, or what `-v` says.";
    CACHE_MEMORY "REWARM_CACHE_MEMORY" "Bytes of memory, such as `2GiB`, in which decoded snapshots that nobody is restored from are kept, 64 of them at most; `0` for none. Counts when the fetcher is started. Default: a quarter of the free memory.";
    CACHE_DISK "REWARM_CACHE_DISK" "Bytes on disk, such as `20GiB`, in which parts of packs that came over a network are kept, in `packs` below the cache folder; `0` for none. Counts when the fetcher is started. Default: a tenth of what is free there.";
    FETCHER_IDLE "REWARM_FETCHER_IDLE" "How long the fetcher stays when nobody needs it, such as `30s`. Counts when it is started. Default: 5 minutes.";
    STORE_PATIENCE "REWARM_STORE_PATIENCE" "How long a store may bring nothing before a restore from it is given up, and with it a replica whose memory is not complete. Default: 1 minute.";
    PAUSE_AT "REWARM_TEST_PAUSE_AT" "For tests: the name of a stage at whose beginning the operation waits for half a minute, or, as `STAGE=FILE`, until that file is gone.";
    XDG_CACHE_HOME "XDG_CACHE_HOME" "Folder of caches. Default: `.cache` below `HOME`.";
    HOME "HOME" "The user's folder, for the default of `XDG_CACHE_HOME`.";
    PATH "PATH" "Where `runc` and, in the last place, `criu` are looked for.";
    NO_COLOR "NO_COLOR" "If set, nothing is coloured.";
    TERM "TERM" "`dumb` means a terminal without progress bars.";
    AWS "AWS_*" "Options of `s3://` stores: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL` and what else the `object_store` library knows.";
    GOOGLE "GOOGLE_*" "Options of `gs://` stores: `GOOGLE_SERVICE_ACCOUNT`, `GOOGLE_APPLICATION_CREDENTIALS` and what else the `object_store` library knows.";
    AZURE "AZURE_*" "Options of `az://` stores: `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY` and what else the `object_store` library knows.";
}

/// The cache folder; absent when neither it nor a home is known.
#[must_use]
pub fn cache_dir() -> Option<PathBuf> {
    if let Some(folder) = CACHE.get() {
        return Some(folder.into());
    }
    let base = XDG_CACHE_HOME
        .get()
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(HOME.get()?).join(".cache")))?;
    Some(base.join("rewarm"))
}

/// The folder of signing keys, where one is set.
#[must_use]
pub fn keys_dir() -> Option<PathBuf> {
    KEYS.get().map(PathBuf::from)
}

/// The CUDA driver's library.
#[must_use]
pub fn libcuda() -> PathBuf {
    LIBCUDA.get().map_or_else(|| PathBuf::from(rewarm_gpu::driver::LIBRARY), PathBuf::from)
}

/// NVML's library.
#[must_use]
pub fn libnvml() -> PathBuf {
    LIBNVML.get().map_or_else(|| PathBuf::from(rewarm_gpu::nvml::LIBRARY), PathBuf::from)
}

/// Folders of CDI files.
#[must_use]
pub fn cdi() -> Vec<PathBuf> {
    match CDI.get() {
        Some(folders) => std::env::split_paths(&folders).collect(),
        None => rewarm_gpu::provide::CDI_FOLDERS.map(PathBuf::from).into(),
    }
}

/// Whether colours are unwanted. <https://no-color.org>: any value but the empty one counts.
#[must_use]
pub fn no_color() -> bool {
    NO_COLOR.get().is_some()
}

/// Whether the terminal cannot move its cursor.
#[must_use]
pub fn dumb_terminal() -> bool {
    TERM.get().is_some_and(|term| term == "dumb")
}

/// The log filter, where one is set.
#[must_use]
pub fn log_filter() -> Option<String> {
    LOG.get().map(|filter| filter.to_string_lossy().into_owned())
}

/// Bytes of memory for decoded snapshots, where they are set.
///
/// # Errors
/// The text, if it is no number of bytes.
pub fn cache_memory() -> Result<Option<u64>, String> {
    parsed(&CACHE_MEMORY, |text| if text == "0" { Ok(0) } else { crate::values::bytes(text) })
}

/// Bytes on disk for packs, where they are set.
///
/// # Errors
/// The text, if it is no number of bytes.
pub fn cache_disk() -> Result<Option<u64>, String> {
    parsed(&CACHE_DISK, |text| if text == "0" { Ok(0) } else { crate::values::bytes(text) })
}

/// The folder of packs; absent when no cache folder is known.
#[must_use]
pub fn packs_dir() -> Option<PathBuf> {
    cache_dir().map(|cache| cache.join("packs"))
}

/// How long the fetcher stays, where that is set.
///
/// # Errors
/// The text, if it is no duration.
pub fn fetcher_idle() -> Result<Option<Duration>, String> {
    parsed(&FETCHER_IDLE, crate::values::duration)
}

/// How long a store may bring nothing, where that is set.
///
/// # Errors
/// The text, if it is no duration.
pub fn store_patience() -> Result<Option<Duration>, String> {
    parsed(&STORE_PATIENCE, crate::values::duration)
}

/// How long a call of the CUDA driver may take, where that is set.
///
/// # Errors
/// The text, if it is no duration.
pub fn gpu_patience() -> Result<Option<Duration>, String> {
    parsed(&GPU_PATIENCE, crate::values::duration)
}

fn parsed<T>(variable: &Variable, parse: fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    let Some(value) = variable.get() else { return Ok(None) };
    let value = value.to_string_lossy();
    parse(&value).map(Some).map_err(|problem| format!("{} is {value:?}: {problem}", variable.name))
}

/// The variables of this process that are text.
#[must_use]
pub fn all() -> Vec<(String, String)> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text).collect()
}

/// The stage at which a test wants to find this process; what is no stage is ignored.
#[must_use]
pub fn pause_at() -> Option<Pause> {
    let said = PAUSE_AT.get()?.into_string().ok()?;
    let (name, file) = match said.split_once('=') {
        Some((name, file)) => (name, Some(PathBuf::from(file))),
        None => (&*said, None),
    };
    let stage = Stage::ALL.iter().copied().find(|stage| name == stage.name())?;
    Some(Pause { stage, file })
}

/// Where a program lies in `PATH`.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let executable = |path: &PathBuf| {
        path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&PATH.get()?).map(|folder| folder.join(name)).find(executable)
}

/// The text of `docs/reference/environment.md`.
#[must_use]
pub fn document() -> String {
    let mut text = "# Environment variables\n\nEvery variable that `rewarm` reads. A flag on the command line wins over its variable. \
                    This page is generated from `cli/src/env.rs`.\n\n| variable | meaning |\n|---|---|\n"
        .to_owned();
    for variable in ALL {
        text.push_str(&format!("| `{}` | {} |\n", variable.name, variable.doc));
    }
    text
}
