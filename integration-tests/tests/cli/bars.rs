//! Progress bars: on a terminal they are drawn, in a pipe nobody sees them.

use std::process::Command;
use std::time::Duration;

use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, World, needs};

use crate::world;

/// How the first characters of a stage's line look.
const STAGE: &str = "ready";

/// A terminal that nobody looks at but this test; its server ends with the value.
struct Terminal<'w> {
    world: &'w World,
}

impl Terminal<'_> {
    fn tmux(&self, arguments: &[&str]) -> String {
        let socket = self.world.root().join("tmux");
        let output =
            Command::new("tmux").arg("-S").arg(socket).args(["-f", "/dev/null"]).args(arguments).output();
        let output = output.expect("start tmux");
        assert!(output.status.success(), "tmux {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        let socket = self.world.root().join("tmux");
        // A test that fails before the server has started leaves none.
        let _ = Command::new("tmux").arg("-S").arg(socket).arg("kill-server").output();
    }
}

/// Waits for a port on which nobody ever listens, so there is time to look.
fn waiting(world: &World, name: &str) -> rewarm_integration_tests::Rewarm {
    let server = Server::plain();
    let call = world.rewarm().args(["run", name, "--ready", "tcp:9", "--ready-timeout", "3s", "--"]);
    call.args(&server.command)
}

#[test]
fn bars_on_a_terminal_and_none_in_a_pipe() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Tmux]).collect();
    let Some(world) = world(&needs) else { return };
    let piped = waiting(&world, &world.name("piped")).fails(1);
    assert!(!piped.stderr.contains('\u{1b}'), "control characters in a pipe: {piped}");
    assert!(piped.stderr.starts_with("error:"), "something before the error: {piped}");

    let terminal = Terminal { world: &world };
    let script = world.files().join("run.sh");
    std::fs::write(&script, waiting(&world, &world.name("shown")).as_script()).expect("our own folder");
    terminal.tmux(&["new-session", "-d", "-x", "100", "-y", "30", "sh"]);
    let command = format!("sh {}; echo ended with $?", script.display());
    terminal.tmux(&["send-keys", &command, "Enter"]);
    world.await_state("a bar is drawn", Duration::from_secs(20), || {
        terminal.screen().lines().any(|line| line.contains(STAGE) && !line.contains("--ready"))
    });
    world.await_state("the command has ended", Duration::from_secs(20), || {
        terminal.screen().contains("ended with 1")
    });
    // What was drawn has been taken away: only the error stays.
    let screen = terminal.screen();
    assert!(screen.contains("error: failed to run"), "{screen}");
    let left = |line: &str| line.split_whitespace().nth(1) == Some(STAGE);
    assert!(!screen.lines().any(left), "a bar is left:\n{screen}");
    drop(terminal);
    world.finish();
}
