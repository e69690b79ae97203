//! Exit codes, and the only place in which a [`Class`] becomes one.

use rewarm_report::Class;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done. A successful cold fallback too.
    Done = 0,
    /// Failed; the error says what is true now.
    Failed = 1,
    /// Malformed command line, reference or probe file.
    Usage = 2,
    /// The verdict or the preflight refuses; nothing was started or frozen.
    Incompatible = 3,
    /// No such replica, snapshot, tag or bucket.
    NotFound = 4,
    /// A digest, a signature or a probe answer differs from what was recorded.
    Integrity = 5,
    /// A process was left stopped or in an unknown state, and a person must look.
    Stranded = 6,
}

impl Exit {
    /// All, in order of their codes.
    pub const ALL: [Exit; 7] = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::Incompatible,
        Exit::NotFound,
        Exit::Integrity,
        Exit::Stranded,
    ];

    /// The code.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// One line for a person.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done (a successful cold fallback too)",
            Exit::Failed => "failed; the error says what is true now",
            Exit::Usage => "malformed command line, reference or probe file",
            Exit::Incompatible => "the verdict or the preflight refuses; nothing was started or frozen",
            Exit::NotFound => "no such replica, snapshot, tag or bucket",
            Exit::Integrity => "a digest, a signature or a probe answer differs from what was recorded",
            Exit::Stranded => "a process was left stopped or in an unknown state, a person must look",
        }
    }

    /// The table of all codes, for `rewarm --help` and `rewarm help exit-codes`.
    #[must_use]
    pub fn table() -> String {
        Exit::ALL
            .iter()
            .map(|exit| format!("  {}  {}", exit.code(), exit.meaning()))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl From<Class> for Exit {
    fn from(class: Class) -> Self {
        match class {
            Class::Usage => Exit::Usage,
            Class::Incompatible => Exit::Incompatible,
            Class::NotFound => Exit::NotFound,
            Class::Integrity => Exit::Integrity,
            Class::Stranded => Exit::Stranded,
            Class::Failed => Exit::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_has_the_code_that_the_documentation_promises() {
        let codes = [
            (Class::Failed, 1),
            (Class::Usage, 2),
            (Class::Incompatible, 3),
            (Class::NotFound, 4),
            (Class::Integrity, 5),
            (Class::Stranded, 6),
        ];
        for (class, code) in codes {
            assert_eq!(Exit::from(class).code(), code, "{class:?}");
        }
        assert!(Exit::ALL.iter().enumerate().all(|(index, exit)| usize::from(exit.code()) == index));
    }
}
