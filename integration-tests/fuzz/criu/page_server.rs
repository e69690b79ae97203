//! Frames of the page-server protocol, well-formed and not, at the receiver and at a model of it.

use std::collections::HashSet;
use std::io::{self, Read, Write};

use rewarm_criu::Error;
use rewarm_criu::page_server::{Fault, Flags, Object, PageSink, serve};
use rewarm_integration_tests::fuzz::{self, Random};

const PAGE: u64 = 4096;
const ADDRESS_MAX: u64 = 1 << 56;
const OPENS: [u64; 2] = [3, 4];
const CLOSES: [u64; 2] = [0x1023, 0x1024];

/// What a reader of the stream did.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// Objects, and runs with the sum of their bytes.
    steps: Vec<String>,
    /// What CRIU was answered.
    answers: Vec<u8>,
    end: End,
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    Vote,
    Closed,
    Refused,
}

/// A rule that a weakened reader has forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Order,
    Border,
    Empty,
    AddressSpace,
    Sent,
    KnownFlags,
    Twice,
    NoObject,
    TaskId,
}

const RULES: [Rule; 9] = [
    Rule::Order,
    Rule::Border,
    Rule::Empty,
    Rule::AddressSpace,
    Rule::Sent,
    Rule::KnownFlags,
    Rule::Twice,
    Rule::NoObject,
    Rule::TaskId,
];

fn frame(command: u64, flags: u64, pages: u64, vaddr: u64, object: u64) -> Vec<u8> {
    [command | flags << 16 | 0xaaaa_aaaa << 32, pages, vaddr, object]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// A dump as CRIU makes it, with something wrong here and there.
fn script(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut vaddr = 0x1000;
    for _ in 0..random.below(10) {
        match random.below(8) {
            0..=1 => {
                let id = random.one(&[0, 1, 2, 2, 9, 1 << 20, 1 << 33]);
                let kind = if random.once_in(10) { random.below(4) } else { random.one(&[1, 2]) };
                bytes.extend(frame(random.one(&[4, 4, 4, 3]), 0, 0, 0, id << 8 | kind));
                vaddr = 0x1000;
            }
            2 => bytes.extend(frame(random.one(&[1, 2, 5, 7, 8, 0x1022]), random.below(9), 1, vaddr, 0)),
            3 => bytes.extend(frame(
                6,
                random.below(10),
                random.one(&[0, 1, 2, 1 << 43, 1 << 44, 1 << 52, u64::MAX]),
                random.one(&[0, vaddr, vaddr + 1, ADDRESS_MAX - PAGE, ADDRESS_MAX, u64::MAX - 4095]),
                0,
            )),
            _ => {
                let pages = 1 + random.below(3);
                let back = if random.once_in(8) { PAGE } else { 0 };
                bytes.extend(frame(6, random.one(&[4, 6, 4, 6, 4, 6, 12]), pages, vaddr - back, 0));
                let fill = random.next() as u8;
                bytes.resize(bytes.len() + (pages * PAGE) as usize, fill);
                vaddr += pages * PAGE + random.below(3) * PAGE;
            }
        }
    }
    if !random.once_in(5) {
        bytes.extend(frame(random.one(&CLOSES), 0, 0, 0, 0));
    }
    random.spoil(&mut bytes);
    bytes
}

/// Reads the stream as the tables of `docs/protocols.md` say, but for the rule that it has forgotten.
fn model(mut rest: &[u8], forgotten: Option<Rule>) -> Seen {
    let mut seen = Seen { steps: Vec::new(), answers: Vec::new(), end: End::Closed };
    let mut opened = HashSet::new();
    let mut behind: Option<u64> = None;
    let keeps = |rule: Rule| forgotten != Some(rule);
    while let Some((head, after)) = rest.split_at_checked(32) {
        rest = after;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let (command, flags, pages, vaddr, object) =
            (word(0) & 0xffff, word(0) >> 16 & 0xffff, word(8), word(16), word(24));
        let (flags, is_run) = match command {
            1 => (4, true),
            2 => (1, true),
            6 => (flags, true),
            _ => (0, false),
        };
        if CLOSES.contains(&command) {
            seen.answers.extend(7_i32.to_le_bytes());
            seen.end = End::Vote;
            return seen;
        }
        let bad = if OPENS.contains(&command) {
            let (kind, id) = (object & 0xff, object >> 8);
            let is_pid = id > 0 && id <= u64::from(u32::MAX);
            let known = kind == 2 || (kind == 1 && (is_pid || !keeps(Rule::TaskId)));
            !known || (!opened.insert(object) && keeps(Rule::Twice))
        } else if is_run {
            let end = pages.checked_mul(PAGE).and_then(|bytes| vaddr.checked_add(bytes));
            (behind.is_none() && keeps(Rule::NoObject))
                || (flags > 7 && keeps(Rule::KnownFlags))
                || (end.is_none_or(|end| end > ADDRESS_MAX) && keeps(Rule::AddressSpace))
                || (pages == 0 && keeps(Rule::Empty))
                || (!vaddr.is_multiple_of(PAGE) && keeps(Rule::Border))
                || (vaddr < behind.unwrap_or(0) && keeps(Rule::Order))
                || (flags & 5 != 4 && keeps(Rule::Sent))
        } else {
            command != 5
        };
        if bad {
            seen.end = End::Refused;
            return seen;
        }
        if OPENS.contains(&command) {
            behind = Some(0);
            seen.steps.push(format!("open {object:x}"));
            seen.answers.extend((command == 4).then_some(0));
        } else if command == 5 {
            seen.answers.extend([0; 4]);
        } else {
            let bytes = pages.saturating_mul(PAGE);
            let Some((data, after)) =
                usize::try_from(bytes).ok().and_then(|bytes| rest.split_at_checked(bytes))
            else {
                return seen;
            };
            rest = after;
            behind = Some(vaddr.saturating_add(bytes));
            seen.steps.push(step(vaddr, pages, flags, data));
        }
    }
    seen
}

fn step(vaddr: u64, pages: u64, flags: u64, data: &[u8]) -> String {
    let sum: u64 = data.iter().map(|byte| u64::from(*byte)).sum();
    format!("run {vaddr:x} {pages} {flags} {sum}")
}

/// Both ends of a stream: what CRIU says, and what it is answered.
struct Stream<'a>(&'a [u8], &'a mut Vec<u8>);

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Notes(Vec<String>);

impl PageSink for Notes {
    fn open(&mut self, object: Object) -> io::Result<()> {
        let id = match object {
            Object::Task { pid } => u64::from(pid) << 8 | 1,
            Object::Shmem { id } => id << 8 | 2,
        };
        self.0.push(format!("open {id:x}"));
        Ok(())
    }

    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        let mut bytes = Vec::new();
        data.read_to_end(&mut bytes)?;
        self.0.push(step(vaddr, pages, u64::from(flags.bits()), &bytes));
        Ok(())
    }

    fn vote(&mut self) -> i32 {
        7
    }
}

fn receiver(bytes: &[u8]) -> Seen {
    let (mut notes, mut answers) = (Notes::default(), Vec::new());
    let end = match serve(Stream(bytes, &mut answers), &mut notes) {
        Ok(_) => End::Vote,
        Err(Error::PageServer(Fault::ClosedEarly { .. })) => End::Closed,
        Err(_) => End::Refused,
    };
    Seen { steps: notes.0, answers, end }
}

fn differs(random: &mut Random, reader: impl Fn(&[u8]) -> Seen) -> Result<(), String> {
    let bytes = script(random);
    let (seen, expected) = (reader(&bytes), model(&bytes, None));
    if seen == expected {
        Ok(())
    } else {
        Err(format!("{} bytes: {seen:?}, expected {expected:?}", bytes.len()))
    }
}

#[test]
fn page_server_frames() {
    fuzz::holds("page-server frames", |random| differs(random, receiver));
}

#[test]
fn a_page_server_that_forgets_a_rule_is_caught() {
    for rule in RULES {
        fuzz::catches(&format!("{rule:?}"), |random| differs(random, |bytes| model(bytes, Some(rule))));
    }
}
