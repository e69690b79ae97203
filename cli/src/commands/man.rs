//! `rewarm man`

use clap::CommandFactory;

use crate::args::{Cli, Global, Man};
use crate::exit::Exit;
use crate::failure::Cause;
use crate::render::Output;

pub(crate) fn run(args: &Man, global: &Global) -> Result<u8, Cause> {
    let write = |source| Cause::File { doing: "write manual pages into", path: args.folder.clone(), source };
    clap_mangen::generate_to(Cli::command(), &args.folder).map_err(write)?;
    let answer = serde_json::json!({ "folder": args.folder });
    Output::new(global).answer(&answer, |_| format!("manual pages are in {}\n", args.folder.display()))?;
    Ok(Exit::Done.code())
}
