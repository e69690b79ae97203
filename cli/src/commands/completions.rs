//! `rewarm completions`

use clap::CommandFactory;

use crate::args::{Cli, Completions};
use crate::exit::Exit;
use crate::failure::Cause;
use crate::render;

pub(crate) fn run(args: &Completions) -> Result<u8, Cause> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "rewarm", &mut script);
    render::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done.code())
}
