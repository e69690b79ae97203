//! The claims, by their numbers in `docs/gpu.md`: what is expected, and how it is seen.
//!
//! None of them changes a setting of the machine. Those that could leave a driver in disorder (full devices, killed
//! processes) come last.

mod custom;
mod dumped;
mod prepared;
mod refused;
mod rights;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rewarm_gpu::ranges;
use rewarm_gpu::{CallError, Helper, Pair, State, Step, Uuid};
use rewarm_sys::hold::Hold;

use crate::bench::{Bench, Server, files_of};

/// What a lock may wait.
const LOCK: Duration = Duration::from_secs(5);
/// How long a call may take that waits for a stopped process.
const STOPPED_MAX: Duration = Duration::from_secs(10);

/// One claim.
pub(crate) struct Claim {
    /// Its number in the documentation.
    pub(crate) number: u32,
    /// In a few words.
    pub(crate) what: &'static str,
    /// What is seen where it holds.
    pub(crate) expected: &'static str,
    /// Carries it out.
    pub(crate) check: fn(&mut Bench) -> Result<String, String>,
}

pub(crate) const ALL: &[Claim] = &[
    Claim {
        number: 1,
        what: "the version suffices and all functions are there",
        expected: "yes",
        check: version,
    },
    Claim {
        number: 2,
        what: "state and restore thread without cuInit",
        expected: "running, and the same thread",
        check: rights::without_init,
    },
    Claim {
        number: 3,
        what: "the restore thread's number and name",
        expected: "cuda and 11 digits",
        check: thread,
    },
    Claim {
        number: 4,
        what: "a process without CUDA has no restore thread",
        expected: "none",
        check: no_cuda,
    },
    Claim {
        number: 5,
        what: "a caller without rights",
        expected: "304 and 304",
        check: rights::without_rights,
    },
    Claim {
        number: 35,
        what: "a caller in a user namespace of its own",
        expected: "304 and 304",
        check: rights::in_a_user_namespace,
    },
    Claim { number: 6, what: "steps out of order", expected: "401 each, nothing changed", check: order },
    Claim { number: 7, what: "a lock under a kernel", expected: "600 and running", check: kernel },
    Claim { number: 8, what: "a stopped process", expected: "late and locked", check: stopped },
    Claim {
        number: 29,
        what: "a lock of a stopped process",
        expected: "late and running",
        check: stopped_before,
    },
    Claim { number: 9, what: "only the restore thread runs", expected: "done, then whole", check: alone },
    Claim { number: 10, what: "device files after a checkpoint", expected: "0 of some", check: files },
    Claim {
        number: 11,
        what: "copies are private anonymous memory",
        expected: "at least the device memory",
        check: copies,
    },
    Claim {
        number: 12,
        what: "zeros on the device are zeros in the copies",
        expected: "at least a tenth",
        check: zeros,
    },
    Claim { number: 13, what: "a restore", expected: "locked, then whole", check: restore },
    Claim {
        number: 34,
        what: "restores of copies as they are, populated, and in huge pages",
        expected: "whole, whole, whole",
        check: prepared::copies,
    },
    Claim {
        number: 33,
        what: "two processes: all locked, all checkpointed, all restored, all unlocked",
        expected: "whole, whole",
        check: prepared::two,
    },
    Claim {
        number: 14,
        what: "a restore without cuInit",
        expected: "done with persistence mode, 800 without",
        check: rights::restore_without_init,
    },
    Claim {
        number: 17,
        what: "maps with a device that is none, with one twice, of each to itself, and no map",
        expected: "1, 1, 0, then whole; 0, then whole",
        check: map,
    },
    Claim { number: 19, what: "a caller that dies in a call", expected: "locked, then whole", check: caller },
    Claim { number: 20, what: "a forked child", expected: "no thread, and device files", check: child },
    Claim { number: 22, what: "device memory while checkpointed", expected: "given back", check: given_back },
    Claim { number: 23, what: "a second restore", expected: "401", check: second },
    Claim {
        number: 30,
        what: "a checkpointed process through plain CRIU, then restored",
        expected: "dumped, restored, then whole",
        check: dumped::plainly,
    },
    Claim {
        number: 32,
        what: "the same with criu lazy-pages, copies brought first",
        expected: "dumped, restored, then whole",
        check: dumped::with_copies_brought_first,
    },
    Claim {
        number: 24,
        what: "custom storage: device memory past the process",
        expected: "checkpointed without a copy, then whole",
        check: custom::past_the_process,
    },
    Claim {
        number: 25,
        what: "custom storage: a restore of fewer bytes",
        expected: "as many are wanted",
        check: custom::fewer_bytes,
    },
    Claim {
        number: 26,
        what: "custom storage: a caller that does not complete",
        expected: "in the middle of a restore, all steps refused, gone with it",
        check: custom::not_completed,
    },
    Claim {
        number: 27,
        what: "custom storage: a restore from host memory",
        expected: "refused and checkpointed, then whole",
        check: custom::from_host_memory,
    },
    Claim {
        number: 21,
        what: "managed memory and legacy IPC",
        expected: "refused, then whole",
        check: refused::by_the_driver,
    },
    Claim {
        number: 31,
        what: "copies that were put back under a userfaultfd",
        expected: "0, then whole",
        check: refused::copies_put_back,
    },
    Claim {
        number: 15,
        what: "copies that are absent under a userfaultfd",
        expected: "304 and checkpointed",
        check: refused::absent_copies,
    },
    Claim {
        number: 16,
        what: "a restore onto a full device",
        expected: "2 and checkpointed",
        check: refused::full,
    },
    Claim {
        number: 28,
        what: "the same again when there is room",
        expected: "0, then whole",
        check: refused::full_then_free,
    },
    Claim {
        number: 18,
        what: "device memory of a killed process, in every state",
        expected: "given back",
        check: killed,
    },
];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The driver's result, in a word.
fn code(result: Result<Duration, CallError>) -> String {
    match result {
        Ok(_) => "0".to_owned(),
        Err(CallError::Late { .. }) => "late".to_owned(),
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.0.to_string()),
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// One step of a process.
fn take(helper: &mut Helper, server: Server, step: Step) -> Result<Duration, CallError> {
    match step {
        Step::Lock => helper.lock(server.pid, LOCK),
        Step::Checkpoint => helper.checkpoint(server.pid, 0),
        Step::Restore => helper.restore(server.pid, 0, &[]),
        Step::Unlock => helper.unlock(server.pid),
    }
}

/// Locked and checkpointed.
fn checkpointed(bench: &mut Bench, flags: &[&str]) -> Result<(Helper, Server), String> {
    let server = bench.serve(flags)?;
    let mut helper = bench.helper();
    helper.lock(server.pid, LOCK).map_err(text)?;
    helper.checkpoint(server.pid, 0).map_err(text)?;
    Ok((helper, server))
}

/// Whether a server that runs again has the device memory that it had.
fn whole(server: Server) -> Result<&'static str, String> {
    Ok(if server.is_whole()? { "whole" } else { "changed" })
}

fn version(bench: &mut Bench) -> Result<String, String> {
    let mut helper = bench.helper();
    // Too old a version and a missing function are errors of the start.
    let version = helper.version().map_err(text)?;
    let began = Instant::now();
    helper.start().map_err(text)?;
    bench.notes.push(format!("CUDA {version}; attached in {}", ms(began.elapsed())));
    Ok("yes".to_owned())
}

fn thread(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    let thread = bench.helper().restore_thread(server.pid).map_err(text)?.ok_or("no thread")?;
    let name = std::fs::read_to_string(format!("/proc/{}/task/{thread}/comm", server.pid)).map_err(text)?;
    let digits = name.trim().strip_prefix("cuda").unwrap_or_default();
    let fits = digits.len() == 11 && digits.chars().all(|digit| digit.is_ascii_hexdigit());
    Ok(if fits { "cuda and 11 digits".to_owned() } else { format!("{thread} called {}", name.trim()) })
}

fn no_cuda(bench: &mut Bench) -> Result<String, String> {
    let own = std::process::id().cast_signed();
    let thread = bench.helper().restore_thread(own).map_err(text)?;
    // What the driver answers is not documented.
    for word in ["thread", "state"] {
        bench.notes.push(format!("{word}: {}", bench.bare(own, &[word])?.join(" ")));
    }
    Ok(thread.map_or_else(|| "none".to_owned(), |thread| thread.to_string()))
}

fn order(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2", "--threads", "0"])?;
    let mut helper = bench.helper();
    let mut seen = Vec::new();
    for (state, steps) in
        [(State::RUNNING, [Step::Checkpoint, Step::Unlock]), (State::LOCKED, [Step::Lock, Step::Restore])]
    {
        for step in steps {
            let refused = code(take(&mut helper, server, step));
            let now = helper.state(server.pid).map_err(text)?;
            if refused != "401" || now != state {
                seen.push(format!("{step} while {state}: {refused} and {now}"));
            }
        }
        if state == State::RUNNING {
            helper.lock(server.pid, LOCK).map_err(text)?;
        }
    }
    let _ = helper.unlock(server.pid);
    Ok(if seen.is_empty() { "401 each, nothing changed".to_owned() } else { seen.join("; ") })
}

fn kernel(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    server.ask("POST", "/kernel?3000", "")?;
    let mut helper = bench.helper();
    let refused = code(helper.lock(server.pid, Duration::from_millis(200)));
    Ok(format!("{refused} and {}", helper.state(server.pid).map_err(text)?))
}

fn stopped(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2", "--threads", "0"])?;
    bench.helper().lock(server.pid, LOCK).map_err(text)?;
    server.signal(Signal::SIGSTOP);
    let mut helper = bench.helper().with_deadline(STOPPED_MAX);
    let blocked = code(helper.checkpoint(server.pid, 0));
    Ok(format!("{blocked} and {}", helper.state(server.pid).map_err(text)?))
}

fn stopped_before(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2", "--threads", "0"])?;
    server.signal(Signal::SIGSTOP);
    let mut helper = bench.helper().with_deadline(STOPPED_MAX);
    let blocked = code(helper.lock(server.pid, LOCK));
    let state = helper.state(server.pid).map_or_else(text, text);
    // Whether a request that nobody waits for any more is carried out is not documented.
    server.signal(Signal::SIGCONT);
    std::thread::sleep(LOCK);
    bench.notes.push(format!("continued: {}", helper.state(server.pid).map_or_else(text, text)));
    Ok(format!("{blocked} and {state}"))
}

fn alone(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "16", "--threads", "4"])?;
    let mut helper = bench.helper();
    let thread = helper.restore_thread(server.pid).map_err(text)?.ok_or("no thread")?;
    helper.lock(server.pid, LOCK).map_err(text)?;
    let mut hold = Hold::new(false);
    hold.all(|| vec![server.pid], &BTreeSet::from([thread]), LOCK).map_err(text)?;
    bench.notes.push(format!("{} threads held", hold.count()));
    let checkpoint = helper.checkpoint(server.pid, 0).map_err(text)?;
    let restore = helper.restore(server.pid, 16 << 20, &[]).map_err(text)?;
    let unlock = helper.unlock(server.pid).map_err(text)?;
    bench.notes.push(format!(
        "checkpoint {}, restore {}, unlock {}",
        ms(checkpoint),
        ms(restore),
        ms(unlock)
    ));
    drop(hold);
    Ok(format!("done, then {}", whole(server)?))
}

fn files(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2", "--threads", "0"])?;
    let held = |bench: &Bench| files_of(server.pid).iter().filter(|path| bench.is_device(path)).count();
    let before = held(bench);
    let mut helper = bench.helper();
    helper.lock(server.pid, LOCK).map_err(text)?;
    helper.checkpoint(server.pid, 0).map_err(text)?;
    Ok(format!("{} of {}", held(bench), if before > 0 { "some" } else { "none" }))
}

/// Checkpoints a server of 16 MiB and gives the ranges that were added.
fn added(bench: &mut Bench) -> Result<(Server, Vec<ranges::Range>), String> {
    let server = bench.serve(&["--mib", "16", "--threads", "0"])?;
    Ok((server, added_to(&mut bench.helper(), server)?))
}

/// Checkpoints this one.
fn added_to(helper: &mut Helper, server: Server) -> Result<Vec<ranges::Range>, String> {
    helper.lock(server.pid, LOCK).map_err(text)?;
    let before = ranges::private_memory(server.pid).map_err(text)?;
    helper.checkpoint(server.pid, 0).map_err(text)?;
    let after = ranges::private_memory(server.pid).map_err(text)?;
    Ok(ranges::added(&before, &after))
}

fn copies(bench: &mut Bench) -> Result<String, String> {
    let (server, added) = added(bench)?;
    let bytes: u64 = added.iter().map(ranges::Range::bytes).sum();
    bench.notes.push(format!("{bytes} bytes in {} ranges", added.len()));
    if let Some(largest) = added.iter().max_by_key(|range| range.bytes()) {
        bench.notes.push(server.mapping(largest.start)?);
    }
    Ok(if bytes >= 16 << 20 {
        "at least the device memory".to_owned()
    } else {
        format!("{bytes} bytes in {} ranges", added.len())
    })
}

fn zeros(bench: &mut Bench) -> Result<String, String> {
    let (server, added) = added(bench)?;
    let (mut all, mut zero) = (0_u64, 0_u64);
    let mut page = vec![0; 4096];
    for range in added {
        for at in (range.start..range.end).step_by(page.len()) {
            rewarm_sys::procmem::read(server.pid, at, &mut page).map_err(text)?;
            all += 1;
            zero += u64::from(page.iter().all(|byte| *byte == 0));
        }
    }
    // A quarter of the weights is zeros.
    Ok(if zero * 10 >= all { "at least a tenth".to_owned() } else { format!("{zero} of {all} pages") })
}

fn restore(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, server) = checkpointed(bench, &["--mib", "16", "--threads", "0"])?;
    let took = helper.restore(server.pid, 16 << 20, &[]).map_err(text)?;
    let state = helper.state(server.pid).map_err(text)?;
    let unlock = helper.unlock(server.pid).map_err(text)?;
    bench.notes.push(format!("16 MiB restored in {}, unlocked in {}", ms(took), ms(unlock)));
    Ok(format!("{state}, then {}", whole(server)?))
}

fn map(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, server) = checkpointed(bench, &["--mib", "4", "--threads", "0"])?;
    let same = |uuid| Pair { old: uuid, new: uuid };
    let devices: Vec<Uuid> = helper.devices().map_err(text)?.into_iter().map(|device| device.uuid).collect();
    let all: Vec<Pair> = devices.iter().copied().map(same).collect();
    if let [_, fewer @ ..] = &all[..]
        && !fewer.is_empty()
    {
        let refused = code(helper.restore(server.pid, 0, fewer));
        bench.notes.push(format!("all but one of {} devices: {refused}", all.len()));
    }
    let none = code(helper.restore(server.pid, 0, &[same(Uuid([0xee; 16]))]));
    let twice: Vec<Pair> = all.iter().chain(all.first()).copied().collect();
    let twice = code(helper.restore(server.pid, 0, &twice));
    let mut seen = vec![none, twice];
    let mut taken = |helper: &mut Helper, pairs: &[Pair]| {
        let restored = code(helper.restore(server.pid, 0, pairs));
        helper.unlock(server.pid).map_err(text)?;
        seen.push(format!("{restored}, then {}", whole(server)?));
        Ok::<(), String>(())
    };
    taken(&mut helper, &all)?;
    for step in [Step::Lock, Step::Checkpoint] {
        take(&mut helper, server, step).map_err(text)?;
    }
    taken(&mut helper, &[])?;
    let without = seen.pop().unwrap_or_default();
    Ok(format!("{}; {without}", seen.join(", ")))
}

fn caller(bench: &mut Bench) -> Result<String, String> {
    const KERNEL: Duration = Duration::from_secs(2);
    let server = bench.serve(&["--mib", "4", "--threads", "0"])?;
    server.ask("POST", &format!("/kernel?{}", KERNEL.as_millis()), "")?;
    // It waits for the kernel, and is killed while it does.
    let mut caller = bench.bare_call(server.pid, &["lock"])?;
    std::thread::sleep(KERNEL / 4);
    let waits = caller.try_wait().map_err(text)?.is_none();
    let killed = caller.kill().and_then(|()| caller.wait());
    killed.map_err(text)?;
    if !waits {
        return Ok("the lock did not wait for the kernel".to_owned());
    }
    let mut helper = bench.helper();
    bench.notes.push(format!("at once: {}", helper.state(server.pid).map_err(text)?));
    std::thread::sleep(KERNEL);
    let state = helper.state(server.pid).map_err(text)?;
    helper.unlock(server.pid).map_err(text)?;
    Ok(format!("{state}, then {}", whole(server)?))
}

fn child(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "2"])?;
    server.ask("POST", "/fork", "")?;
    let child = server.child().ok_or("no child")?;
    let mut helper = bench.helper();
    if helper.state(server.pid).map_err(text)? != State::RUNNING {
        return Ok("the parent does not run".to_owned());
    }
    let thread = helper.restore_thread(child).map_err(text)?;
    bench.notes.push(format!("thread: {}", bench.bare(child, &["thread"])?.join(" ")));
    let files = files_of(child).into_iter().filter(|path| bench.is_device(path)).collect::<BTreeSet<_>>();
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), Signal::SIGKILL);
    let thread = thread.map_or_else(|| "no thread".to_owned(), |thread| format!("thread {thread}"));
    bench.notes.extend(files.iter().map(|path| format!("held: {path}")));
    Ok(format!("{thread}, and {}", if files.is_empty() { "no device files" } else { "device files" }))
}

fn given_back(bench: &mut Bench) -> Result<String, String> {
    let empty = bench.used_mib()?;
    let server = bench.serve(&["--mib", "32", "--threads", "0"])?;
    let used = bench.used_mib()?;
    let mut helper = bench.helper();
    helper.lock(server.pid, LOCK).map_err(text)?;
    helper.checkpoint(server.pid, 0).map_err(text)?;
    let now = bench.used_mib()?;
    let back = used >= empty + 32 && now <= empty + 1;
    Ok(if back { "given back".to_owned() } else { format!("{empty}, {used}, then {now} MiB") })
}

fn second(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, server) = checkpointed(bench, &["--mib", "2", "--threads", "0"])?;
    helper.restore(server.pid, 0, &[]).map_err(text)?;
    let again = code(helper.restore(server.pid, 0, &[]));
    helper.unlock(server.pid).map_err(text)?;
    Ok(again)
}

fn killed(bench: &mut Bench) -> Result<String, String> {
    let empty = bench.used_mib()?;
    for steps in 0..=Step::ALL.len() {
        let server = bench.serve(&["--mib", "32", "--threads", "0"])?;
        let mut helper = bench.helper();
        for step in &Step::ALL[..steps] {
            take(&mut helper, server, *step).map_err(text)?;
        }
        bench.kill(server);
        let left = bench.used_mib()?;
        if left > empty + 1 {
            return Ok(format!("{empty}, then {left} MiB after {steps} steps"));
        }
    }
    Ok("given back".to_owned())
}
