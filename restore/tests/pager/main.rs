//! The pager as a process, against programs whose memory it fills and a shim that kills.
//!
//! This program plays all parts: the tests and the shim, and, started again with a role in its environment, the pager
//! or the subject, which plays CRIU's tasks. A subject knows what each of its pages must hold whatever it does to them,
//! and ends with 1 when one page is wrong.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the words of a test are for whoever runs it")]

mod endings;
mod fills;
mod images;
mod layout;
mod real;
mod source;
mod subject;
mod world;

use libtest_mimic::{Arguments, Trial};

fn main() {
    if let Some(role) = world::role() {
        std::process::exit(world::play_role(role));
    }
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(fills::trials());
    trials.extend(endings::trials());
    trials.extend(real::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
