//! What is compared: ways to a serving process, and where its bytes come from.

use serde::Serialize;

/// A way to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// The server that runs already answers: what no start can beat.
    Running,
    /// The command is started in a replica and loads everything.
    Cold,
    /// `criu restore` of a process without container: reads all memory, then resumes.
    CriuEager,
    /// `criu restore --lazy-pages` with CRIU's own daemon.
    CriuLazy,
    /// `rewarm restore --mode eager`: all memory first.
    RewarmEager,
    /// `rewarm restore --mode lazy` of a snapshot that nobody restored before.
    RewarmLazy,
    /// The same of one whose working set was recorded.
    RewarmLazyRecorded,
}

/// Where the bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Nothing is read.
    None,
    /// In files that the page cache holds.
    FileWarm,
    /// In files that the page cache does not hold.
    FileCold,
    /// In the store that was named, over the network.
    S3,
    /// In the decoded cache of this machine.
    Cache,
}

impl Case {
    /// As JSON and charts have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Cold => "cold",
            Self::CriuEager => "criu-eager",
            Self::CriuLazy => "criu-lazy",
            Self::RewarmEager => "rewarm-eager",
            Self::RewarmLazy => "rewarm-lazy",
            Self::RewarmLazyRecorded => "rewarm-lazy-recorded",
        }
    }
}

impl Place {
    /// As JSON and charts have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FileWarm => "file-warm",
            Self::FileCold => "file-cold",
            Self::S3 => "s3",
            Self::Cache => "cache",
        }
    }
}

/// Every pair that is measured, in the order of one round. `places` are those of Rewarm; stock CRIU knows files only.
pub(crate) fn pairs(places: &[Place]) -> Vec<(Case, Place)> {
    let mut pairs = vec![(Case::Running, Place::None), (Case::Cold, Place::None)];
    for &place in places {
        if matches!(place, Place::FileWarm | Place::FileCold) {
            pairs.extend([Case::CriuEager, Case::CriuLazy].map(|case| (case, place)));
        }
        pairs.extend(
            [Case::RewarmEager, Case::RewarmLazy, Case::RewarmLazyRecorded].map(|case| (case, place)),
        );
    }
    // A snapshot whose content is cached has been restored before, and its working set with it.
    pairs.retain(|pair| *pair != (Case::RewarmLazy, Place::Cache));
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stock_criu_reads_files_only_and_every_pair_is_there_once() {
        let pairs = pairs(&[Place::FileWarm, Place::FileCold, Place::S3, Place::Cache]);
        let stock = |case| matches!(case, Case::CriuEager | Case::CriuLazy);
        assert!(
            pairs
                .iter()
                .all(|(case, place)| !stock(*case) || matches!(place, Place::FileWarm | Place::FileCold))
        );
        let mut sorted = pairs.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), pairs.len());
        assert_eq!(pairs.len(), 2 + 5 + 5 + 3 + 2);
    }

    #[test]
    fn names_are_those_of_the_json() {
        for case in [Case::Running, Case::CriuEager, Case::RewarmLazyRecorded] {
            assert_eq!(serde_json::to_value(case).unwrap(), case.name());
        }
        for place in [Place::None, Place::FileWarm, Place::S3, Place::Cache] {
            assert_eq!(serde_json::to_value(place).unwrap(), place.name());
        }
    }
}
