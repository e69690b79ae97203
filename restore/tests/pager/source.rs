//! A source that makes its chunks up, slowly, wrongly or not at all if told so.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rewarm_restore::pager::{PAGE, Source, SourceError};
use serde::{Deserialize, Serialize};

use crate::layout::word;

/// How a source misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fault {
    None,
    Damaged,
    Gone,
    Short,
    Silent,
    /// The right length and a wrong byte, as a source that checks nothing would give it.
    Wrong,
    Panics,
    Stalls,
}

/// What makes a source.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Manner {
    pub(crate) chunk: u64,
    /// Time for each chunk.
    pub(crate) delay_us: u64,
    pub(crate) near: bool,
    /// What happens to the last chunk of the stream.
    pub(crate) fault: Fault,
}

pub(crate) struct Made {
    pub(crate) seed: u64,
    pub(crate) bytes: u64,
    pub(crate) manner: Manner,
    pub(crate) reads: AtomicU64,
}

impl Source for Made {
    fn chunk(&self, _task: u32, offset: u64) -> Range<u64> {
        let start = offset / self.manner.chunk * self.manner.chunk;
        start..(start + self.manner.chunk).min(self.bytes)
    }

    fn read(&self, _task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(self.manner.delay_us));
        let mut bytes = Vec::with_capacity((chunk.end - chunk.start) as usize);
        for page in chunk.start / PAGE..chunk.end / PAGE {
            for index in 0..PAGE / 8 {
                bytes.extend(word(self.seed, page, index).to_le_bytes());
            }
        }
        let last = chunk.end == self.bytes;
        match if last { self.manner.fault } else { Fault::None } {
            Fault::None => out(&bytes),
            Fault::Damaged => return Err(SourceError::Damaged("digest differs".into())),
            Fault::Gone => return Err(SourceError::Gone("no answer".into())),
            Fault::Short => out(&bytes[..bytes.len() - PAGE as usize]),
            Fault::Silent => {}
            Fault::Wrong => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                out(&bytes);
            }
            Fault::Panics => panic!("a bug in the source"),
            Fault::Stalls => std::thread::sleep(Duration::from_secs(3600)),
        }
        Ok(())
    }

    fn is_near(&self, _task: u32, _offset: u64) -> bool {
        self.manner.near
    }
}
