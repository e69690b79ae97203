//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Size of a probe file, in bytes. It is written by hand; more is a wrong path on the command line.
pub const PROBE_FILE_BYTES_MAX: u64 = 1 << 20;
/// Requests in a probe. Each is asked before a replica may serve, so a long list is downtime.
pub const REQUESTS_MAX: usize = 64;
/// Body of one request, in bytes. Bodies travel inside the manifest, which is the first thing that every restore reads.
pub const REQUEST_BODY_BYTES_MAX: usize = 1 << 20;
/// Answer of one request as it is read from the server, in bytes.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// What all kept answers of a probe may weigh together, in bytes, for the same reason as request bodies.
pub const RECORDED_BYTES_MAX: usize = 2 << 20;
/// Values that one JSON path may select. A path such as `$..*` on a large answer is a mistake.
pub const SELECTED_VALUES_MAX: usize = 100_000;
/// Characters of a value that an error message shows.
pub const SHOWN_CHARS_MAX: usize = 120;

/// Time for one probe request, connect included, unless the file says otherwise: a first inference can be slow.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for one hook, unless the caller says otherwise.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// Size of an engine file, in bytes, for the same reason as that of a probe file. It travels inside the manifest.
pub const ENGINE_FILE_BYTES_MAX: u64 = 64 << 10;
/// Steps before, and as many after.
pub const ENGINE_STEPS_MAX: usize = 32;
/// How often one step may be tried again.
pub const ENGINE_RETRIES_MAX: u32 = 1000;
/// Time for one attempt of a ready check. A server that holds its health endpoint longer is not ready.
pub const READY_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// First pause between two attempts of a ready check: a restored server answers within milliseconds.
pub const READY_PAUSE_MIN: Duration = Duration::from_millis(1);
/// Longest pause between two attempts over a socket.
pub const READY_PAUSE_MAX: Duration = Duration::from_millis(50);
/// Longest pause between two attempts of a command, each of which starts processes in the replica.
pub const READY_COMMAND_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Output of a hook or of a command that is kept for the error, in bytes and in lines from the end.
pub const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// See [`OUTPUT_BYTES_MAX`].
pub const OUTPUT_LINES_MAX: usize = 50;

const _: () = assert!(READY_PAUSE_MIN.as_nanos() < READY_PAUSE_MAX.as_nanos());
const _: () = assert!(REQUEST_BODY_BYTES_MAX <= RECORDED_BYTES_MAX);
