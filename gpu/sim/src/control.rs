//! What shall go wrong: a file that the caller's side reads at each call.
//!
//! One rule a line: `CALL[@PID][*COUNT] ACTION [NUMBER]`, the first that fits counts. CALL is `init`, `state`, `thread`,
//! `lock`, `checkpoint`, `restore`, `unlock`, `complete` or `any` of these, or `devices` (how many the driver has) or `machine` (how
//! many NVML knows); with a count the rule fits so often in each caller and then no more.
//!
//! Each rule that is followed is added to a file beside it, with `.seen` at the end of its name.
//!
//! | action | what happens |
//! |---|---|
//! | `result N` | answer N, and do nothing |
//! | `then-result N` | do it, and answer N |
//! | `value N` | answer success and, for `state`, the state N |
//! | `hang`, `then-hang` | do nothing, or do it, and never answer |
//! | `die`, `then-die` | the caller's process ends before or after it is done |
//! | `oom` | out of memory, and broken for good: further restores fail with 304 |
//! | `failed` | the state becomes FAILED, result 304 |
//! | `crash` | the target's thread crashes |
//! | `rate N` | do it, at N MiB a second |
//! | `wait N` | do it after N milliseconds |

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::CONTROL_ENV;

/// What the target's side gets to know of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The thread crashes.
    Crash,
    /// The state becomes FAILED.
    Failed,
    /// Out of memory, for good.
    Broken,
}

impl Fault {
    /// As it stands in the page.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    /// What a number in the page means.
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        [Self::None, Self::Crash, Self::Failed, Self::Broken]
            .into_iter()
            .find(|fault| fault.number() == number)
            .unwrap_or(Self::None)
    }
}

/// What a rule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Do,
    Result(u32),
    ThenResult(u32),
    Value(u32),
    Hang,
    ThenHang,
    Die,
    ThenDie,
    Inject(Fault),
    Rate(u64),
    Wait(u64),
}

static SEEN: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

/// The rule for a call.
pub(crate) fn action(call: &str, pid: i32) -> Action {
    let Some(path) = std::env::var_os(CONTROL_ENV) else { return Action::Do };
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let rule = Rule::parse(line).unwrap_or_else(|| panic!("simulated driver: malformed rule {line:?}"));
        if rule.fits(call, pid) && rule.counts(line) {
            note(path, line);
            return rule.action;
        }
    }
    Action::Do
}

/// A test that waits for a call looks here.
fn note(mut path: std::ffi::OsString, line: &str) {
    use std::io::Write;
    path.push(".seen");
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // A folder that is gone belongs to a test that has ended.
    let _ = opened.and_then(|mut file| writeln!(file, "{line}"));
}

#[derive(Debug, PartialEq, Eq)]
struct Rule {
    call: String,
    pid: Option<i32>,
    count: Option<u32>,
    action: Action,
}

impl Rule {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (head, action) = (words.next()?, words.next()?);
        let number = words.next().map(str::parse::<u32>).transpose().ok()?;
        let (head, count) = match head.split_once('*') {
            Some((head, count)) => (head, Some(count.parse().ok()?)),
            None => (head, None),
        };
        let (call, pid) = match head.split_once('@') {
            Some((call, pid)) => (call, Some(pid.parse().ok()?)),
            None => (head, None),
        };
        let action = match (action, number) {
            ("result", Some(code)) => Action::Result(code),
            ("then-result", Some(code)) => Action::ThenResult(code),
            ("value", Some(value)) => Action::Value(value),
            ("rate", Some(rate)) => Action::Rate(rate.into()),
            ("wait", Some(ms)) => Action::Wait(ms.into()),
            ("hang", None) => Action::Hang,
            ("then-hang", None) => Action::ThenHang,
            ("die", None) => Action::Die,
            ("then-die", None) => Action::ThenDie,
            ("oom", None) => Action::Inject(Fault::Broken),
            ("failed", None) => Action::Inject(Fault::Failed),
            ("crash", None) => Action::Inject(Fault::Crash),
            _ => return None,
        };
        Some(Self { call: call.to_owned(), pid, count, action })
    }

    fn fits(&self, call: &str, pid: i32) -> bool {
        let asks_only = ["devices", "machine"].contains(&call);
        (self.call == call || self.call == "any" && !asks_only) && self.pid.is_none_or(|wanted| wanted == pid)
    }

    /// Whether a rule with a count still has some left.
    fn counts(&self, line: &str) -> bool {
        let Some(count) = self.count else { return true };
        let mut seen = SEEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let used = seen.entry(line.to_owned()).or_default();
        *used += 1;
        *used <= count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_nonsense_is_not() {
        let rule = Rule::parse("lock@12*3 result 600").expect("a rule");
        assert_eq!((rule.call.as_str(), rule.pid, rule.count), ("lock", Some(12), Some(3)));
        assert_eq!(rule.action, Action::Result(600));
        assert!(rule.fits("lock", 12) && !rule.fits("lock", 13) && !rule.fits("unlock", 12));
        let any = Rule::parse("any hang").expect("a rule");
        assert!(any.fits("unlock", 1) && !any.fits("machine", 0));
        for bad in ["lock", "lock result", "lock hang 3", "lock@x hang", "lock*x hang", "lock explode"] {
            assert_eq!(Rule::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_rule_with_a_count_fits_so_often() {
        let line = "thread*2 hang";
        let rule = Rule::parse(line).expect("a rule");
        assert_eq!([rule.counts(line), rule.counts(line), rule.counts(line)], [true, true, false]);
    }

    #[test]
    fn faults_keep_their_numbers() {
        for fault in [Fault::None, Fault::Crash, Fault::Failed, Fault::Broken] {
            assert_eq!(Fault::from_number(fault.number()), fault);
        }
        assert_eq!(Fault::from_number(99), Fault::None);
    }
}
