//! The same list of claims against the simulated driver: it must answer as the documentation says that the real one does.
//! Needs root, for devices that are mounts.

use std::path::Path;
use std::process::Command;

const FIDELITY: &str = env!("CARGO_BIN_EXE_fidelity");

fn told(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(FIDELITY).args(arguments).output().expect("the program starts");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &errors)
}

#[test]
fn the_simulated_driver_does_what_the_documentation_says() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!std::env::var("REWARM_TEST_NEEDS").is_ok_and(|needs| needs.contains("root")), "needs root");
        return;
    }
    // Cargo builds the library beside the test programs.
    let program = std::env::current_exe().expect("this program");
    let library = program.with_file_name("librewarm_gpu_sim.so");
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/gpu.md"));
    let page = page.expect("the documentation");
    let (_, numbers) = told(&["list"]);
    let mut carried_out: Vec<u32> =
        numbers.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    carried_out.sort_unstable();
    let (_, claims) = page.split_once("## Claims").expect("the list of claims");
    let rows = claims.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok());
    assert_eq!(carried_out, rows.collect::<Vec<u32>>(), "the claims and their rows in docs/gpu.md");
    let mut wrong = Vec::new();
    for number in numbers.split_whitespace() {
        let library = library.to_str().expect("a path");
        let (good, line) = told(&["claim", number, "--simulated", library]);
        let parsed: serde_json::Value = serde_json::from_str(line.lines().next().unwrap_or_default())
            .unwrap_or_else(|error| panic!("claim {number}: {error}: {line}"));
        assert_eq!((&parsed["machine"], &parsed["driver"]), (&"simulated".into(), &"simulated".into()));
        // Where nothing is documented, what the driver answered must be kept.
        let notes = parsed["notes"].as_array().expect("a list");
        let told = |note: &serde_json::Value| note.as_str().is_some_and(|note| note.starts_with("thread: 1"));
        if ["4", "20"].contains(&number) && !notes.iter().any(told) {
            wrong.push(format!("the driver's result is missing in {line}"));
        }
        if !good {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[test]
fn what_is_no_claim_is_refused() {
    assert!(!told(&["claim", "999"]).0);
    let (good, text) = told(&["claim"]);
    assert!(!good && text.contains("expected: list"), "{text}");
}
