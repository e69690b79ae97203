//! A scripted CRIU at the other end of the page-server stream, well-behaved and not.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use rewarm_criu::Error;
use rewarm_criu::page_server::{Fault, Flags, Object, PageSink, Summary, serve};

const PAGE: usize = 4096;
const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;

fn message(command: u32, pages: u64, vaddr: u64, id: u64) -> Vec<u8> {
    let mut bytes = command.to_le_bytes().to_vec();
    // CRIU leaves the padding as it was in memory.
    bytes.extend_from_slice(&[0xaa; 4]);
    for number in [pages, vaddr, id] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn task(pid: u64) -> u64 {
    pid << 8 | 1
}

fn shmem(id: u64) -> u64 {
    id << 8 | 2
}

fn add(flags: u32, pages: u64, vaddr: u64) -> Vec<u8> {
    message(ADD_F | flags << 16, pages, vaddr, 0)
}

/// Writes down what it is given.
#[derive(Default)]
struct Notes {
    lines: Vec<String>,
    /// Bytes of each run to read; all if `None`.
    read: Option<usize>,
    vote: i32,
}

impl PageSink for Notes {
    fn open(&mut self, object: Object) -> io::Result<()> {
        self.lines.push(object.to_string());
        Ok(())
    }

    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        let mut bytes = Vec::new();
        data.take(self.read.map_or(u64::MAX, |read| read as u64)).read_to_end(&mut bytes)?;
        let sum: u64 = bytes.iter().map(|&byte| u64::from(byte)).sum();
        self.lines.push(format!("{vaddr:#x} {pages} flags {} sum {sum}", flags.bits()));
        Ok(())
    }

    fn vote(&mut self) -> i32 {
        self.lines.push("vote".to_owned());
        self.vote
    }
}

/// Plays the script to `serve`. Returns what it says and what CRIU was answered.
fn play(script: &[Vec<u8>], sink: &mut Notes) -> (Result<Summary, Error>, Vec<u8>) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    ours.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let script = script.concat();
    thread::scope(|scope| {
        let peer = scope.spawn(move || {
            // The receiver may have given up before everything is written.
            let _ = theirs.write_all(&script);
            theirs.shutdown(std::net::Shutdown::Write).expect("shut down");
            let mut answers = Vec::new();
            let _ = theirs.read_to_end(&mut answers);
            answers
        });
        let result = serve(&ours, sink);
        drop(ours);
        (result, peer.join().expect("the script ends"))
    })
}

fn fault(script: &[Vec<u8>]) -> Fault {
    let (result, _) = play(script, &mut Notes::default());
    match result.expect_err("a broken script") {
        Error::PageServer(fault) => fault,
        other => panic!("{other:?}"),
    }
}

fn pages(count: usize, byte: u8) -> Vec<u8> {
    vec![byte; count * PAGE]
}

#[test]
fn a_whole_dump_is_taken_down_and_voted_on() {
    let mut notes = Notes { vote: -5, ..Notes::default() };
    let script = [
        message(OPEN2, 0, 0, shmem(9)),
        add(4, 1, 0),
        pages(1, 1),
        message(OPEN2, 0, 0, task(1)),
        add(6, 2, 0x10000),
        pages(2, 2),
        add(4, 1, 0x12000),
        pages(1, 3),
        message(FORCE_CLOSE, 0, 0, 0),
    ];
    let (summary, answers) = play(&script, &mut notes);
    let summary = summary.expect("a whole dump");
    assert_eq!(summary, Summary { objects: 2, runs: 3, bytes: 4 * PAGE as u64, vote: -5 });
    assert_eq!(
        notes.lines,
        [
            "shared segment 9",
            "0x0 1 flags 4 sum 4096",
            "task 1",
            "0x10000 2 flags 6 sum 16384",
            "0x12000 1 flags 4 sum 12288",
            "vote",
        ]
    );
    // One byte for each object (no parent image), then the vote.
    assert_eq!(answers, [&[0, 0][..], &(-5_i32).to_le_bytes()].concat());
}

#[test]
fn commands_of_older_versions_are_understood() {
    let mut notes = Notes::default();
    let script = [
        message(PARENT, 0, 0, task(1)),
        message(OPEN, 0, 0, task(1)),
        message(ADD, 1, 0x1000, 0),
        pages(1, 1),
        message(CLOSE, 0, 0, 0),
    ];
    let (summary, answers) = play(&script, &mut notes);
    assert_eq!(summary.expect("a whole dump").runs, 1);
    assert_eq!(notes.lines, ["task 1", "0x1000 1 flags 4 sum 4096", "vote"]);
    assert_eq!(answers, [0; 8], "PARENT and CLOSE are answered with 32 bits each, OPEN not at all");
}

#[test]
fn a_long_run_is_cut_off_at_its_end_and_what_is_not_read_is_skipped() {
    for read in [0, 1, PAGE, 999 * PAGE + 1] {
        let mut notes = Notes { read: Some(read), ..Notes::default() };
        let script = [
            message(OPEN2, 0, 0, task(1)),
            add(4, 1000, 0x1000),
            pages(1000, 1),
            add(4, 1, 0x100_0000),
            pages(1, 0),
            message(FORCE_CLOSE, 0, 0, 0),
        ];
        let (summary, _) = play(&script, &mut notes);
        assert_eq!(summary.expect("a whole dump").bytes, 1001 * PAGE as u64);
        assert_eq!(notes.lines[1], format!("0x1000 1000 flags 4 sum {read}"));
    }
}

#[test]
fn a_peer_that_closes_early_never_gets_a_vote() {
    let whole =
        [message(OPEN2, 0, 0, task(1)), add(4, 3, 0x1000), pages(3, 1), message(FORCE_CLOSE, 0, 0, 0)]
            .concat();
    for end in [0, 1, 31, 32, 33, 64, 65, 64 + PAGE, whole.len() - 33, whole.len() - 32, whole.len() - 1] {
        let mut notes = Notes::default();
        let (result, _) = play(&[whole[..end].to_vec()], &mut notes);
        let error = result.expect_err("cut off");
        assert!(matches!(error, Error::PageServer(Fault::ClosedEarly { .. })), "{end}: {error:?}");
        assert!(!notes.lines.contains(&"vote".to_owned()));
    }
}

#[test]
fn a_peer_that_stalls_runs_into_the_deadline() {
    for sent in [0, 10, 40, 64 + 100] {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        let script = [message(OPEN2, 0, 0, task(1)), add(4, 3, 0x1000), pages(3, 1)].concat();
        theirs.write_all(&script[..sent]).expect("written");
        let error = serve(&ours, &mut Notes::default()).expect_err("a stall");
        assert!(matches!(error, Error::PageServer(Fault::Deadline { .. })), "{sent}: {error:?}");
    }
}

#[test]
fn lies_are_refused_before_anything_is_read() {
    let open = || message(OPEN2, 0, 0, task(1));
    let refused = |run: Vec<u8>| match fault(&[open(), run]) {
        Fault::Run { reason, .. } => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(add(4, 0, 0x1000)), "it is empty");
    assert_eq!(refused(add(4, 1, 0x1001)), "it begins inside a page");
    assert_eq!(refused(add(4, u64::MAX, 0x1000)), "it goes beyond the address space");
    assert_eq!(refused(add(4, 1 << 52, 0x1000)), "it goes beyond the address space");
    assert_eq!(refused(add(4, 1, 1 << 56)), "it goes beyond the address space");
    assert_eq!(refused(add(4, 1, u64::MAX - 4095)), "it goes beyond the address space");
    assert_eq!(refused(add(8, 1, 0x1000)), "unknown flags");
    assert_eq!(refused(add(2, 1, 0x1000)), "its pages are not sent");
    assert_eq!(refused(add(5, 1, 0x1000)), "its pages are not sent");
    assert_eq!(refused(message(HOLE, 1, 0x1000, 0)), "its pages are not sent");
    let run = || [add(4, 2, 0x2000), pages(2, 1)].concat();
    assert!(
        matches!(fault(&[open(), run(), add(4, 1, 0x3000)]), Fault::Run { vaddr: 0x3000, .. }),
        "overlap"
    );
    assert!(matches!(fault(&[open(), run(), add(4, 1, 0x1000)]), Fault::Run { vaddr: 0x1000, .. }), "order");
    assert!(matches!(fault(&[add(4, 1, 0x1000)]), Fault::NoObject { vaddr: 0x1000 }));
    assert!(matches!(fault(&[open(), open()]), Fault::OpenedTwice { object: Object::Task { pid: 1 } }));
    assert!(matches!(fault(&[message(OPEN2, 0, 0, task(0))]), Fault::ObjectId { id: 1 }));
    assert!(matches!(fault(&[message(OPEN2, 0, 0, 0x103)]), Fault::ObjectId { id: 0x103 }));
    assert!(matches!(fault(&[message(OPEN2, 0, 0, u64::MAX - 0xfe)]), Fault::ObjectId { .. }));
    assert!(matches!(fault(&[message(GET, 1, 0x1000, task(1))]), Fault::Command { command: 7 }));
    assert!(matches!(fault(&[message(0x1025, 0, 0, 0)]), Fault::Command { command: 0x1025 }));
}

#[test]
fn a_run_that_promises_more_than_comes_is_an_early_end() {
    // 64 TiB are promised; no memory is taken for them.
    let mut notes = Notes { read: Some(PAGE), ..Notes::default() };
    let (result, _) = play(&[message(OPEN2, 0, 0, task(1)), add(4, 1 << 34, 0), pages(4, 1)], &mut notes);
    let error = result.expect_err("too little");
    assert!(
        matches!(error, Error::PageServer(Fault::ClosedEarly { bytes }) if bytes == 4 * PAGE as u64),
        "{error:?}"
    );
}

#[test]
fn a_peer_that_is_gone_before_the_vote_makes_the_dump_fail() {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    struct Gone(Option<UnixStream>);
    impl PageSink for Gone {
        fn open(&mut self, _: Object) -> io::Result<()> {
            Ok(())
        }
        fn run(&mut self, _: u64, _: u64, _: Flags, _: &mut dyn Read) -> io::Result<()> {
            Ok(())
        }
        fn vote(&mut self) -> i32 {
            self.0 = None;
            0
        }
    }
    theirs.write_all(&message(FORCE_CLOSE, 0, 0, 0)).expect("written");
    let error = serve(&ours, &mut Gone(Some(theirs))).expect_err("nobody hears the vote");
    assert!(matches!(error, Error::PageServer(Fault::ClosedEarly { bytes: 0 })), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_end_in_an_error_or_a_vote(
        parts in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..80),
                (0_u32..9, 0_u32..9, 0_u64..5, 0_u64..40, 0_u64..5).prop_map(|(command, flags, pages, page, id)| {
                    message(command | flags << 16, pages, page * 4096, (id << 8) | (1 + id % 3))
                }),
                (0_usize..3).prop_map(|count| vec![0; count * PAGE]),
                Just(message(FORCE_CLOSE, 0, 0, 0)),
            ],
            0..12,
        )
    ) {
        struct Stream<'a>(&'a [u8], usize);
        impl Read for Stream<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0.read(buffer)
            }
        }
        impl Write for Stream<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.1 += bytes.len();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let bytes = parts.concat();
        let mut notes = Notes::default();
        let result = serve(Stream(&bytes, 0), &mut notes);
        let voted = notes.lines.iter().any(|line| line == "vote");
        prop_assert_eq!(result.is_ok(), voted);
        if let Ok(summary) = result {
            prop_assert!(summary.bytes <= bytes.len() as u64);
        }
    }
}
