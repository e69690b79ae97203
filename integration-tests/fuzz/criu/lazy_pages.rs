//! Messages of the lazy-pages protocol: every descriptor that comes is handed out or closed, and nothing else happens.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rewarm_criu::Error;
use rewarm_criu::lazy_pages::{Connection, Fault, Message};
use rewarm_integration_tests::fuzz::{self, Random};
use rewarm_sys::fdpass;

const FINISHED: i32 = 0x5253_5446;

/// One thing that a peer does.
#[derive(Debug, Clone, Copy)]
enum Said {
    /// A word, and nothing with it.
    Word(i32),
    /// One byte with so many descriptors.
    Byte(usize),
    /// Half a word.
    Half,
}

fn script(random: &mut Random) -> Vec<Said> {
    let mut said = Vec::new();
    for _ in 0..random.below(6) {
        let pid = random.one(&[1, 2, 6, 300, i32::MAX]);
        match random.below(12) {
            0 => said.push(Said::Word(random.one(&[0, i32::MIN, FINISHED + 1, -FINISHED]))),
            1 => said.push(Said::Half),
            2 => said.push(Said::Word(-pid)),
            3 => said.extend([Said::Word(pid), Said::Byte(random.one(&[0, 2, 3]))]),
            4 => said.push(Said::Word(pid)),
            _ => said.extend([Said::Word(pid), Said::Byte(1)]),
        }
    }
    if !random.once_in(4) {
        said.push(Said::Word(FINISHED));
    }
    said
}

/// What the messages mean: a line for each, the last one says how it ended.
fn model(said: &[Said], forgets_zombies: bool) -> Vec<String> {
    // A byte is also the beginning of a word where a word is expected, as the stream has no borders.
    let mut bytes = Vec::new();
    for item in said {
        match *item {
            Said::Word(word) => bytes.extend(word.to_le_bytes().map(|byte| (byte, 0))),
            Said::Byte(fds) => bytes.push((7, fds)),
            Said::Half => bytes.extend([(1, 0), (0, 0)]),
        }
    }
    let (mut seen, mut rest) = (Vec::new(), bytes.as_slice());
    loop {
        let Some((word, after)) = rest.split_at_checked(4) else {
            seen.push("closed".to_owned());
            return seen;
        };
        rest = after;
        match i32::from_le_bytes([word[0].0, word[1].0, word[2].0, word[3].0]) {
            FINISHED => {
                seen.push("finished".to_owned());
                return seen;
            }
            0 => {
                seen.push("refused".to_owned());
                return seen;
            }
            pid if pid < 0 && !forgets_zombies => seen.push(format!("zombie {}", pid.unsigned_abs())),
            pid => match rest.split_first() {
                None => {
                    seen.push("closed".to_owned());
                    return seen;
                }
                Some((&(_, 1), after)) => {
                    rest = after;
                    seen.push(format!("task {pid}"));
                }
                Some(_) => {
                    seen.push("refused".to_owned());
                    return seen;
                }
            },
        }
    }
}

/// What the reader makes of it. Fails if a descriptor is still open when everything has been dropped.
fn reader(said: &[Said]) -> Result<Vec<String>, String> {
    let (ours, mut theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let (mut end, given) = UnixStream::pair().map_err(|error| error.to_string())?;
    for item in said {
        let sent = match *item {
            Said::Word(word) => theirs.write_all(&word.to_le_bytes()),
            Said::Byte(0) => theirs.write_all(&[7]),
            Said::Byte(fds) => fdpass::send(&theirs, &[7], &vec![given.as_fd(); fds]),
            Said::Half => theirs.write_all(&[1, 0]),
        };
        sent.map_err(|error| error.to_string())?;
    }
    drop((theirs, given));
    let mut connection = Connection::new(ours);
    let mut seen = Vec::new();
    loop {
        let line = match connection.message() {
            Ok(Message::Task { pid, .. }) => format!("task {pid}"),
            Ok(Message::Zombie { pid }) => format!("zombie {pid}"),
            Ok(Message::Finished) => "finished".to_owned(),
            Err(Error::LazyPages(Fault::ClosedEarly { .. })) => "closed".to_owned(),
            Err(_) => "refused".to_owned(),
        };
        let ended = !line.starts_with("task") && !line.starts_with("zombie");
        seen.push(line);
        if ended {
            break;
        }
    }
    drop(connection);
    end.set_nonblocking(true).map_err(|error| error.to_string())?;
    match end.read(&mut [0]) {
        Ok(0) => Ok(seen),
        other => Err(format!("a descriptor is still open ({other:?}) after {seen:?}")),
    }
}

fn differs(
    random: &mut Random,
    reader: impl Fn(&[Said]) -> Result<Vec<String>, String>,
) -> Result<(), String> {
    let said = script(random);
    let (seen, expected) = (reader(&said)?, model(&said, false));
    if seen == expected { Ok(()) } else { Err(format!("{said:?}: {seen:?}, expected {expected:?}")) }
}

#[test]
fn lazy_pages_messages() {
    fuzz::holds("lazy-pages messages", |random| differs(random, reader));
}

#[test]
fn a_reader_of_lazy_pages_that_forgets_zombies_is_caught() {
    fuzz::catches("zombies", |random| differs(random, |said| Ok(model(said, true))));
}

#[test]
fn a_reader_of_lazy_pages_that_keeps_a_descriptor_is_caught() {
    let kept = std::cell::RefCell::new(Vec::new());
    fuzz::catches("a descriptor that is kept", |random| {
        let said = script(random);
        let (mut end, given) = UnixStream::pair().expect("a socket pair");
        if said.iter().any(|item| matches!(item, Said::Byte(1..))) {
            kept.borrow_mut().push(given);
        }
        end.set_nonblocking(true).expect("a socket");
        let closed = matches!(end.read(&mut [0]), Ok(0));
        if closed { Ok(()) } else { Err("still open".to_owned()) }
    });
}
