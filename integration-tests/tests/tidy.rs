//! Rules about the source itself, checked by reading it. Needs no root and starts nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file. A file that needs more answers for more than one thing.
const FILE_LINES_MAX: usize = 800;

/// Who may depend on whom, highest first, as ARCHITECTURE.md draws it. Only what stands below a crate may be in its list.
const GRAPH: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "bench",
            "snapshot",
            "restore",
            "serve",
            "autoscaler",
            "fetcher",
            "store",
            "criu",
            "container",
            "gpu",
            "probe",
            "sys",
            "report",
        ],
    ),
    ("bench", &["probe", "report"]),
    ("snapshot", &["store", "criu", "container", "gpu", "probe", "sys", "report"]),
    ("serve", &["gateway", "autoscaler", "sys", "report"]),
    ("gateway", &[]),
    ("autoscaler", &["report"]),
    ("restore", &["fetcher", "store", "criu", "container", "gpu", "probe", "sys", "report"]),
    ("fetcher", &["store", "sys", "report"]),
    ("store", &["report"]),
    ("criu", &["sys", "report"]),
    ("container", &["gpu", "probe", "sys", "report"]),
    ("gpu/fidelity", &["gpu", "gpu/sim", "sys"]),
    ("gpu", &["sys", "report"]),
    ("gpu/sim", &[]),
    ("probe", &["report"]),
    ("sys", &["report"]),
    ("report", &[]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// Every file below the root that belongs to the repository, relative to it.
fn files() -> Vec<PathBuf> {
    let root = root();
    let mut found = Vec::new();
    let mut waiting = vec![root.clone()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).expect("readable").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().expect("a type");
            if kind.is_dir() {
                let foreign =
                    ["target", ".git", "node_modules", "__pycache__", ".venv"].contains(&name.as_str());
                if !foreign {
                    waiting.push(path);
                }
            // In a further worktree `.git` is a file.
            } else if kind.is_file() && !name.ends_with(".pyc") && name != ".git" {
                found.push(path.strip_prefix(&root).expect("below the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

fn with_extension(extension: &str) -> Vec<PathBuf> {
    files().into_iter().filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// The text of a file, or nothing where it is not text.
fn text(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_default()
}

/// Lines of Rust without what stands behind `//`, numbered from 1. Slashes in strings are cut too, which hides nothing
/// that is looked for here.
fn code_lines(path: &Path) -> Vec<(usize, String)> {
    let strip = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    text(path).lines().enumerate().map(|(index, line)| (index + 1, strip(line))).collect()
}

fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn arrows_between_crates_run_down_only() {
    let mut wrong = Vec::new();
    for (index, (name, allowed)) in GRAPH.iter().enumerate() {
        let below: Vec<&str> = GRAPH[index + 1..].iter().map(|(name, _)| *name).collect();
        wrong.extend(
            allowed
                .iter()
                .filter(|to| !below.contains(to))
                .map(|to| format!("table: {name} -> {to} runs up")),
        );
        let manifest: toml::Table = text(&Path::new(name).join("Cargo.toml")).parse().expect("a manifest");
        for kind in ["dependencies", "build-dependencies"] {
            let table = manifest.get(kind).and_then(|value| value.as_table()).cloned().unwrap_or_default();
            // A crate within another's folder is named by both.
            let ours = table.keys().filter_map(|key| key.strip_prefix("rewarm-"));
            let ours = ours.map(|to| to.replace("gpu-", "gpu/"));
            wrong.extend(
                ours.filter(|to| !allowed.contains(&to.as_str()))
                    .map(|to| format!("{name}/Cargo.toml: {to}")),
            );
        }
    }
    let workspace: toml::Table = text(Path::new("Cargo.toml")).parse().expect("a manifest");
    for member in workspace["workspace"]["members"].as_array().expect("a list") {
        let member = member.as_str().expect("a path");
        let known = GRAPH.iter().any(|(name, _)| *name == member) || member == "integration-tests";
        if !known {
            wrong.push(format!("{member} is not in the table of tests/tidy.rs"));
        }
    }
    assert_none("a crate may only use what stands below it in ARCHITECTURE.md", &wrong);
}

/// Where unsafe code may stand: the kernel's calls, the driver's calls, and the driver that is simulated.
const UNSAFE: &[&str] = &["sys", "gpu/src/driver.rs", "gpu/src/custom.rs", "gpu/sim"];

#[test]
fn unsafe_code_lives_where_it_may_only() {
    let marks = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait", "(unsafe_code"];
    let mut wrong = Vec::new();
    let may = |path: &&PathBuf| UNSAFE.iter().any(|place| path.starts_with(place));
    for path in with_extension("rs").iter().filter(|path| !may(path) && !is_this_file(path)) {
        for (number, line) in code_lines(path) {
            if marks.iter().any(|mark| line.contains(mark)) {
                wrong.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    assert_none(&format!("unsafe code outside of {}", UNSAFE.join(", ")), &wrong);
}

fn is_this_file(path: &Path) -> bool {
    path.ends_with("integration-tests/tests/tidy.rs")
}

#[test]
fn no_source_file_is_too_long() {
    let lines = |path: &PathBuf| (text(path).lines().count(), path.display().to_string());
    let wrong: Vec<String> = with_extension("rs")
        .iter()
        .map(lines)
        .filter(|(count, _)| *count > FILE_LINES_MAX)
        .map(|(count, path)| format!("{path}: {count} lines"))
        .collect();
    assert_none("longer than 800 lines", &wrong);
}

#[test]
fn nothing_is_left_undone_or_switched_off() {
    let marks = ["todo!(", "unimplemented!(", "#[ignore", "dbg!(", "TODO", "FIXME", "XXX:"];
    let mut wrong = Vec::new();
    for path in with_extension("rs").iter().filter(|path| !is_this_file(path)) {
        for (index, line) in text(path).lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) {
                wrong.push(format!("{}:{}: {}", path.display(), index + 1, line.trim()));
            }
        }
    }
    assert_none("undone, or a test that does not run", &wrong);
}

#[test]
fn every_source_file_says_what_it_answers_for() {
    let wrong: Vec<String> = with_extension("rs")
        .iter()
        .filter(|path| !text(path).starts_with("//!"))
        .map(|path| path.display().to_string())
        .collect();
    assert_none("no //! at the head", &wrong);
}

#[test]
fn files_have_names_that_say_something() {
    let banned = ["mod.rs", "utils.rs", "util.rs", "common.rs", "helpers.rs", "misc.rs"];
    let wrong: Vec<String> = files()
        .iter()
        .filter(|path| path.file_name().is_some_and(|name| banned.iter().any(|banned| name == *banned)))
        .map(|path| path.display().to_string())
        .collect();
    assert_none("a name that says nothing", &wrong);
}

/// What the system says and not we.
const SYSTEM_SAYS: &[&str] = &["Address already in use", "No space left on device"];

/// A person looks for the text that stands on the screen, so a symptom is quoted as the program says it.
#[test]
fn symptoms_are_quoted_as_the_program_says_them() {
    let is_test = |path: &&PathBuf| {
        path.starts_with("integration-tests") || path.components().any(|part| part.as_os_str() == "tests")
    };
    let sources: Vec<String> =
        with_extension("rs").iter().filter(|path| !is_test(path)).map(|path| text(path)).collect();
    let document = text(Path::new("docs/operating.md"));
    let table = document.split("## What CRIU says").next().expect("a first part");
    let (mut looked, mut wrong) = (0, Vec::new());
    for symptom in table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()) {
        // Between every second pair of quotation marks.
        for quoted in symptom.split('"').skip(1).step_by(2) {
            for part in quoted.split("...").map(|part| part.trim_matches([' ', ':', ';'])) {
                let said = SYSTEM_SAYS.contains(&part) || sources.iter().any(|source| source.contains(part));
                looked += usize::from(part.len() > 1);
                if !said {
                    wrong.push(format!("{part:?} of {symptom}"));
                }
            }
        }
    }
    assert!(looked > 30, "only {looked} texts were found in the table");
    assert_none("docs/operating.md quotes what the program does not say", &wrong);
}

/// A file that no `mod` line names is not compiled, and its tests never run.
#[test]
fn no_source_file_is_forgotten() {
    let sources: BTreeSet<PathBuf> = with_extension("rs").into_iter().collect();
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<PathBuf> = sources.iter().filter(|path| is_crate_root(path)).cloned().collect();
    while let Some(path) = waiting.pop() {
        if !reached.insert(path.clone()) {
            continue;
        }
        let folder = path.parent().expect("it has one");
        let own = if is_crate_root(&path) { folder.to_owned() } else { path.with_extension("") };
        let source = text(&path);
        let mut explicit = None;
        for line in source.lines().map(str::trim) {
            if let Some(value) = line.strip_prefix("#[path = \"") {
                explicit = value.strip_suffix("\"]").map(|value| folder.join(value));
                continue;
            }
            let Some(name) = module_of(line) else { continue };
            waiting.push(explicit.take().unwrap_or_else(|| own.join(format!("{name}.rs"))));
        }
    }
    let forgotten: Vec<String> =
        sources.difference(&reached).map(|path| path.display().to_string()).collect();
    assert_none("no `mod` line leads to it", &forgotten);
}

fn is_crate_root(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let name = path.file_name().expect("a file").to_string_lossy().into_owned();
    match parent.as_deref() {
        Some("src") => ["lib.rs", "main.rs"].contains(&name.as_str()),
        Some("bin" | "benches" | "examples" | "fuzz") => true,
        // Where a manifest lists its test programs, the other files beside them are modules.
        Some("tests") => {
            let package = path.parent().and_then(Path::parent).expect("two folders up");
            let manifest = text(&package.join("Cargo.toml"));
            !manifest.contains("autotests = false") || manifest.contains(&format!("path = \"tests/{name}\""))
        }
        // `tests/NAME/main.rs` is the program NAME.
        _ => ["build.rs", "main.rs"].contains(&name.as_str()),
    }
}

/// `name` in `pub(crate) mod name;`.
fn module_of(line: &str) -> Option<&str> {
    let rest = line.strip_suffix(';')?;
    let (before, name) = rest.rsplit_once("mod ")?;
    let visible = before.is_empty() || (before.starts_with("pub") && before.ends_with(' '));
    let is_name =
        !name.is_empty() && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    (visible && is_name).then_some(name)
}

#[test]
fn no_path_of_a_machine_and_no_address_of_a_registry() {
    // Put together here, so that this file does not contain what it looks for.
    let paths = [["/ro", "ot/"].concat(), ["/wo", "rk/"].concat(), ["/ho", "me/"].concat()];
    let hosts = [
        ["crates", ".io"].concat(),
        ["pypi", ".org"].concat(),
        ["pythonhosted", ".org"].concat(),
        ["npmjs", ".org"].concat(),
        ["npmjs", ".com"].concat(),
        ["deb.debian", ".org"].concat(),
        ["huggingface", ".co"].concat(),
        ["docker", ".io"].concat(),
    ];
    let mut wrong = Vec::new();
    // Cargo's own lock file names its registry by the address that Cargo writes.
    for path in files().iter().filter(|path| path.file_name().is_some_and(|name| name != "Cargo.lock")) {
        for (index, line) in text(path).lines().enumerate() {
            let bad = paths.iter().any(|word| is_absolute(line, word))
                || hosts.iter().any(|host| line.contains(host));
            if bad {
                let shown: String = line.trim().chars().take(120).collect();
                wrong.push(format!("{}:{}: {shown}", path.display(), index + 1));
            }
        }
    }
    assert_none("a path of some machine, or the address of a registry", &wrong);
}

/// Whether `word` stands at the beginning of a path: `/proc/7/root/x` is no path of a machine's user.
fn is_absolute(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|letter| " \"'`=:(,[".contains(letter))
    })
}

/// Files that a document names must be there, or a reader is sent to nowhere.
#[test]
fn documents_name_real_files() {
    let all = files();
    let mut wrong = Vec::new();
    for document in with_extension("md") {
        let folder = document.parent().expect("below the root").to_owned();
        for (number, name) in named_files(&text(&document)) {
            let relative = folder.join(&name);
            let exists = root().join(&name).exists()
                || root().join(&relative).exists()
                || all.iter().any(|path| path.ends_with(&name));
            if !exists {
                wrong.push(format!("{}:{number}: {name}", document.display()));
            }
        }
    }
    assert_none("a document names a file that is not there", &wrong);
}

/// Targets of links within the repository, and words in backticks that look like a file of the repository.
fn named_files(document: &str) -> Vec<(usize, String)> {
    let endings = [".rs", ".md", ".toml", ".proto", ".py"];
    let mut named = Vec::new();
    let mut fenced = false;
    for (index, line) in document.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for link in line.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                named.push((index + 1, target.to_owned()));
            }
        }
        for word in line.split('`').skip(1).step_by(2) {
            let is_file = endings.iter().any(|ending| word.ends_with(ending))
                && !word.contains([' ', '{', '<', '*', '$']);
            let elsewhere = word.starts_with('/') || word.starts_with('~');
            if is_file && !elsewhere && word.contains('/') {
                named.push((index + 1, word.to_owned()));
            }
        }
    }
    named
}

/// Each promise of SPECIFICATION.md has a number of its own and names the tests that show it, and they exist.
#[test]
fn every_promise_has_its_test() {
    let specification = text(Path::new("SPECIFICATION.md"));
    let sources: BTreeMap<PathBuf, String> =
        with_extension("rs").into_iter().map(|path| (path.clone(), text(&path))).collect();
    let mut wrong = Vec::new();
    let mut numbers = BTreeSet::new();
    for (index, line) in specification.lines().enumerate().filter(|(_, line)| line.starts_with("| P")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if !numbers.insert(cells[0]) {
            wrong.push(format!("line {}: {} stands twice", index + 1, cells[0]));
        }
        let tests: Vec<&str> =
            cells.last().copied().unwrap_or_default().split('`').skip(1).step_by(2).collect();
        if tests.is_empty() {
            wrong.push(format!("line {}: no test", index + 1));
        }
        for test in tests {
            let name = test.rsplit("::").next().unwrap_or_default();
            let declared = format!("fn {name}(");
            if !sources.values().any(|source| source.contains(&declared)) {
                wrong.push(format!("line {}: no test is called {test}", index + 1));
            }
        }
    }
    assert!(!numbers.is_empty(), "SPECIFICATION.md has no line that begins with `| P`");
    assert_none("SPECIFICATION.md", &wrong);
}
