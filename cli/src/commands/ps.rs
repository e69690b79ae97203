//! `rewarm ps`

use std::time::SystemTime;

use rewarm_container::{Cause as Why, Entry, Memory, Origin, Status};
use serde::Serialize;

use crate::args::{Global, Ps};
use crate::failure::Cause;
use crate::render::{Output, bytes, table};
use crate::replicas::{self, Published, Usage, View};

#[derive(Serialize)]
struct List {
    replicas: Vec<View>,
}

pub(crate) fn run(args: &Ps, global: &Global) -> Result<u8, Cause> {
    let entries = replicas::open(global)?.list()?;
    let shown: Vec<&Entry> = entries.iter().filter(|entry| args.all || entry.exit.is_none()).collect();
    let list = List { replicas: shown.iter().map(|entry| View::from(*entry)).collect() };
    Output::new(global).answer(&list, |_| {
        table(
            &["NAME", "STATUS", "PID", "AGE", "STARTED", "HOST", "DEVICE", "PORTS", "COMMAND"],
            shown.iter().map(|entry| row(entry)),
        )
    })?;
    Ok(0)
}

fn row(entry: &Entry) -> Vec<String> {
    let record = entry.record.as_ref();
    let status = match &entry.exit {
        Some(exit) => match &exit.cause {
            // Why a replica was killed although it did nothing wrong is the first thing to know.
            Why::Resident(reason) => format!("{} ({}: {reason})", entry.status, exit.status),
            _ => format!("{} ({})", entry.status, exit.status),
        },
        None if record.and_then(|record| record.memory) == Some(Memory::Filling) => {
            format!("{}, filling", entry.status)
        }
        // It serves nothing before what it goes on by is done.
        None if entry.status == Status::Ready && record.is_some_and(|record| record.drained.is_some()) => {
            format!("{}, drained", entry.status)
        }
        None => entry.status.to_string(),
    };
    let pid = record.and_then(|record| record.pid).filter(|_| entry.exit.is_none());
    let started = match record.map(|record| &record.origin) {
        Some(Origin::Cold) => "cold",
        Some(Origin::Restored { .. }) => "restored",
        None => "-",
    };
    let usage = record.filter(|_| entry.exit.is_none()).map(Usage::of);
    let size = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), bytes);
    let ports = record
        .map(|record| record.published.iter().map(|p| Published::from(p).describe()).collect::<Vec<_>>());
    let command = record.map(|record| record.spec.command.join(" ")).unwrap_or_default();
    vec![
        entry.name.to_string(),
        status,
        pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
        record.map_or_else(|| "-".to_owned(), |record| age(record.created.as_second())),
        started.to_owned(),
        size(usage.and_then(|usage| usage.host_bytes)),
        size(usage.and_then(|usage| usage.device_bytes)),
        ports.filter(|ports| !ports.is_empty()).map_or_else(|| "-".to_owned(), |ports| ports.join(",")),
        crop(&command),
    ]
}

/// Time since `created`, in seconds since 1970, in its largest unit.
fn age(created: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    // A clock that was set back makes a negative age; 0 is as good as any.
    let seconds = now.saturating_sub(u64::try_from(created).unwrap_or(0));
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn crop(command: &str) -> String {
    const CHARS_MAX: usize = 48;
    let line = command.replace('\n', " ");
    match line.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}
