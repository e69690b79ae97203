//! What the kernel can do.

use std::fs;
use std::path::Path;

use rewarm_sys::uffd::Uffd;

use super::Need;

/// userfaultfd reports fork, remap and remove events, `clone3` takes a pid, and cgroup v2 has its freezer.
const OLDEST: (u32, u32) = (5, 9);
/// PAGEMAP_SCAN tells the written pages of a range in one call.
const PAGEMAP_SCAN: (u32, u32) = (6, 7);

pub(super) fn version() -> Need {
    const NAME: &str = "kernel";
    let release = rewarm_sys::machine::kernel_release().unwrap_or_default();
    let architecture = rewarm_sys::machine::architecture().unwrap_or_default();
    let found = format!("{release} {architecture}");
    if architecture != "x86_64" {
        return Need::missing(
            NAME,
            found,
            "snapshots are made and restored on x86_64 only",
            "use a machine with an x86_64 processor",
        );
    }
    if parse(&release) < OLDEST {
        return Need::missing(
            NAME,
            found,
            "the kernel cannot give a restored process its old pids and report what happens to its memory",
            "boot kernel 5.9 or later",
        );
    }
    Need::ok(NAME, found)
}

pub(super) fn userfaultfd() -> Need {
    const NAME: &str = "userfaultfd";
    match Uffd::create() {
        Ok(_) => Need::ok(NAME, "with fork, remap, remove and unmap events"),
        Err(error) => Need::missing(
            NAME,
            error.to_string(),
            "restored memory cannot be filled while the server runs",
            "run as root with CAP_SYS_PTRACE, on a kernel with CONFIG_USERFAULTFD",
        ),
    }
}

pub(super) fn pagemap_scan() -> Need {
    const NAME: &str = "pagemap scan";
    let release = rewarm_sys::machine::kernel_release().unwrap_or_default();
    if parse(&release) >= PAGEMAP_SCAN {
        return Need::ok(NAME, "kernel 6.7 or later");
    }
    Need::degraded(
        NAME,
        format!("kernel {release}"),
        "CRIU finds the pages of large servers more slowly, so they stay frozen longer",
        "boot kernel 6.7 or later",
    )
}

pub(super) fn overlayfs() -> Need {
    const NAME: &str = "overlayfs";
    const CONSEQUENCE: &str = "replicas have no root file system";
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        return Need::ok(NAME, "known to the kernel");
    }
    let release = rewarm_sys::machine::kernel_release().unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release).join("kernel/fs/overlayfs");
    if modules.is_dir() {
        return Need::missing(NAME, "module is not loaded", CONSEQUENCE, "modprobe overlay");
    }
    Need::missing(NAME, "unknown to the kernel", CONSEQUENCE, "use a kernel with CONFIG_OVERLAY_FS")
}

pub(super) fn seccomp() -> Need {
    const NAME: &str = "seccomp";
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "errno") {
        return Need::ok(NAME, "filters with errno");
    }
    Need::degraded(
        NAME,
        if actions.is_empty() { "no filters".to_owned() } else { actions.trim().to_owned() },
        "servers are not kept away from io_uring and AMX tiles, which no snapshot can carry",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

/// Major and minor of a release; zeros where it has none.
fn parse(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert!(parse("6.18.44-fc-v669") > parse("6.7.0"));
        assert_eq!(parse("5.9-rc1"), (5, 9));
        assert_eq!(parse(""), (0, 0));
    }
}
