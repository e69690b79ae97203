//! `rewarm serve`

use std::sync::Arc;

use rewarm_serve::config::{Budget, Config};
use rewarm_serve::keeper::{self, Settings};
use serde::Serialize;

use crate::args::{Global, Serve};
use crate::failure::Cause;
use crate::pools::{self, Pools};
use crate::render::{Output, bytes};
use crate::{programs, replicas};

#[derive(Serialize)]
struct Report {
    /// The file.
    file: String,
    /// How host memory is divided, where it is counted.
    memory: Option<Divided>,
    pools: Vec<Served>,
}

/// In bytes.
#[derive(Serialize)]
struct Divided {
    replicas: u64,
    cache: u64,
}

#[derive(Serialize)]
struct Served {
    name: String,
    snapshot: String,
    listen: String,
}

pub(crate) async fn run(args: &Serve, global: &Global) -> Result<u8, Cause> {
    let (config, stores) = (keeper::check(&args.file)?, crate::config::Config::load(global)?);
    pools::check(&config, &stores)?;
    if args.check {
        tell(args, global, &config, "is good")?;
        return Ok(0);
    }
    programs::fit_for_containers()?;
    let pools = Pools::new(global, &config, stores).await?;
    let settings =
        Settings { config: args.file.clone(), state: pools.state().to_owned(), program: replicas::program() };
    let ready = |config: &Config| {
        // A stdout that is gone is no reason not to serve.
        let _ = tell(args, global, config, "is served");
    };
    keeper::run(settings, Arc::new(pools), ready).await?;
    Ok(0)
}

fn tell(args: &Serve, global: &Global, config: &Config, what: &str) -> Result<(), Cause> {
    let served = |pool: &rewarm_serve::config::PoolConfig| Served {
        name: pool.name.clone(),
        snapshot: pool.snapshot.clone(),
        listen: pool.listen.to_string(),
    };
    let divided = |memory: Budget| Divided { replicas: memory.replicas, cache: memory.cache };
    let report = Report {
        file: args.file.display().to_string(),
        memory: config.serve.memory.map(divided),
        pools: config.pools.iter().map(served).collect(),
    };
    Output::new(global).answer(&report, |report| {
        let line = |pool: &Served| format!("  {} at {}: {}\n", pool.name, pool.listen, pool.snapshot);
        let memory = report.memory.as_ref().map_or(String::new(), |memory| {
            let (replicas, cache) = (bytes(memory.replicas), bytes(memory.cache));
            format!("  memory: {replicas} for replicas, {cache} for decoded snapshots\n")
        });
        format!("{} {what}\n{memory}{}", report.file, report.pools.iter().map(line).collect::<String>())
    })?;
    Ok(())
}
