//! What this machine is, as far as a process that was restored on it could notice: kernel, processor, boot.

use std::collections::BTreeSet;
use std::io;

/// The processor as `/proc/cpuinfo` describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Vendor, such as `AuthenticAMD`.
    pub vendor: String,
    /// Model name.
    pub model: String,
    /// Instruction set flags in the kernel's spelling.
    pub features: BTreeSet<String>,
}

/// The processor of this machine.
///
/// # Errors
/// If `/proc/cpuinfo` cannot be read.
pub fn cpu() -> io::Result<Cpu> {
    Ok(parse_cpuinfo(&std::fs::read_to_string("/proc/cpuinfo")?))
}

/// The kernel's release, such as `6.18.44`.
///
/// # Errors
/// If uname fails.
pub fn kernel_release() -> io::Result<String> {
    let name = nix::sys::utsname::uname()?;
    Ok(name.release().to_string_lossy().into_owned())
}

/// The architecture in the kernel's spelling, such as `x86_64`.
///
/// # Errors
/// If uname fails.
pub fn architecture() -> io::Result<String> {
    let name = nix::sys::utsname::uname()?;
    Ok(name.machine().to_string_lossy().into_owned())
}

/// The identifier of this boot: new at each boot, the same until the next.
///
/// # Errors
/// If the kernel does not tell it.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Bytes of memory that can be taken without pushing anything out, as the kernel estimates it.
///
/// # Errors
/// If `/proc/meminfo` cannot be read or lacks the line.
pub fn free_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("/proc/meminfo has no line MemAvailable"))
}

fn parse_cpuinfo(text: &str) -> Cpu {
    let field = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    // 64-bit ARM calls its flags `Features`.
    let flags = [field("flags"), field("Features")].join(" ");
    Cpu {
        vendor: field("vendor_id"),
        model: field("model name"),
        features: flags.split_whitespace().map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_speaks_for_all() {
        let cpu = parse_cpuinfo(
            "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t: fpu\n",
        );
        assert_eq!(cpu.vendor, "AuthenticAMD");
        assert_eq!(cpu.model, "EPYC");
        assert_eq!(cpu.features.into_iter().collect::<Vec<_>>(), ["avx2", "fpu"]);
    }

    #[test]
    fn this_machine_can_be_described() {
        assert!(!cpu().expect("cpuinfo").features.is_empty());
        assert!(kernel_release().expect("uname").contains('.'));
        assert_eq!(boot_id().expect("boot id").len(), 36);
    }
}
