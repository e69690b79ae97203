//! `rewarm help`

use clap::CommandFactory;

use crate::args::{Cli, Help};
use crate::exit::Exit;
use crate::failure::Cause;
use crate::render;

pub(crate) fn run(args: &Help) -> Result<u8, Cause> {
    let mut root = Cli::command();
    // Building gives each verb the global flags and its full name.
    root.build();
    let text = match args.topic.as_deref() {
        None => root.render_long_help().to_string(),
        Some("exit-codes") => format!("{}\n", Exit::table()),
        Some(verb) => match root.find_subcommand_mut(verb) {
            Some(command) => command.render_long_help().to_string(),
            None => {
                let problem = format!(
                    "{verb:?} is no verb of rewarm, expected one that `rewarm --help` lists or exit-codes"
                );
                return Err(Cause::Usage { problem });
            }
        },
    };
    render::print(&text)?;
    Ok(Exit::Done.code())
}
