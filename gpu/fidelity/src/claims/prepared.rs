//! Restores of copies in several forms, and of several processes.

use rewarm_gpu::Step;

use super::{added_to, code, ms, take, text, whole};
use crate::bench::Bench;

pub(super) fn copies(bench: &mut Bench) -> Result<String, String> {
    let mut seen = Vec::new();
    for form in ["as-it-is", "populated", "huge"] {
        let server = bench.serve(&["--mib", "32", "--threads", "0"])?;
        let mut session = server.session()?;
        let mut helper = bench.helper();
        for range in added_to(&mut helper, server)? {
            let path = format!("/{form}?{:x}-{:x}", range.start, range.end);
            // Some kernels have no huge pages, and some no way to populate memory.
            if form != "as-it-is"
                && let Err(error) = session.ask("POST", &path)
            {
                bench.notes.push(format!("{form}: {error}"));
            }
            if form == "huge" {
                bench.notes.push(server.mapping(range.start)?);
            }
        }
        let took = helper.restore(server.pid, 32 << 20, &[]).map_err(text)?;
        helper.unlock(server.pid).map_err(text)?;
        bench.notes.push(format!("{form}: 32 MiB restored in {}", ms(took)));
        seen.push(whole(server)?);
        bench.kill(server);
    }
    Ok(seen.join(", "))
}

pub(super) fn two(bench: &mut Bench) -> Result<String, String> {
    let servers = [(); 2].map(|()| bench.serve(&["--mib", "8", "--threads", "0"]));
    let servers = servers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut helper = bench.helper();
    for step in Step::ALL {
        for server in &servers {
            let result = code(take(&mut helper, *server, step));
            if result != "0" {
                return Ok(format!("{step}: {result}"));
            }
        }
    }
    Ok(servers.into_iter().map(whole).collect::<Result<Vec<_>, _>>()?.join(", "))
}
