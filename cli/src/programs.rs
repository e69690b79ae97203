//! The programs that the pipelines start: found once, asked for their versions side by side.

use std::process::Stdio;

use rewarm_criu::Binary;

use crate::args::Global;
use crate::env;
use crate::failure::Cause;

/// CRIU and runc.
pub(crate) struct Programs {
    pub(crate) criu: Binary,
    pub(crate) runc_version: String,
}

/// The folder that has `sbin/criu`.
pub(crate) fn criu_cache() -> Option<std::path::PathBuf> {
    env::cache_dir().map(|cache| cache.join("criu"))
}

/// Says what makes it pointless to begin: rights that this process lacks, or no runc.
pub(crate) fn fit_for_containers() -> Result<(), Cause> {
    if let Some(need) = crate::doctor::lacking_privilege() {
        let (consequence, fix) = (need.consequence.unwrap_or_default(), need.fix.unwrap_or_default());
        return Err(Cause::Unprivileged { name: need.name, found: need.found, consequence, fix });
    }
    env::program("runc").map(drop).ok_or(Cause::NoRunc)
}

/// Finds both.
pub(crate) async fn find(global: &Global) -> Result<Programs, Cause> {
    let (criu, runc_version) = tokio::join!(criu(global), runc_version());
    Ok(Programs { criu: criu?, runc_version: runc_version? })
}

/// Finds CRIU. What it said of its version is remembered in the folder of replicas, which lasts as long as the boot.
pub(crate) async fn criu(global: &Global) -> Result<Binary, Cause> {
    let (explicit, known) = (global.criu.clone(), global.state.join("criu-version"));
    let criu = tokio::task::spawn_blocking(move || {
        let binary = Binary::find_known(explicit.as_deref(), criu_cache().as_deref(), &known)?;
        // Once for each boot: without it every dump and restore spends some 45 ms asking the kernel what it can do.
        if let Err(error) = rewarm_criu::kdat::ensure(&binary) {
            tracing::debug!(%error, "CRIU's cache of kernel features could not be made; it only gets slower");
        }
        Ok::<_, rewarm_criu::Error>(binary)
    });
    Ok(criu.await.expect("looking for a program does not panic")?)
}

pub(crate) async fn runc_version() -> Result<String, Cause> {
    let path = env::program("runc").ok_or(Cause::NoRunc)?;
    let asked = tokio::process::Command::new(&path).arg("--version").stdin(Stdio::null()).output().await;
    let output = asked.map_err(|source| Cause::File { doing: "run", path, source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().find_map(|line| line.strip_prefix("runc version "));
    Ok(version.unwrap_or_default().trim().to_owned())
}
