//! The programs that Rewarm starts.

use std::path::Path;
use std::process::{Command, Stdio};

use rewarm_criu::Binary;
use rewarm_report::Classify;

use super::{Need, Places};
use crate::env;

pub(super) fn criu(places: &Places) -> Need {
    const NAME: &str = "criu";
    let cache = places.cache.as_ref().map(|cache| cache.join("criu"));
    match Binary::find(places.criu.as_deref(), cache.as_deref()) {
        Ok(binary) if binary.version.knows_droppable() => {
            Need::ok(NAME, format!("{} at {}", binary.version, binary.path.display()))
        }
        Ok(binary) => Need::degraded(
            NAME,
            format!("{} at {}", binary.version, binary.path.display()),
            "servers with glibc 2.41 or later cannot be snapshotted: their clones would share random numbers",
            "build CRIU 4.2 (`make setup`), or give one by --criu",
        ),
        Err(error) => Need::missing(
            NAME,
            // Which folders were searched is a long list; the first words are what a table has room for.
            error.to_string(),
            if error.class() == rewarm_report::Class::Failed {
                "nothing can be snapshotted or restored: CRIU does not start"
            } else {
                "nothing can be snapshotted or restored"
            },
            "build CRIU (`make setup`), install version 4.2 or later, or give one by --criu",
        ),
    }
}

pub(super) fn runc() -> Need {
    const NAME: &str = "runc";
    const FIX: &str = "install runc 1.1 or later (Debian: apt-get install runc)";
    let Some(path) = env::program(NAME) else {
        return Need::missing(NAME, "not in PATH", "no container can be started", FIX);
    };
    let said = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
    let text = match &said {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => format!("{} ended with {}", path.display(), output.status),
        Err(error) => format!("{}: {error}", path.display()),
    };
    let version = text.lines().find_map(|line| line.strip_prefix("runc version ")).map(str::trim);
    match version {
        Some(version) if recent(version) => Need::ok(NAME, format!("{version} at {}", path.display())),
        Some(version) => Need::missing(
            NAME,
            format!("{version} at {}", path.display()),
            "this version cannot restore into a given network namespace",
            FIX,
        ),
        None => Need::missing(NAME, text.trim().to_owned(), "no container can be started", FIX),
    }
}

fn recent(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, 1)
}

/// CRIU probes the kernel for some 45 ms at each start unless it finds what it found before.
pub(super) fn kernel_cache() -> Need {
    const NAME: &str = "criu kernel cache";
    let cached = Path::new("/run/criu.kdat");
    if cached.exists() {
        return Need::ok(NAME, cached.display().to_string());
    }
    Need::ok(NAME, "not there yet, made by the first snapshot or restore of this boot")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_runc() {
        assert!(recent("1.1.5+ds1") && recent("1.2.0-rc1") && recent("2.0"));
        assert!(!recent("1.0.3") && !recent("what"));
    }
}
