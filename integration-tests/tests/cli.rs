//! What the program prints is interface: its outputs and errors as snapshots.
//!
//! A change is looked at with `cargo insta review`, or written with `INSTA_UPDATE=always` and looked at with `git diff`.

mod bars;
mod bench;
mod errors;
mod outputs;

use rewarm_integration_tests::{Output, World};

/// What differs from run to run, and the word that stands for it. Order matters: the longer forms come first.
const VARYING: &[(&str, &str)] = &[
    (r"blake3:[0-9a-f]{64}", "[digest]"),
    (r"\b[0-9a-f]{64}\b", "[digest]"),
    (r"blake3:[0-9a-f]{6,}…?", "[short digest]"),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "[uuid]"),
    (r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2}| UTC)?", "[time]"),
    (r"\b\d+(\.\d+)? ?(ns|µs|us|ms|s|m|h)\b( ago)?", "[duration]"),
    (r"\b\d+(\.\d+)? ?([KMGT]i?B|B|bytes)\b", "[size]"),
    (r"\b[0-9a-f]{40}\b", "[build id]"),
    (r"127\.0\.0\.1%3A\d{4,5}", "127.0.0.1%3A[port]"),
    (r"(127\.0\.0\.1|0\.0\.0\.0|localhost):\d{4,5}", "$1:[port]"),
    (r#"("?(?:pid|init|shim)"?[: ]+)\d+"#, "$1[pid]"),
    (r"\bport \d{4,5}\b", "port [port]"),
    (r"\bprocess \d+\b", "process [pid]"),
    (r"\bexpected \d{4,}\b", "expected [number]"),
    (r#"("host_port":)\d+"#, "$1[port]"),
    (r#"("\w+_ms":)[0-9.e-]+"#, "$1[ms]"),
    (r"\b(ready|frozen|starting) +\d+ ", "$1  [pid] "),
    (r" +\n", "\n"),
    // Columns are as wide as their widest cell.
    (r"(\S) {2,}", "$1  "),
];

/// Compares what a call printed with the snapshot `name`.
fn assert_printed(name: &str, world: &World, output: &Output) {
    let printed = format!(
        "exit {}\n--- stdout\n{}--- stderr\n{}",
        output.code.map_or_else(|| "by a signal".to_owned(), |code| code.to_string()),
        output.stdout,
        output.stderr,
    );
    // Columns are as wide as their widest cell, and the world's names are not always of the same length.
    let printed =
        printed.replace(&world.root().to_string_lossy().into_owned(), "[world]").replace(world.id(), "[id]");
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for (pattern, word) in VARYING {
        settings.add_filter(pattern, *word);
    }
    settings.bind(|| insta::assert_snapshot!(name, printed));
}
