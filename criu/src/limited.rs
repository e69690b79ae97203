//! Tests of what happens where memory is short: what is claimed must be refused before memory is taken for it.

use std::process::Command;

/// Set for the process in which the memory is short.
const LIMITED: &str = "REWARM_TEST_LIMITED";

/// Carries a part of a test out in a process that may have so many bytes of data: this test program, which runs the test with
/// that name alone.
pub(crate) fn to(bytes: u64, test: &str, part: impl FnOnce()) {
    if std::env::var_os(LIMITED).is_some() {
        return part();
    }
    let program = std::env::current_exe().expect("a test program");
    let mut command = Command::new("prlimit");
    command.arg(format!("--data={bytes}:")).arg(program).args(["--exact", test]).env(LIMITED, "1");
    let output = command.output().expect("prlimit is part of the base system");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "no test is called {test}: {said}");
}
