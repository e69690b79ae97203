//! `rewarm engine`

use rewarm_probe::engine::PRESETS;
use serde::Serialize;

use crate::args::{EngineArgs, Global};
use crate::failure::Cause;
use crate::render::Output;

#[derive(Serialize)]
struct Report {
    engines: Vec<Preset>,
}

#[derive(Serialize)]
struct Preset {
    name: &'static str,
    /// Its steps as TOML, with what is to be known of it in comments.
    toml: &'static str,
}

pub(crate) fn run(args: &EngineArgs, global: &Global) -> Result<u8, Cause> {
    let wanted = PRESETS.iter().filter(|(name, _)| args.name.is_none_or(|wanted| wanted == *name));
    let engines = wanted.map(|&(name, toml)| Preset { name, toml }).collect();
    Output::new(global).answer(&Report { engines }, |report| match (args.name, &report.engines[..]) {
        (Some(_), [one]) => one.toml.to_owned(),
        (_, all) => all.iter().map(|preset| format!("{}\n", preset.name)).collect(),
    })?;
    Ok(0)
}
