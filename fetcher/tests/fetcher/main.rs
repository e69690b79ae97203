//! The fetcher's processes as a restore meets them: real processes, a real store in a folder, kills at random moments.
//!
//! This program plays all parts: the tests, and, started again with the verb `fetcher`, the keeper and its workers. The
//! seed of what is random is printed; `REWARM_TEST_SEED` repeats it.

#![expect(clippy::print_stdout, reason = "the words of a test are for whoever runs it")]

/// Trials by the names of their functions.
macro_rules! trials {
    ($($name:ident),* $(,)?) => {
        vec![$(Trial::test(stringify!($name), || {
            $name();
            Ok(())
        })),*]
    };
}

mod many;
mod rights;
mod storms;
mod world;

use std::time::Duration;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(code) = play_role(&arguments) {
        std::process::exit(code.into());
    }
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(many::trials());
    trials.extend(rights::trials());
    trials.extend(storms::trials());
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The verbs that the crate starts, and `knock`, by which another user tries the door.
fn play_role(arguments: &[String]) -> Option<u8> {
    let value = |name: &str| {
        let at = arguments.iter().position(|word| word == name)?;
        arguments.get(at + 1).cloned()
    };
    let verb = arguments.iter().any(|word| word == "fetcher");
    if verb && arguments.iter().any(|word| word == "--worker") {
        return Some(rewarm_fetcher::worker::main());
    }
    if verb && let (Some(limit), Some(idle)) = (value("--limit"), value("--idle")) {
        let idle = idle.trim_end_matches("ms").parse().expect("milliseconds");
        let limit = limit.parse().expect("bytes");
        return Some(rewarm_fetcher::keeper::main(limit, 0, Duration::from_millis(idle)));
    }
    value("knock").map(|path| rights::knock(&path))
}
