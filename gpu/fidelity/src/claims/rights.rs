//! What a caller may do that has not initialised the driver, or has no rights.

use super::{checkpointed, text};
use crate::bench::Bench;

pub(super) fn without_init(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    let thread = bench.helper().restore_thread(server.pid).map_err(text)?.ok_or("no thread")?;
    let seen = bench.bare(server.pid, &["state", "thread"])?;
    let same = seen == ["0 running".to_owned(), format!("0 {thread}")];
    Ok(if same { "running, and the same thread".to_owned() } else { seen.join(" and ") })
}

pub(super) fn without_rights(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    Ok(bench.bare(server.pid, &["nobody", "state", "lock"])?[1..].join(" and "))
}

pub(super) fn in_a_user_namespace(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    Ok(bench.bare(server.pid, &["namespace", "state", "lock"])?[1..].join(" and "))
}

pub(super) fn restore_without_init(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, server) = checkpointed(bench, &["--mib", "2", "--threads", "0"])?;
    let machine = helper.machine().map_err(text)?.ok_or("no NVML")?;
    let persistent = machine.gpus.iter().all(|gpu| gpu.persistent == Some(true));
    bench.notes.push(format!("persistence mode {}", if persistent { "on" } else { "off" }));
    let seen = bench.bare(server.pid, &["restore"])?.concat();
    let expected = if persistent { "0" } else { "800" };
    Ok(match seen == expected {
        true => "done with persistence mode, 800 without".to_owned(),
        false => seen,
    })
}
