//! The same list of claims against the simulated driver: it must answer as the documentation says that the real one does.
//! Needs root, for devices that are mounts, and a CRIU for two of the claims.

use std::path::{Path, PathBuf};
use std::process::Command;

const FIDELITY: &str = env!("CARGO_BIN_EXE_fidelity");

/// What is said where there is no CRIU.
const NOT_TRIED: &str = "not tried, no CRIU";

fn told(arguments: &[&str]) -> (bool, String) {
    said_by(Command::new(FIDELITY).args(arguments))
}

fn said_by(command: &mut Command) -> (bool, String) {
    let output = command.output().expect("the program starts");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &errors)
}

/// Whether the environment says that the machine has it.
fn is_promised(need: &str) -> bool {
    std::env::var("REWARM_TEST_NEEDS").is_ok_and(|needs| needs.split(',').any(|word| word.trim() == need))
}

/// Where cargo builds the simulated driver: beside the test programs.
fn library() -> PathBuf {
    std::env::current_exe().expect("this program").with_file_name("librewarm_gpu_sim.so")
}

fn line(text: &str) -> serde_json::Value {
    let first = text.lines().next().unwrap_or_default();
    serde_json::from_str(first).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A line has these fields and no others, and was written just now.
fn is_whole(line: &serde_json::Value) {
    const FIELDS: [&str; 8] = ["claim", "date", "driver", "expected", "machine", "notes", "seen", "what"];
    let mut fields: Vec<&String> = line.as_object().expect("an object").keys().collect();
    fields.sort_unstable();
    assert_eq!(fields, FIELDS, "{line}");
    let date: jiff::Timestamp = line["date"].as_str().and_then(|date| date.parse().ok()).expect("a date");
    let ago = jiff::Timestamp::now().duration_since(date);
    assert!(!ago.is_negative() && ago.as_secs() < 600, "{line}");
}

#[test]
fn the_simulated_driver_does_what_the_documentation_says() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!is_promised("root"), "needs root");
        return;
    }
    let library = library();
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/gpu.md"));
    let page = page.expect("the documentation");
    let (_, numbers) = told(&["list"]);
    let mut carried_out: Vec<u32> =
        numbers.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    carried_out.sort_unstable();
    let (_, claims) = page.split_once("## Claims").expect("the list of claims");
    let rows = claims.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok());
    assert_eq!(carried_out, rows.collect::<Vec<u32>>(), "the claims and their rows in docs/gpu.md");
    let hardware = seen_on_hardware(Path::new(env!("CARGO_MANIFEST_DIR")));
    let mut wrong = Vec::new();
    for number in numbers.split_whitespace() {
        let library = library.to_str().expect("a path");
        let (good, text) = told(&["claim", number, "--simulated", library]);
        let parsed = line(&text);
        is_whole(&parsed);
        assert_eq!(parsed["claim"].to_string(), number);
        assert_eq!((&parsed["machine"], &parsed["driver"]), (&"simulated".into(), &"simulated".into()));
        // Where nothing is documented, what the driver answered must be kept.
        let notes = parsed["notes"].as_array().expect("a list");
        let told = |note: &serde_json::Value| note.as_str().is_some_and(|note| note.starts_with("thread: 1"));
        if ["4", "20"].contains(&number) && !notes.iter().any(told) {
            wrong.push(format!("the driver's result is missing in {text}"));
        }
        // What a stopped process was asked is carried out when it goes on, though nobody waits any more.
        if number == "29" && !notes.contains(&"continued: locked".into()) {
            wrong.push(format!("not locked when it went on: {text}"));
        }
        if !good && (parsed["seen"] != NOT_TRIED || is_promised("criu")) {
            wrong.push(text);
        }
        if parsed["seen"] != NOT_TRIED {
            wrong.extend(contradictions(&parsed, &hardware));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

/// The lines of all runs on hardware that a folder keeps, as `gpu/fidelity/run` wrote them.
fn seen_on_hardware(folder: &Path) -> Vec<serde_json::Value> {
    let files = std::fs::read_dir(folder).expect("our own folder").map(|entry| entry.expect("read").path());
    let kept = files.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    let text: String = kept.map(|path| std::fs::read_to_string(path).expect("a file of lines")).collect();
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Where hardware answered otherwise than the simulated driver does. What was not tried, or went wrong in another way, is no answer.
fn contradictions(simulated: &serde_json::Value, hardware: &[serde_json::Value]) -> Vec<String> {
    let is_answer = |line: &&serde_json::Value| {
        let seen = line["seen"].as_str().unwrap_or_default();
        line["claim"] == simulated["claim"]
            && !["not tried", "error: ended"].iter().any(|no| seen.starts_with(no))
    };
    let differ = hardware.iter().filter(is_answer).filter(|line| line["seen"] != simulated["seen"]);
    differ.map(|line| format!("{line} was seen on hardware, {simulated} of the simulated driver\n")).collect()
}

#[test]
fn hardware_that_answers_otherwise_than_the_simulated_driver_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let lines = [
        r#"{"claim":"environment","seen":"told"}"#,
        r#"{"claim":6,"seen":"401"}"#,
        r#"{"claim":7,"seen":"0"}"#,
        r#"{"claim":7,"seen":"error: ended with 137"}"#,
        r#"{"claim":7,"seen":"not tried, no CRIU"}"#,
    ];
    std::fs::write(folder.path().join("h200.jsonl"), lines.join("\n")).expect("our own folder");
    std::fs::write(folder.path().join("notes.txt"), "no lines").expect("our own folder");
    let hardware = seen_on_hardware(folder.path());
    let found = |claim: u32| contradictions(&serde_json::json!({"claim": claim, "seen": "401"}), &hardware);
    assert_eq!((found(6).len(), found(7).len(), found(8).len()), (0, 1, 0));
    assert!(found(7)[0].contains(r#""seen":"0""#), "{:?}", found(7));
}

/// For measurements the simulated driver can restore without copying. It must be no kinder for that, but to a full device.
#[test]
fn a_simulated_driver_that_moves_pages_keeps_its_rules() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!is_promised("root"), "needs root");
        return;
    }
    let library = library();
    // Only the threads of the driver, whole afterwards, in several forms, through a userfaultfd, absent under one, a second time.
    for number in ["9", "13", "34", "31", "15", "23", "16"] {
        let arguments = ["claim", number, "--simulated", library.to_str().expect("a path")];
        let mut command = Command::new(FIDELITY);
        let (_, text) = said_by(command.args(arguments).env("REWARM_SIM_MOVES", "1"));
        let parsed = line(&text);
        let expected = if number == "16" { "0 and locked".into() } else { parsed["expected"].clone() };
        assert_eq!(parsed["seen"], expected, "{text}");
    }
}

#[test]
fn the_environment_is_told_with_rights_settings_and_gpus() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!is_promised("root"), "needs root");
        return;
    }
    let library = library();
    let (good, text) = told(&["environment", "--simulated", library.to_str().expect("a path")]);
    let parsed = line(&text);
    is_whole(&parsed);
    let field = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).expect("the kernel's");
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        format!("{name} {}", found.expect("a line").trim())
    };
    let setting = |name: &str| {
        let value = std::fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/")));
        format!("{name} {}", value.as_deref().map_or("absent", str::trim))
    };
    let group = nix::unistd::getegid();
    let expected = serde_json::json!([
        format!("uid 0, gid {group}"),
        field("/proc/self/status", "CapEff"),
        setting("kernel.yama.ptrace_scope"),
        setting("vm.unprivileged_userfaultfd"),
        field("/proc/meminfo", "MemTotal"),
        "GPU 0: Simulated GPU, 67108864 bytes, whole, persistence mode off",
    ]);
    assert_eq!(
        (good, &parsed["claim"], &parsed["notes"]),
        (true, &"environment".into(), &expected),
        "{text}"
    );
    // Without a driver the rest is told all the same.
    let (good, text) = told(&["environment"]);
    let notes = line(&text)["notes"].as_array().cloned().expect("a list");
    assert!(good && notes.len() >= 6, "{text}");
}

/// As it is carried to a machine that has none.
#[test]
fn a_criu_beside_the_program_is_taken() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!is_promised("root"), "needs root");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (program, criu) = (folder.path().join("fidelity"), folder.path().join("criu"));
    std::fs::copy(FIDELITY, &program).expect("copy");
    std::fs::write(&criu, "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Version: 9.9 beside it'\n")
        .expect("write");
    std::fs::set_permissions(&criu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let library = library();
    let arguments = ["claim", "30", "--simulated", library.to_str().expect("a path")];
    let mut command = Command::new(&program);
    let (good, text) = said_by(command.args(arguments).env_remove("REWARM_CRIU"));
    let parsed = line(&text);
    assert_eq!(parsed["notes"][0], "CRIU 9.9 beside it", "{text}");
    // It dumps nothing, and that is no success.
    let seen = parsed["seen"].as_str().expect("text");
    assert!(!good && seen.starts_with("error: criu dump"), "{text}");
}

#[test]
fn without_criu_a_claim_that_needs_it_says_so() {
    if !nix::unistd::geteuid().is_root() {
        assert!(!is_promised("root"), "needs root");
        return;
    }
    let library = library();
    let arguments = ["claim", "30", "--simulated", library.to_str().expect("a path")];
    let mut command = Command::new(FIDELITY);
    let output = command.args(arguments).env("REWARM_CRIU", "/nowhere/criu").output().expect("starts");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(line(&String::from_utf8_lossy(&output.stdout))["seen"], NOT_TRIED);
}

/// The script around it, with claims and kernel messages that are made up.
#[test]
fn a_run_counts_what_holds_and_keeps_what_the_kernel_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        path
    };
    // The first claim makes the kernel say something, the second does not hold, the third cannot be tried, the fourth dies.
    let fidelity = program(
        "claims",
        r#"[ "$1" = list ] && { echo 1 2 3 4; exit; }
[ "$1" = environment ] && { echo '{"claim":"environment"}'; exit; }
cd "$(dirname "$0")"
[ "$2" = 1 ] && echo '[9.0] NVRM: Xid (PCI:0000:01:00): 31, "a fault"' >> messages
[ "$2" = 4 ] && exit 9
echo "{\"claim\":$2}"
[ "$2" = 1 ] || exit "$([ "$2" = 2 ] && echo 1 || echo 3)""#,
    );
    std::fs::write(folder.path().join("messages"), "[1.0] NVRM: Xid (PCI:0000:01:00): 43, before\n")
        .expect("write");
    program("dmesg", r#"cat "$(dirname "$0")/messages""#);
    let out = folder.path().join("claims.jsonl");
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").expect("a path"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("run");
    let run = |claims: Option<&str>| {
        let mut command = Command::new(&script);
        command.arg(&out).env("FIDELITY", &fidelity).env("PATH", &path).env_remove("CLAIMS");
        said_by(command.envs(claims.map(|claims| ("CLAIMS", claims))))
    };
    let (good, said) = run(None);
    assert!(!good && said.contains("1 claims hold, 2 do not, 1 were not tried"), "{said}");
    let text = std::fs::read_to_string(&out).expect("lines");
    let lines: Vec<serde_json::Value> = text.lines().map(line).collect();
    assert_eq!(lines.len(), 6, "{text}");
    assert_eq!(lines[0]["claim"], "environment", "{text}");
    assert_eq!(lines[4]["seen"], "error: ended with 9", "{text}");
    let kernel = &lines[5];
    assert_eq!((&kernel["claim"], &kernel["seen"]), (&"kernel".into(), &"1 lines".into()), "{text}");
    assert!(kernel["notes"][0].as_str().is_some_and(|note| note.ends_with("31, a fault")), "{text}");
    // Where its messages may not be read, that is said.
    program("dmesg", "exit 1");
    run(None);
    let text = std::fs::read_to_string(&out).expect("lines");
    assert_eq!(line(text.lines().last().unwrap_or_default())["seen"], "not tried, no dmesg", "{text}");
    // Some of the claims only.
    let (good, said) = run(Some("1 3"));
    assert!(good && said.contains("1 claims hold, 0 do not, 1 were not tried"), "{said}");
    let text = std::fs::read_to_string(&out).expect("lines");
    let claims: Vec<_> = text.lines().map(|text| line(text)["claim"].clone()).collect();
    assert_eq!(claims, ["environment".into(), 1.into(), 3.into(), serde_json::json!("kernel")], "{text}");
}

#[test]
fn what_is_no_claim_is_refused() {
    assert!(!told(&["claim", "999"]).0);
    let (good, text) = told(&["claim"]);
    assert!(!good && text.contains("expected: list"), "{text}");
}
