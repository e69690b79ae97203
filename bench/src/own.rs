//! Memory for what is measured next.

use std::io;

use memmap2::{Advice, MmapOptions};

/// A page of this machine.
const PAGE_BYTES: usize = 4096;

/// Makes so many bytes of free memory this machine's own, for a moment.
///
/// The host of a virtual machine takes free memory back, in blocks of at least a huge page, and gives it again at a fraction of the speed
/// (free page reporting). Which measurement meets such memory is chance: here each begins with memory that has just been touched and let
/// go.
pub(crate) fn own_memory(bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut area = MmapOptions::new().len(length).map_anon()?;
    // Where the kernel has no huge pages, small ones do.
    let _ = area.advise(Advice::HugePage);
    area.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_touched_and_given_back() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/status").expect("it is always there");
            let line = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
                line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
            };
            (line("VmHWM:"), line("VmRSS:"))
        };
        let bytes = 64 << 20;
        let (_, before) = resident();
        own_memory(bytes).expect("there is room");
        let (most, after) = resident();
        assert!(most >= before + bytes - (4 << 20), "at most {most}, before {before}");
        assert!(after < before + bytes / 2, "{after} of {before} is still there");
        own_memory(0).expect("nothing to do");
    }
}
