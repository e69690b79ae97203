//! What else decides how the claims come out: who carries them out, with which rights, and how the machine and its GPUs are set.
//! Nothing is expected of it, and nothing in it names the machine.

use std::fs;

use rewarm_gpu::nvml::{Gpu, Sharing};

use crate::bench::Bench;

/// Settings of the kernel that change what a caller may do.
const SETTINGS: [&str; 2] = ["kernel.yama.ptrace_scope", "vm.unprivileged_userfaultfd"];

/// One line for each, of a machine without a driver too.
pub(crate) fn notes(bench: Result<&mut Bench, &str>) -> Vec<String> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let mut notes = vec![format!("uid {user}, gid {group}")];
    notes.push(field("/proc/self/status", "CapEff"));
    notes.extend(SETTINGS.map(setting));
    notes.push(field("/proc/meminfo", "MemTotal"));
    match bench.map(|bench| bench.helper().machine()) {
        Ok(Ok(Some(machine))) => notes.extend(machine.gpus.iter().enumerate().map(gpu)),
        Ok(Ok(None)) => notes.push("GPUs: NVML tells nothing".to_owned()),
        Ok(Err(error)) => notes.push(format!("GPUs: {error}")),
        Err(error) => notes.push(format!("GPUs: {error}")),
    }
    notes
}

/// A line of a file of the kernel's, by the name it begins with.
fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    format!("{name} {}", found.map_or("not told", str::trim))
}

fn setting(name: &str) -> String {
    let value = fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/")));
    // A kernel without that part has no such file.
    format!("{name} {}", value.as_deref().map_or("absent", str::trim))
}

fn gpu((number, gpu): (usize, &Gpu)) -> String {
    let sharing = match gpu.sharing {
        Sharing::Whole => "whole",
        Sharing::Instances => "cut into instances (MIG)",
        Sharing::Virtual => "virtual (vGPU)",
    };
    let persistence = match gpu.persistent {
        Some(true) => "on",
        Some(false) => "off",
        None => "not told",
    };
    let (name, bytes) = (&gpu.name, gpu.total_bytes);
    format!("GPU {number}: {name}, {bytes} bytes, {sharing}, persistence mode {persistence}")
}
